// The passes before and after the main kernel of the backward: what is known of every query row, and results in the
// inputs' type.
#pragma once

#include <cmath>

#include <cuda_runtime.h>

#include "backward.h"
#include "fragments.cuh"

namespace flash_dmattn {

template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
    if constexpr (__is_same(Element, __nv_bfloat16)) {
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed));
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&packed));
    }
}

constexpr int kPassThreads = 256, kLanesOfRow = 16;

// Writes {shift, log_total, delta, row number} of every row of out: shift and log_total are the forward's stats, delta
// is rowsum(dout * out) - dlse. Rows that see nothing may hold anything and become {inf, 0, 0, -1}. 16 lanes a row; the
// grid is rows of an interval head by interval heads.
template <typename Element>
__global__ void __launch_bounds__(kPassThreads) gather_row_facts(const flash_dmattn_backward_params p) {
    const int row = blockIdx.x * (kPassThreads / kLanesOfRow) + threadIdx.x / kLanesOfRow;  // query, head of the group
    const int num_rows = p.seqlen_q * p.group_size, num_heads = p.num_interval_heads * p.group_size;
    const int lane = threadIdx.x % kLanesOfRow;
    const int batch = blockIdx.y / p.num_interval_heads;
    const int query = row / p.group_size;
    const int head = (blockIdx.y - batch * p.num_interval_heads) * p.group_size + row - query * p.group_size;
    float fact = 0.f, sum = 0.f;  // a lane's fact: shift, log_total, dlse, row number
    if (row < num_rows) {
        const int64_t place = (int64_t(batch) * num_heads + head) * p.seqlen_q + query;
        if (lane == 0) fact = __ldg(p.stats + place);
        if (lane == 1) fact = __ldg(p.stats + place + int64_t(p.batch) * num_heads * p.seqlen_q);
        if (lane == 2) fact = __ldg(p.dlse + place);
        if (lane == 3) {
            fact = __int_as_float(p.query_positions == nullptr
                                      ? p.query_start[batch] + query
                                      : p.query_positions[int64_t(batch) * p.seqlen_q + query]);
        }
        const int64_t first = ((int64_t(batch) * p.seqlen_q + query) * num_heads + head) * p.head_dim * 2;
        const uint4* out = reinterpret_cast<const uint4*>(static_cast<const char*>(p.out) + first);
        const uint4* dout = reinterpret_cast<const uint4*>(static_cast<const char*>(p.dout) + first);
        for (int piece = lane; piece < p.head_dim / 8; piece += kLanesOfRow) {
            const uint4 a = __ldg(out + piece), b = __ldg(dout + piece);
            const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = unpack<Element>(left[i]), y = unpack<Element>(right[i]);
                sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
            }
        }
    }
#pragma unroll
    for (int step = kLanesOfRow / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    float facts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) facts[i] = __shfl_sync(~0u, fact, threadIdx.x % 32 / kLanesOfRow * kLanesOfRow + i);
    if (row >= num_rows || lane != 0) return;
    reinterpret_cast<float4*>(p.row_facts)[int64_t(blockIdx.y) * num_rows + row] =
        facts[0] < INFINITY ? make_float4(facts[0], facts[1], sum - facts[2], facts[3])
                            : make_float4(INFINITY, 0.f, 0.f, __int_as_float(-1));
}

// Writes dkey and dvalue from their sums, eight numbers a thread.
template <typename Element>
__global__ void __launch_bounds__(kPassThreads) finish_dkey_dvalue(const flash_dmattn_backward_params p, int64_t size) {
    const int64_t first = (int64_t(blockIdx.x) * kPassThreads + threadIdx.x) * 8;
    if (first >= size) return;
    const float* const sums = blockIdx.y == 0 ? p.dkey_sums : p.dvalue_sums;
    void* const result = blockIdx.y == 0 ? p.dkey : p.dvalue;
    const float factor = blockIdx.y == 0 ? p.softmax_scale : 1.f;
    const float4 low = __ldcs(reinterpret_cast<const float4*>(sums + first));
    const float4 high = __ldcs(reinterpret_cast<const float4*>(sums + first) + 1);
    *reinterpret_cast<uint4*>(static_cast<char*>(result) + first * 2) = make_uint4(
        pack<Element>(low.x * factor, low.y * factor), pack<Element>(low.z * factor, low.w * factor),
        pack<Element>(high.x * factor, high.y * factor), pack<Element>(high.z * factor, high.w * factor));
}

}  // namespace flash_dmattn
