"""The engines that serve attention over intervals, best first.

A backend is a module with

    is_automatic(call) -> bool                       whether "auto" may take it for this call
    why_unavailable() -> str | None                  why it cannot run on this machine at all
    reject(call) -> str | None                       why it refuses this call
    forward(call) -> (out, lse, stats)               as the operator returns them
    backward(call, out, stats, dout, dlse) -> (dquery, dkey, dvalue, dimportance or None)

and, if it decodes over fixed slots,

    reject_decoding(call) -> str | None              why it refuses this step
    decode(call) -> out                              changes the slots

so a new engine is a new file here and a line below. One that differentiates itself has, in place of forward and
backward,

    attend(call) -> (out, lse)

and is taken only when asked for by name.
"""

from flash_dmattn.backends import cuda, flex, reference, triton

BACKENDS = {"cuda": cuda, "triton": triton, "flex": flex, "reference": reference}
