"""Fixed slots: what decoding needs of the past, allocated once, and the step of one token over them.

A key that falls out of the top K never comes back, so w slots per head hold all that later queries can see. One
more token takes at most one slot: an empty one, or that of the worst key that competes. Nothing moves and nothing
grows, so a step has fixed shapes and fixed addresses, and costs the same after a million tokens as after w.
"""

import torch

from flash_dmattn.arguments import check_attention, check_windows
from flash_dmattn.calls import DecodeCall, Slots
from flash_dmattn.dispatch import DECODING, can_call_directly, choose
from flash_dmattn.float8 import NUMBERS, SCALES, check_slot_dtype
from flash_dmattn.operators import signature
from flash_dmattn.ranking import find_victim


def make_slots(
    batch: int,
    num_heads: int,
    keep_window_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    value_dim: int | None = None,
    slot_dtype: torch.dtype | str | None = None,
) -> Slots:
    """Returns empty slots for `batch` rows of `num_heads` heads, ordinary tensors in inference mode, too.

    head_dim: of the keys. value_dim: of the values; None: head_dim. dtype: of the tokens.
    slot_dtype: torch.float8_e4m3fn stores keys and values in 8 bits; None: in `dtype`.
    Raises ValueError for another slot_dtype.
    """
    shape = (batch, num_heads, keep_window_size)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    slot_dtype = check_slot_dtype(slot_dtype)
    stored, value_dim = slot_dtype or dtype, head_dim if value_dim is None else value_dim
    scales_shape = (batch, num_heads, 0 if slot_dtype is None else keep_window_size)
    with torch.inference_mode(False):
        return Slots(
            keys=torch.zeros(*shape, head_dim, dtype=stored, device=device),
            values=torch.zeros(*shape, value_dim, dtype=stored, device=device),
            importance=torch.zeros(shape, dtype=precision, device=device),
            positions=torch.full(shape, -1, dtype=torch.int32, device=device),
            victims=torch.zeros(shape[:2], dtype=torch.int32, device=device),
            lengths=torch.zeros(shape[:2], dtype=torch.int32, device=device),
            arrivals=torch.zeros(shape[:2], dtype=torch.int32, device=device),
            key_scales=torch.zeros(scales_shape, dtype=SCALES, device=device),
            value_scales=torch.zeros(scales_shape, dtype=SCALES, device=device),
        )


def refresh_victims(slots: Slots, *, num_sink_tokens: int = 0, local_window_size: int = 0) -> None:
    """Finds the victims anew after positions, importances or lengths were changed by anything but a step."""
    victims = find_victim(
        slots.importance,
        slots.positions,
        slots.lengths[:, 0],
        num_sink_tokens=num_sink_tokens,
        local_window_size=local_window_size,
    )
    slots.victims.copy_(victims)


def decode_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor,
    slots: Slots,
    *,
    num_sink_tokens: int = 0,
    local_window_size: int = 0,
    sliding_window: int | None = None,
    padding_mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    add_importance_bias: bool = True,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Appends one token, gives up the key that it pushes out, and attends; keep_window_size is the number of slots.

    Equals `select_visible` and `interval_attention` over the whole sequence, at this token. Has no gradient.

    query: (B, 1, H, D). key: (B, 1, Hkv, D), value: (B, 1, Hkv, Dv), in query's dtype. The slots have that dtype, or 8
        bits: then the token is rounded as it is written, and what is attended to is rounded, the token itself included.
    importance: (B, Hi, 1) floating point, Hi = Hc, the heads of the slots.
    slots: the state, changed in place.
    padding_mask: (B, 1) bool, False for a row without a token, whose slots stay as they are and whose output is 0.
    rows: (B,) int32, no number twice: which row of the slots each token belongs to, so that the slots may have other
        rows, in any order, which stay as they are; -1 where there is no token, any number of times. None: the slots
        have B rows, one per token.
    softmax_scale: None: D ** -0.5. softcap: 0 is off.
    return_lse: also return the natural-log sum of exp of the logits.
    backend: "auto" or one of `get_available_backends()`.

    Returns out (B, 1, H, Dv) and, if asked, lse (B, H, 1) in float32 (float64 for float64). A row without a token gets
    out 0, lse -inf.

    Raises ValueError for arguments that do not fit, RuntimeError when a backend asked for by name cannot serve.
    """
    _check(query, key, value, importance, slots, padding_mask, rows, softcap)
    check_windows(slots.keys.shape[2], num_sink_tokens, local_window_size, sliding_window)
    call = DecodeCall(
        query=query,
        key=key,
        value=value,
        importance=importance,
        padding_mask=padding_mask,
        rows=rows,
        slots=slots,
        num_sink_tokens=num_sink_tokens,
        local_window_size=local_window_size,
        sliding_window=sliding_window,
        softmax_scale=query.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale),
        softcap=float(softcap),
        add_importance_bias=add_importance_bias,
    )
    if can_call_directly(query, key, value, importance, padding_mask, rows, *slots):
        out, lse = _run(call, backend)
    else:
        out, lse = decode_step_op(*call.flatten(), backend)
    return (out, lse) if return_lse else out


def _run(call: DecodeCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(call.query):
        return choose(DECODING, call, backend).decode(call)


def _decode_step(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(DecodeCall.unflatten(arguments), arguments[-1])


_decode_step.__signature__ = signature(DecodeCall, tuple[torch.Tensor, torch.Tensor])

decode_step_op = torch.library.custom_op(
    "flash_dmattn::decode_step", _decode_step, mutates_args=[f"slots_{name}" for name in Slots._fields]
)
"""`decode_step` with checked arguments: those of a `DecodeCall` one by one, and the backend's name."""


@decode_step_op.register_fake
def _(query, key, value, *_):
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty((query.shape[0], query.shape[2], 1), dtype=precision)
    return query.new_empty((*query.shape[:3], value.shape[3])), lse


def _check(query, key, value, importance, slots, padding_mask, rows, softcap) -> None:
    check_attention(query, key, value, importance, softcap=softcap, backend="auto", allow_other_value_dim=True)
    batch = query.shape[0]
    num_rows, num_heads, _, head_dim = slots.keys.shape
    if query.shape[1] != 1 or key.shape[1] != 1:
        raise ValueError(f"query and key must hold one token, got {query.shape[1]} and {key.shape[1]}")
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    is_rounded = slots.keys.dtype == NUMBERS
    stored = NUMBERS if is_rounded else query.dtype
    expected = {
        "keys": (stored, 4),
        "values": (stored, 4),
        "importance": (precision, 3),
        "positions": (torch.int32, 3),
        "victims": (torch.int32, 2),
        "lengths": (torch.int32, 2),
        "arrivals": (torch.int32, 2),
        "key_scales": (SCALES, 3),
        "value_scales": (SCALES, 3),
    }
    for (name, (dtype, num_dims)), tensor in zip(expected.items(), slots, strict=True):
        shape = (*slots.keys.shape[:3], value.shape[3]) if name == "values" else slots.keys.shape[:num_dims]
        if name.endswith("scales") and not is_rounded:
            shape = (*shape[:2], 0)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != query.device:
            raise ValueError(
                f"slots.{name} must be {dtype} on query's device {query.device} with the shape {tuple(shape)}, "
                f"got {tensor.dtype} on {tensor.device}, {tuple(tensor.shape)}"
            )
    if rows is not None:
        _check_rows(rows, query, num_rows)
        num_rows = batch
    if (num_rows, num_heads, head_dim) != (batch, importance.shape[1], query.shape[3]):
        raise ValueError(
            f"slots must have the batch, importance heads and head dim of the token "
            f"{(batch, importance.shape[1], query.shape[3])}, got {(num_rows, num_heads, head_dim)}"
        )
    if padding_mask is not None and (tuple(padding_mask.shape) != (batch, 1) or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"padding_mask must be bool of shape {(batch, 1)}, got {padding_mask.dtype} {tuple(padding_mask.shape)}"
        )


def _check_rows(rows: torch.Tensor, query: torch.Tensor, num_rows: int) -> None:
    """The numbers themselves are looked at on a CPU only: a GPU would have to be waited for."""
    if tuple(rows.shape) != query.shape[:1] or rows.dtype != torch.int32 or rows.device != query.device:
        raise ValueError(
            f"rows must be int32 of shape {tuple(query.shape[:1])} on query's device {query.device}, got {rows.dtype} "
            f"{tuple(rows.shape)} on {rows.device}"
        )
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        numbers = [number for number in rows.tolist() if number != -1]
        if len(set(numbers)) < len(numbers) or not all(0 <= number < num_rows for number in numbers):
            raise ValueError(f"rows must be different numbers from 0 to {num_rows - 1}, or -1, got {rows.tolist()}")
