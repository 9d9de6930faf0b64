"""Selection and attention of the CUDA library by plan: two allocations and one call forward, six and one backward."""

import functools
import operator

import torch

from flash_dmattn.backends.cuda import backward_pass, forward_pass
from flash_dmattn.backends.cuda.head_dims import is_filled_up
from flash_dmattn.backends.cuda.plans import PassShape, Plan
from flash_dmattn.calls import AttentionCall
from flash_dmattn.visibility import Visibility

_ALIGNMENT = 256  # bytes

_facts = operator.attrgetter("shape", "dtype", "device")


class AttentionPlan:
    """An `AttentionPlan` of `flash_dmattn.planned`.

    kept holds stats (2, B, H, Sq) float32 and, where keys are listed, birth and death (B, Hi, Sk) int32. Without
    gradients it is the front of the scratch.
    """

    def __init__(self, call: AttentionCall, selection: tuple | None):
        shape = PassShape.of(call, selection)
        self._shape, self._max_visible = shape, call.max_visible
        self._forward: Plan = forward_pass.plan_forward(shape)
        self._out_shape = (shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim)
        self._lse_shape = (shape.batch, shape.num_heads, shape.seqlen_q)
        lse_bytes = 4 * shape.batch * shape.num_heads * shape.seqlen_q
        self._key_bytes = 4 * shape.num_lists * shape.seqlen_k if shape.sizes is not None else 0
        self._birth = _round_up(2 * lse_bytes)
        self._death = self._birth + _round_up(self._key_bytes)
        self._kept_bytes = self._death + _round_up(self._key_bytes)
        inputs = call.query, call.key, call.value
        self._strides = tuple(tensor.stride() for tensor in inputs)
        self._saved = [
            *map(_facts, inputs),
            ((shape.batch, shape.num_interval_heads, shape.seqlen_k), torch.float32, shape.device),  # importance
            (self._out_shape, call.query.dtype, shape.device),
            ((self._kept_bytes,), torch.uint8, shape.device),
        ]
        self._scratch_bytes = self._forward.scratch_bytes

    @functools.cached_property
    def _backward(self) -> Plan:
        return backward_pass.plan_backward(self._shape._replace(selection=None))

    def accepts(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        return (query.data_ptr() | key.data_ptr() | value.data_ptr()) % 16 == 0

    def accepts_saved(self, query, key, value, importance, out, kept) -> bool:
        return (
            list(map(_facts, (query, key, value, importance, out, kept))) == self._saved
            and (query.stride(), key.stride(), value.stride()) == self._strides
            and (importance.is_contiguous() and out.is_contiguous() and kept.is_contiguous())
            and self.accepts(query, key, value)
            and (out.data_ptr() | kept.data_ptr()) % 16 == 0
        )

    def attend(self, query, key, value, importance, *, needs_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        memory = query.new_empty(self._kept_bytes + self._scratch_bytes, dtype=torch.uint8)
        kept = memory.data_ptr()
        return self._run(query, key, value, importance, kept, kept + self._kept_bytes, needs_lse)

    def attend_and_keep(
        self, query, key, value, importance, *, needs_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        kept = query.new_empty(self._kept_bytes, dtype=torch.uint8)
        scratch = query.new_empty(self._scratch_bytes, dtype=torch.uint8)
        out, lse = self._run(query, key, value, importance, kept.data_ptr(), scratch.data_ptr(), needs_lse)
        return out, lse, kept

    def _run(self, query, key, value, importance, kept: int, scratch: int, needs_lse: bool):
        out = query.new_empty(self._out_shape)
        lse = query.new_empty(self._lse_shape, dtype=torch.float32) if needs_lse else None
        tensors = forward_pass.pack_tensors(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            importance.data_ptr(),
            *self._intervals(kept),
            0,
            0,
            out.data_ptr(),
            lse.data_ptr() if needs_lse else 0,
            kept,
            scratch,
        )
        self._forward.run(tensors)
        return out, lse

    def differentiate(
        self, query, key, value, importance, out, kept, dout, dlse
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        plan = self._backward
        inputs = (query, key, value, importance) if self._shape.has_bias else (query, key, value)
        gradients = [tensor.new_empty(tensor.shape) for tensor in inputs]
        scratch = query.new_empty(plan.scratch_bytes, dtype=torch.uint8)
        dout = backward_pass.as_rows(dout)
        dlse = None if dlse is None else dlse.contiguous()
        dquery, dkey, dvalue, dimportance = gradients if self._shape.has_bias else (*gradients, None)
        stats = kept.data_ptr()
        tensors = backward_pass.pack_tensors(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            importance.data_ptr(),
            *self._intervals(stats),
            0,
            0,
            out.data_ptr(),
            dout.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            stats,
            dquery.data_ptr(),
            dkey.data_ptr(),
            dvalue.data_ptr(),
            0 if dimportance is None else dimportance.data_ptr(),
            scratch.data_ptr(),
        )
        plan.run(tensors)
        return dquery, dkey, dvalue, dimportance

    def restore(self, query, key, value, importance, kept) -> tuple[AttentionCall, torch.Tensor]:
        shape, visibility = self._shape, None
        kept = kept.clone(memory_format=torch.contiguous_format)  # whose bytes can be read as wider numbers
        if shape.sizes is not None:
            bounds = (kept[start : start + self._key_bytes] for start in (self._birth, self._death))
            keys = shape.batch, shape.num_interval_heads, shape.seqlen_k
            visibility = Visibility(*(bound.view(torch.int32).view(keys) for bound in bounds))
        call = AttentionCall.prepare(
            query,
            key,
            value,
            importance if shape.has_bias else None,
            visibility,
            query_start=shape.seqlen_k - shape.seqlen_q,
            max_visible=self._max_visible,
            softmax_scale=shape.softmax_scale,
            softcap=shape.softcap,
            deterministic=shape.deterministic,
        )
        rows = shape.batch * shape.num_heads * shape.seqlen_q
        return call, kept[: 8 * rows].view(torch.float32).view(2, *self._lse_shape)

    def _intervals(self, kept: int) -> tuple[int, int]:
        """Returns the addresses of birth and death."""
        return (kept + self._birth, kept + self._death) if self._key_bytes else (0, 0)


def reject_plan(call: AttentionCall, importance: torch.Tensor) -> str | None:
    """Returns why there is no plan for calls like this one, which the backend serves, or None."""
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return "there are no queries or no keys"
    if importance.shape[1] != call.num_interval_heads:
        return "one importance is for all heads"
    if is_filled_up(call):
        return "its rows are filled up"
    return backward_pass.reject_backward(call)


def plan_attention(call: AttentionCall, selection: tuple | None) -> AttentionPlan:
    """Returns the plan of calls like this one, whose queries are the last rows.

    selection: as in `PassShape`; None where every key is visible from its own row on.
    """
    return AttentionPlan(call, selection)


def _round_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
