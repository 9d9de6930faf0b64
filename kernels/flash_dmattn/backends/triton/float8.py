"""Keys and values in 8 bits in a kernel: the rounding of `flash_dmattn.float8`, the same to the bit, and products.

GPUs convert float8 to float16 in one instruction for two numbers, and to bfloat16 by way of float32, in several. So
what is multiplied by it is brought into float16, for which a power of 2 is taken out of it.
"""

import triton
import triton.language as tl

FIRST_GPU = (8, 9)
"""The compute capability from which on Triton converts float8_e4m3fn."""


@triton.jit
def into_float16(rows):
    """Returns rows (N, D) in float16 and the powers of 2 (N,) float32 that were taken out of them.

    The largest number of a row is then from 1 to 2 (0 stays 0), and no digit is lost of those above 2^-14 of it.
    """
    rows = rows.to(tl.float32)
    exponent = tl.max(tl.abs(rows), axis=1).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return (rows * inverse[:, None]).to(tl.float16), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def weighted_sum(weights, values, scales, PRECISION: tl.constexpr):
    """Returns weights (G, N) up to 1 times values (N, D) float16 or float32 times scales (N,) bfloat16: (G, D) float32.

    A value counts by its weight times its scale, so what is brought into float16 is their product.
    """
    weights *= scales.to(tl.float32)[None, :]
    if values.dtype == tl.float32:
        total = tl.dot(weights, values, input_precision=PRECISION)
    else:
        weights, unit = into_float16(weights)
        total = tl.dot(weights, values) * unit[:, None]
    return total


@triton.jit
def round_to_float8(row):
    """Returns the numbers of a row (N,) float32 in float32, where a conversion to float8e4nv is exact, and its scale.

    The numbers are rounded here, to even on a tie, because conversions round as each GPU, or the interpreter, does.
    Both are NaN where the row is not finite, which a conversion might turn into 448.
    """
    largest = tl.max(row.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)  # as integers, of which NaN is the largest
    is_finite = largest < 0x7F800000
    exponent = tl.maximum((tl.minimum(largest, 0x7F800000) + 0x1FFFFF) >> 23, 9) - 8
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    size = tl.abs(row) * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # added to this power of 2, a float32 has as many digits left as the number has: 4, fewer below 2^-6
    shift = ((tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 121) + 20) << 23).to(tl.float32, bitcast=True)
    size = (size + shift) - shift
    sign = row.to(tl.int32, bitcast=True) & -0x80000000  # by its bit: Triton's -x is 0 - x, which makes no -0
    numbers = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(is_finite, numbers, float("nan")), tl.where(is_finite, scale, float("nan"))
