"""The backends, best first. Which of them serves a call is decided in `flash_dmattn.dispatch` alone.

A backend is a module with

    AUTOMATIC_ON                                     types of the devices on which "auto" may take it, such as
                                                     ("cuda",); None: all
    why_unavailable() -> str | None                  why it cannot run on this machine at all

and, for every job that it does, a function that says why it refuses a call, and one that does the work. A backend that
runs everywhere, or that refuses no call of a job, leaves out the function that would say why not.

    reject(call), forward(call) -> (out, lse, stats)                                as the operator returns them
    backward(call, out, stats, dout, dlse)                                          gradients of call.DIFFERENTIABLE in
                                                                                    its order, None where one is None;
                                                                                    the last of them may be left out;
                                                                                    0 for an importance of NaN or +inf
    reject_decoding(call), decode(call) -> out                                      changes the slots
    reject_selection(importance, positions), select_visible(importance, ...)
    reject_key_lists(call), build_key_lists(call, tile_size)
    reject_order_statistics(sequence, low), kth_smallest_in_ranges(sequence, low, high, k)
    reject_token_importance(value, *parameters), token_importance(value, ...)
    reject_cut(call), cut(call) -> (score, threshold, contested_from, cut, scale)   as the operator returns them
    cut_backward(call, cut, scale, dscore, dthreshold) -> dimportance
    reject_sinks(out, lse, sinks), with_sinks(out, lse, sinks, result)              result may be out
    with_sinks_backward(dresult, out, lse, sinks) -> (dout, dlse, dsinks)

    reject_plan(call, importance), plan_attention(call, selection)                  see `flash_dmattn.planned`

One whose backward does not serve all that its forward does has reject_backward(call): the next backend takes over, on
the same saved tensors. One that differentiates itself has attend(call) -> (out, lse) in place of forward and
backward, and is taken only when asked for by name.

So a new backend is a new file here and a line below.
"""

from flash_dmattn.backends import cuda, flex, reference, triton

BACKENDS = {"cuda": cuda, "triton": triton, "flex": flex, "reference": reference}
