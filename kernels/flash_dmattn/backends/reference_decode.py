"""The reference of the decoding step: fixed shapes, no look at any value, so it can be captured as it is."""

from dataclasses import replace

import torch

from flash_dmattn.calls import DecodeCall, Slots
from flash_dmattn.float8 import NUMBERS, as_bits, keys_and_values, round_to_float8
from flash_dmattn.ranking import comparable, find_victim, priority


def decode(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes the slots. Returns out (B, 1, H, Dv) and lse (B, H, 1), in float32 or float64, also under autocast."""
    if call.rows is not None:
        return _decode_rows(call)
    slots = call.slots
    now = slots.lengths.unsqueeze(-1).clone()  # (B, Hc, 1), the position of the token
    is_real = torch.ones_like(now, dtype=torch.bool)
    if call.padding_mask is not None:
        is_real = call.padding_mask.to(now.device)[:, :, None].expand(is_real.shape)
    _append(call, now, is_real)
    slots.lengths.add_(is_real.squeeze(-1).int())
    victims = find_victim(
        slots.importance,
        slots.positions,
        slots.lengths[:, 0],
        num_sink_tokens=call.num_sink_tokens,
        local_window_size=call.local_window_size,
    )
    slots.victims.copy_(victims)
    with torch.autocast(call.query.device.type, enabled=False):
        return _attend(call, now, is_real)


def _decode_rows(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over copies of some rows, which then go back to their places.

    Where there is no token, the first that there is stands in: its row goes back once more, the same.
    """
    has_token = call.rows >= 0
    place = torch.arange(len(has_token), device=has_token.device)
    place = torch.where(has_token, place, has_token.int().argmax())
    rows = call.rows[place].clamp(min=0).long()
    own = Slots(*(state[rows] for state in call.slots))
    padding_mask = has_token.unsqueeze(1) if call.padding_mask is None else has_token.unsqueeze(1) & call.padding_mask
    attended = decode(replace(call, slots=own, rows=None, padding_mask=padding_mask))
    for state, new in zip(call.slots, own, strict=True):
        as_bits(state).index_copy_(0, rows, as_bits(new)[place])
    return attended


def _append(call: DecodeCall, now: torch.Tensor, is_real: torch.Tensor) -> None:
    """Puts the token into the victim's slot, unless it would be the worst key itself."""
    slots = call.slots
    repeats = slots.keys.shape[1] // call.key.shape[2]
    key, value = (t.repeat_interleave(repeats, dim=2).transpose(1, 2) for t in (call.key, call.value))
    importance = comparable(call.importance).to(slots.importance.dtype)
    victim = slots.victims.long().unsqueeze(-1)
    old_importance, old_position = slots.importance.gather(2, victim), slots.positions.gather(2, victim)
    windows = call.num_sink_tokens, call.local_window_size
    old_priority = priority(old_importance, old_position, now, *windows)
    takes = is_real & (priority(importance, now, now, *windows) >= old_priority)  # the newer key wins a tie
    slots.importance.scatter_(2, victim, torch.where(takes, importance, old_importance))
    slots.positions.scatter_(2, victim, torch.where(takes, now, old_position))
    for states, scales, new in ((slots.keys, slots.key_scales, key), (slots.values, slots.value_scales, value)):
        if states.dtype == NUMBERS:
            new, new_scales = round_to_float8(new)
            scales.scatter_(2, victim, torch.where(takes, new_scales, scales.gather(2, victim)))
            states, new = as_bits(states), as_bits(new)
        rows = victim.unsqueeze(-1).expand(*victim.shape, states.shape[3])
        states.scatter_(2, rows, torch.where(takes.unsqueeze(-1), new, states.gather(2, rows)))


def _attend(call: DecodeCall, now: torch.Tensor, is_real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slots = call.slots
    batch, _, num_heads, head_dim = call.query.shape
    precision = slots.importance.dtype
    if slots.keys.dtype == NUMBERS:
        keys, values = keys_and_values(slots, precision)
    else:
        keys, values = slots.keys.to(precision), slots.values.to(precision)
    query = call.query.to(precision).view(batch, keys.shape[1], -1, head_dim)  # (B, Hc, G, D)
    logits = (query * call.softmax_scale) @ keys.transpose(-1, -2)
    if call.softcap > 0:
        logits = (logits / call.softcap).tanh() * call.softcap
    bias = slots.importance if call.add_importance_bias else torch.zeros_like(slots.importance)
    hidden = (slots.positions < 0) | ~is_real | (bias == -torch.inf)
    if call.sliding_window is not None:
        hidden = hidden | (now - slots.positions >= call.sliding_window)
    logits = (logits + bias.unsqueeze(2)).masked_fill(hidden.unsqueeze(2), -torch.inf)
    weights = logits.softmax(-1).masked_fill(hidden.unsqueeze(2), 0)  # a row that sees nothing would be NaN
    out = weights @ values
    lse = logits.logsumexp(-1).view(batch, num_heads, 1)
    return out.reshape(batch, 1, num_heads, -1).to(call.query.dtype), lse
