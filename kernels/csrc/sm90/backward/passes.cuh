// The passes before and after the main kernel of the sm90 backward: what is known of every query row, and results in the
// inputs' type.
#pragma once

#include <cmath>

#include "../../common/fragments.cuh"
#include "shapes.h"

namespace flash_dmattn::sm90 {

constexpr int kPassThreads = 256, kRowsOfPass = kPassThreads / 16 * 4;

// Writes {shift, log_total, delta, row number} of every row of out: shift and log_total are the forward's stats, delta
// is rowsum(dout * out) - dlse. Rows that see nothing may hold anything and become {inf, 0, 0, -1}. 16 lanes four rows,
// of which each holds one of the 16 facts; the grid is rows of an interval head by interval heads.
template <typename Element>
__global__ void __launch_bounds__(kPassThreads) gather_row_facts(const BackwardParams p) {
    constexpr int kLanes = 16, kRows = 4;
    const int num_rows = p.seqlen_q * p.group_size, num_heads = p.num_interval_heads * p.group_size;
    const int first_row = (blockIdx.x * (kPassThreads / kLanes) + threadIdx.x / kLanes) * kRows;
    const int lane = threadIdx.x % kLanes, first_lane = threadIdx.x % 32 / kLanes * kLanes;
    const int batch = blockIdx.y / p.num_interval_heads;
    const int first_head = (blockIdx.y - batch * p.num_interval_heads) * p.group_size;

    // Rows are (query, head of the group).
    const auto place = [&](int row, bool by_head) {
        const int query = row / p.group_size, head = first_head + row - query * p.group_size;
        return by_head ? (int64_t(batch) * num_heads + head) * p.seqlen_q + query
                       : (int64_t(batch) * p.seqlen_q + query) * num_heads + head;
    };
    float fact = 0.f;  // of row lane / 4: shift, log_total, dlse or row number
    const int row = first_row + lane / 4, kind = lane % 4;
    if (row < num_rows) {
        if (kind == 0) fact = __ldg(p.stats + place(row, true));
        if (kind == 1) fact = __ldg(p.stats + place(row, true) + int64_t(p.batch) * num_heads * p.seqlen_q);
        if (kind == 2) fact = __ldg(p.dlse + place(row, true));
        if (kind == 3) {
            const int query = row / p.group_size;
            fact = __int_as_float(p.query_positions == nullptr
                                      ? p.query_start[batch] + query
                                      : p.query_positions[int64_t(batch) * p.seqlen_q + query]);
        }
    }
    float sums[kRows] = {};
    for (int piece = lane; piece < p.head_dim / 8; piece += kLanes) {
        uint4 left[kRows], right[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t offset = place(min(first_row + r, num_rows - 1), false) * p.head_dim * 2 + piece * 16;
            left[r] = __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(p.out) + offset));
            right[r] = __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(p.dout) + offset));
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint32_t a[4] = {left[r].x, left[r].y, left[r].z, left[r].w};
            const uint32_t b[4] = {right[r].x, right[r].y, right[r].z, right[r].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 x = unpack<Element>(a[i]), y = unpack<Element>(b[i]);
                sums[r] = fmaf(x.x, y.x, fmaf(x.y, y.y, sums[r]));
            }
        }
    }
    float sum = 0.f;  // of row lane / 4
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) sums[r] += __shfl_xor_sync(~0u, sums[r], step);
        if (lane / 4 == r) sum = sums[r];
    }
    const float shift = __shfl_sync(~0u, fact, first_lane + lane / 4 * 4);
    if (row >= num_rows) return;
    if (kind == 2) fact = sum - fact;
    if (!(shift < INFINITY)) fact = kind == 0 ? INFINITY : kind == 3 ? __int_as_float(-1) : 0.f;
    p.row_facts[(int64_t(blockIdx.y) * num_rows + row) * 4 + kind] = fact;
}

// Writes dkey and dvalue from their sums, eight numbers a thread.
template <typename Element>
__global__ void __launch_bounds__(kPassThreads) finish_dkey_dvalue(const BackwardParams p, int64_t size) {
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

}  // namespace flash_dmattn::sm90
