// Accumulators of a matrix product: exponentials, how a warp's values become 16-bit operands, and rows to store.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flash_dmattn {

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (sizeof(Element) == 2 && __is_same(Element, __nv_bfloat16)) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    }
    return packed;
}

template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
    if constexpr (__is_same(Element, __nv_bfloat16)) {
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed));
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&packed));
    }
}

// Lays the accumulators' 16-bit values out as the left operand of the next product.
template <typename Element, int kSize>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[kSize / 2], const float (&weights)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) packed[i] = pack<Element>(weights[2 * i], weights[2 * i + 1]);
}

// Transposes the 4 x 4 matrix of which each lane of a quad holds one row.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool is_high = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const uint32_t sent = is_high ? words[i] : words[i | bit];
            const uint32_t received = __shfl_xor_sync(~0u, sent, bit);
            (is_high ? words[i] : words[i | bit]) = received;
        }
    }
}

}  // namespace flash_dmattn
