"""Selection and attention in one pass, with a plan: calls like one before it skip its checks and its choices.

A plan is found by all that checks, the choice of a backend and launches depend on: shapes, strides, dtypes, devices,
options and the environment. The first call of its kind passes the checks and selects in `flash_dmattn.attention`. It
leaves a plan behind where one backend does all of its work, and goes on by it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from flash_dmattn.calls import AttentionCall
from flash_dmattn.dispatch import choose_planner, environment, is_eager
from flash_dmattn.operators import first_derivative, output_gradients
from flash_dmattn.ops import interval_attention_backward_op

DEVICES = {"cuda"}
"""Types of the devices on which calls are planned: those whose kernels are so fast that the host counts."""

_MOST_ROUTES = 4096
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_OPTIONS = {int, float, bool, str, type(None)}


class AttentionPlan(Protocol):
    """What a backend's `plan_attention(call, selection)` returns, for float32, contiguous importances.

    kept: one tensor with all that the backward needs of the forward besides `out`.
    """

    def accepts(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the addresses of these tensors suit the kernels; no signature tells them."""

    def attend(self, query, key, value, importance, *, needs_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns out and, if needed, lse."""

    def attend_and_keep(
        self, query, key, value, importance, *, needs_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Returns out, lse if needed, and kept."""

    def accepts_saved(self, query, key, value, importance, out, kept) -> bool:
        """Whether `differentiate` can take what `attend_and_keep` took and returned, as it has come back to a backward.

        Hooks on saved tensors and checkpoints give back other tensors, whose strides and addresses may differ.
        """

    def differentiate(
        self, query, key, value, importance, out, kept, dout, dlse
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the gradients of query, key, value and importance; dlse may be None."""

    def restore(self, query, key, value, importance, kept) -> tuple[AttentionCall, torch.Tensor]:
        """Returns the call that the long way would have made, and its stats. Layouts and addresses may be any."""


@dataclass(frozen=True)
class Route:
    """A plan, with the name of the backend that was asked for.

    converts: the importance is not float32 and contiguous. has_bias: it is added to the logits.
    """

    plan: AttentionPlan
    backend: str
    converts: bool
    has_bias: bool

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, importance: torch.Tensor, needs_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns out (B, Sq, H, D) and, if needed, lse (B, H, Sq), differentiably."""
        if not self.has_bias:
            importance = importance.detach()
        if self.converts:
            importance = importance.float().contiguous()
        inputs = query, key, value, importance
        if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in inputs]):
            return _PlannedAttention.apply(*inputs, self, needs_lse)
        return self.plan.attend(*inputs, needs_lse=needs_lse)


_ROUTES: dict[tuple, Route | None] = {}


def signature_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, importance: torch.Tensor, options: tuple
) -> tuple | None:
    """Returns what a route is found by; None for a call that has to go the long way.

    options: all that the caller chose, numbers, names and None. Their types count, because checks look at them.
    """
    if not is_eager(query):
        return None
    tensors, types = (query, key, value, importance), tuple(map(type, options))
    if not (_TENSORS.issuperset(map(type, tensors)) and _OPTIONS.issuperset(types)):
        return None
    layouts = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
    return options, types, environment(), *layouts


def find_route(signature: tuple, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Route | None:
    """Returns the route of a signature for tensors at these addresses, or None."""
    route = _ROUTES.get(signature)
    return route if route is not None and route.plan.accepts(query, key, value) else None


def plan_route(
    signature: tuple, call: AttentionCall, importance: torch.Tensor, selection: tuple, backend: str
) -> Route | None:
    """Plans the calls with this signature, one of which has passed all checks, unless that was tried before.

    call: what `attend` would be given. importance: as the caller gave it. selection: keep_window_size, num_sink_tokens,
        local_window_size, sliding_window and is_causal; it is in use where the call has intervals.

    Returns the route of this call, or None.
    """
    if signature not in _ROUTES:
        if len(_ROUTES) >= _MOST_ROUTES:
            _ROUTES.clear()
        _ROUTES[signature] = _make_route(call, importance, selection, backend)
    return find_route(signature, call.query, call.key, call.value)


def _make_route(call: AttentionCall, importance: torch.Tensor, selection: tuple, backend: str) -> Route | None:
    planner = choose_planner(call, importance, backend)
    if planner is None:
        return None
    return Route(
        plan=planner.plan_attention(call, None if call.birth is None else selection),
        backend=backend,
        converts=importance.dtype != torch.float32 or not importance.is_contiguous(),
        has_bias=call.importance is not None,
    )


class _PlannedAttention(torch.autograd.Function):
    """A route with its gradient, without setup_context, for which torch reads the signature of forward every time."""

    @staticmethod
    def forward(ctx, query, key, value, importance, route, needs_lse):
        inputs = query, key, value, importance
        out, lse, kept = route.plan.attend_and_keep(*inputs, needs_lse=needs_lse)
        ctx.route = route
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, out, kept)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        saved = ctx.saved_tensors
        *inputs, out, kept = saved
        plan = ctx.route.plan
        if dout is None:
            dout = torch.zeros_like(out)
        if not torch.is_grad_enabled() and is_eager(dout, dlse, *saved) and plan.accepts_saved(*saved):
            gradients = plan.differentiate(*saved, dout, dlse)
        else:
            call, stats = plan.restore(*inputs, kept)
            dout, dlse = output_gradients(dout, dlse, out, stats)
            arguments = (dout, dlse, out.contiguous(), stats, *call.flatten(), ctx.route.backend)
            gradients = first_derivative(interval_attention_backward_op, *arguments)
        needed = zip(gradients[:4], ctx.needs_input_grad[:4], strict=True)
        return *[gradient if is_needed else None for gradient, is_needed in needed], None, None
