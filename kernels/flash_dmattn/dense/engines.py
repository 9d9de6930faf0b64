"""The engines that serve attention under a mask and a bias, best first.

An engine is a module with

    is_automatic(call) -> bool                       whether "auto" may take it for this call
    why_unavailable() -> str | None                  why it cannot run on this machine at all
    reject(call) -> str | None                       why it refuses this call
    forward(call) -> (out, lse, stats)               as the operator returns them
    backward(call, out, stats, dout, dlse, needs_dbias) -> (dquery, dkey, dvalue, dbias or None)

In this family "cuda" means the GPU engine: its kernels are written in Triton.
"""

from flash_dmattn.backends import flex
from flash_dmattn.dense import gpu, reference

ENGINES = {"cuda": gpu, "triton": gpu, "flex": flex, "reference": reference}
