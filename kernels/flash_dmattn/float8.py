"""Keys and values in 8 bits: float8_e4m3fn numbers with one power of 2 per key, and one per value.

A number has 4 binary digits. A power of 2 takes none of them and multiplies exactly, so what was rounded once rounds to
itself: slots may be read, moved and written again without a second loss.
"""

import torch

from flash_dmattn.calls import Slots

NUMBERS = torch.float8_e4m3fn
SCALES = torch.bfloat16
"""Holds every power of 2 that a float32 holds."""

_NAME = "float8_e4m3fn"
# The largest number is 448 = 1.75 * 2^8. In a float32's bits, adding this to the mantissa carries if it is above 1.75.
_BEYOND_LARGEST = 0x1FFFFF


def check_slot_dtype(slot_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns what keys and values are stored in, None for their own dtype; also takes its name.

    Raises ValueError for anything but None and float8_e4m3fn.
    """
    if slot_dtype is None or slot_dtype == NUMBERS:
        return slot_dtype
    if slot_dtype == _NAME:
        return NUMBERS
    raise ValueError(f"slot_dtype must be None or torch.{_NAME}, got {slot_dtype!r}")


def round_to_float8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns numbers (..., D) float8_e4m3fn and scales (...) bfloat16, whose product is next to states (..., D).

    A scale is the smallest power of 2 by which no number is above 448, and at least 2^-126. An element x changes by at
    most 2^-4 |x|, or by 2^-17 of the largest |x| of its row, or 2^-136, where that is more.
    A row with an element that is not finite in float32 has no such scale. All of it is NaN, its scale included.
    """
    largest = states.abs().amax(-1).float()
    exponent = ((largest.view(torch.int32) + _BEYOND_LARGEST) >> 23).clamp(min=9) - 8
    scales = (exponent << 23).view(torch.float32).masked_fill(~largest.isfinite(), torch.nan)
    return (states / scales.unsqueeze(-1)).to(NUMBERS), scales.to(SCALES)


def from_float8(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns numbers (..., D) times scales (...) in `dtype`, exactly, but for what is beyond its largest number."""
    precision = torch.float32 if dtype == torch.float16 else dtype  # float16 holds no large scale
    largest = torch.finfo(dtype).max
    return numbers.to(precision).mul_(scales.unsqueeze(-1)).clamp_(-largest, largest).to(dtype)


def keys_and_values(
    slots: Slots, dtype: torch.dtype, num_slots: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys (B, Hc, n, D) and values (B, Hc, n, Dv) of the first n = `num_slots` slots, or all, in `dtype`.

    They are views of the slots where those are stored so.
    """
    keys, values = slots.keys[:, :, :num_slots], slots.values[:, :, :num_slots]
    if slots.keys.dtype != NUMBERS:
        return keys.to(dtype), values.to(dtype)
    scales = slots.key_scales[:, :, :num_slots], slots.value_scales[:, :, :num_slots]
    return from_float8(keys, scales[0], dtype), from_float8(values, scales[1], dtype)


def as_bits(states: torch.Tensor) -> torch.Tensor:
    """Returns the same memory in a dtype that torch can index, gather and scatter: it cannot all float8."""
    return states.view(torch.uint8) if states.dtype == NUMBERS else states
