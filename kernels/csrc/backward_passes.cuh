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

constexpr int kPassThreads = 256;

// Writes {shift, log_total, delta, row number} of every row of out: shift and log_total are the forward's stats, delta
// is rowsum(dout * out) - dlse. Rows that see nothing may hold anything and become {inf, 0, 0, -1}. 16 lanes a row. Also
// makes the main kernel begin with the first work item.
template <typename Element>
__global__ void __launch_bounds__(kPassThreads) gather_row_facts(const flash_dmattn_backward_params p) {
    constexpr int kLanes = 16;
    const int num_heads = p.num_interval_heads * p.group_size;
    const int64_t num_rows = int64_t(p.batch) * p.seqlen_q * num_heads;
    const int64_t row = int64_t(blockIdx.x) * (kPassThreads / kLanes) + threadIdx.x / kLanes;
    const int lane = threadIdx.x % kLanes;
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.next_item = 0;
    float sum = 0.f;
    if (row < num_rows) {
        const uint4* out = reinterpret_cast<const uint4*>(static_cast<const char*>(p.out) + row * p.head_dim * 2);
        const uint4* dout = reinterpret_cast<const uint4*>(static_cast<const char*>(p.dout) + row * p.head_dim * 2);
        for (int piece = lane; piece < p.head_dim / 8; piece += kLanes) {
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
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (row >= num_rows || lane != 0) return;
    const int64_t token = row / num_heads;
    const int head = int(row - token * num_heads);
    const int batch = int(token / p.seqlen_q), query = int(token - int64_t(batch) * p.seqlen_q);
    const int interval_head = head / p.group_size;
    const int64_t place = (int64_t(batch) * num_heads + head) * p.seqlen_q + query;
    const float shift = p.stats[place];
    float4 facts = make_float4(INFINITY, 0.f, 0.f, __int_as_float(-1));
    if (shift < INFINITY) {
        facts.x = shift;
        facts.y = p.stats[place + int64_t(p.batch) * num_heads * p.seqlen_q];
        facts.z = sum - p.dlse[place];
        facts.w = __int_as_float(
            p.query_positions == nullptr ? p.query_start[batch] + query : p.query_positions[token]);
    }
    const int64_t list_head = int64_t(batch) * p.num_interval_heads + interval_head;
    const int64_t target = (list_head * p.seqlen_q + query) * p.group_size + head % p.group_size;
    reinterpret_cast<float4*>(p.row_facts)[target] = facts;
}

// Writes dquery from its sums, which lie tile by tile in the order of accumulators: the float4 of thread t and columns
// 8 i on stands for rows t / 32 * 16 + t % 32 / 4 and that + 8, columns 8 i + t % 4 * 2 and the next. A block per tile.
template <typename Element>
__global__ void __launch_bounds__(128) finish_dquery(const flash_dmattn_backward_params p) {
    constexpr int kRows = 64;
    const int64_t tile = blockIdx.x;
    const int64_t list = tile / p.tiles_per_epoch;
    const int list_head = int(list / p.num_epochs), epoch = int(list - int64_t(list_head) * p.num_epochs);
    const int batch = list_head / p.num_interval_heads, head = list_head - batch * p.num_interval_heads;
    const int tile_of_epoch = int(tile - list * p.tiles_per_epoch);
    const int first_query = epoch * p.epoch_size + tile_of_epoch * p.tile_size;
    const int end = min(first_query + p.tile_size, min((epoch + 1) * p.epoch_size, p.seqlen_q));
    const int lane = threadIdx.x % 32;
    const float4* sums = reinterpret_cast<const float4*>(p.dquery_sums) + tile * (kRows / 4 * p.head_dim) + threadIdx.x;
    const int num_heads = p.num_interval_heads * p.group_size;
    char* targets[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = threadIdx.x / 32 * 16 + r * 8 + lane / 4;
        const int query = first_query + row / p.group_size;
        const int64_t place =
            (int64_t(batch) * p.seqlen_q + query) * num_heads + head * p.group_size + row % p.group_size;
        targets[r] = query < end ? static_cast<char*>(p.dquery) + place * p.head_dim * 2 + lane % 4 * 16 : nullptr;
    }
    for (int i = 0; i < p.head_dim / 32; ++i) {
        uint32_t words[2][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float4 sum = __ldcs(sums + (i * 4 + k) * 128);
            words[0][k] = pack<Element>(sum.x * p.softmax_scale, sum.y * p.softmax_scale);
            words[1][k] = pack<Element>(sum.z * p.softmax_scale, sum.w * p.softmax_scale);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            transpose_in_quad(words[r], lane);
            if (targets[r] != nullptr) {
                *reinterpret_cast<uint4*>(targets[r] + i * 64) =
                    make_uint4(words[r][0], words[r][1], words[r][2], words[r][3]);
            }
        }
    }
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
