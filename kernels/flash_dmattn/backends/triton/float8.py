"""The rounding of `flash_dmattn.float8` in a kernel, the same to the bit."""

import triton
import triton.language as tl

FIRST_GPU = (8, 9)
"""The compute capability from which on Triton converts float8_e4m3fn."""


@triton.jit
def round_to_float8(row):
    """Returns the numbers of a row (N,) float32 in float32, where a conversion to float8e4nv is exact, and its scale.

    The numbers are rounded here, to even on a tie, because conversions round as each GPU, or the interpreter, does.
    """
    largest = tl.max(tl.abs(row), axis=0).to(tl.int32, bitcast=True)
    exponent = tl.maximum((largest + 0x1FFFFF) >> 23, 9) - 8
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    size = tl.abs(row) * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # added to this power of 2, a float32 has as many digits left as the number has: 4, fewer below 2^-6
    shift = ((tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 121) + 20) << 23).to(tl.float32, bitcast=True)
    size = (size + shift) - shift
    return tl.where(row < 0, -size, size), scale
