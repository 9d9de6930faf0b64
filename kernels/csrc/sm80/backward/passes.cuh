// The passes before and after the main kernel of the sm80 backward.
#pragma once

#include <cmath>

#include "../../common/fragments.cuh"
#include "shapes.h"

namespace flash_dmattn::sm80 {

constexpr int kPassThreads = 256, kLanesOfDelta = 16;

// Writes rowsum(dout * out) - dlse of every row, 0 for one that sees nothing, which may hold anything. 16 lanes a row; the
// grid is blocks of rows (query, head) by batch.
template <typename Element>
__global__ void __launch_bounds__(kPassThreads) compute_deltas(const BackwardParams p) {
    const int num_heads = p.num_interval_heads * p.group_size;
    const int64_t row = int64_t(blockIdx.x) * (kPassThreads / kLanesOfDelta) + threadIdx.x / kLanesOfDelta;
    const int lane = threadIdx.x % kLanesOfDelta;
    const int query = int(row / num_heads), head = int(row - int64_t(query) * num_heads);
    float sum = 0.f;
    if (query < p.seqlen_q) {
        const int64_t first = ((int64_t(blockIdx.y) * p.seqlen_q + query) * num_heads + head) * p.head_dim * 2;
        const uint4* out = reinterpret_cast<const uint4*>(static_cast<const char*>(p.out) + first);
        const uint4* dout = reinterpret_cast<const uint4*>(static_cast<const char*>(p.dout) + first);
        for (int piece = lane; piece < p.head_dim / 8; piece += kLanesOfDelta) {
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
    for (int step = kLanesOfDelta / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (query >= p.seqlen_q || lane != 0) return;
    const int64_t place = (int64_t(blockIdx.y) * num_heads + head) * p.seqlen_q + query;
    p.deltas[place] = p.stats[place] < INFINITY ? sum - p.dlse[place] : 0.f;
}

// Writes dquery of some epochs from its sums, which lie tile by tile in blocks of 16 rows by 8 columns: of each first the even columns of
// the first 8 rows, then the odd ones, then those of the other 8 rows. The grid is these epochs' tiles by interval heads.
template <typename Element>
__global__ void __launch_bounds__(kPassThreads) finish_dquery_sums(
    const BackwardParams p, int first_epoch) {
    const int slot = blockIdx.x / p.tiles_per_epoch, tile = blockIdx.x - slot * p.tiles_per_epoch;
    const int epoch = first_epoch + slot;
    const int batch = blockIdx.y / p.num_interval_heads, head = blockIdx.y - batch * p.num_interval_heads;
    const int first_query = epoch * p.epoch_size + tile * p.tile_size;
    const int end = min(first_query + p.tile_size, min((epoch + 1) * p.epoch_size, p.seqlen_q));
    const int columns = p.head_dim / 8;
    const float* sums =
        p.dquery_sums +
        (int64_t(blockIdx.y) * p.epochs_at_once * p.tiles_per_epoch + blockIdx.x) * (kBackwardTileRows * p.head_dim);
    // A warp takes 8 rows by 4 times 8 columns: whole lines of the sums, two sectors of a row of dquery.
    for (int i = threadIdx.x; i < kBackwardTileRows * columns; i += kPassThreads) {
        const int patch = i / 32, patch_row = patch / (columns / 4), lane = i % 32;
        const int row = patch_row * 8 + lane % 8, column = (patch - patch_row * (columns / 4)) * 4 + lane / 8;
        const int query = first_query + row / p.group_size;
        if (query >= end) continue;
        const float* block = sums + (row / 16 * columns + column) * 128 + row % 16 / 8 * 64 + row % 8 * 4;
        const float4 even = __ldcs(reinterpret_cast<const float4*>(block));
        const float4 odd = __ldcs(reinterpret_cast<const float4*>(block + 32));
        const float scale = p.softmax_scale;
        const int64_t place =
            (int64_t(batch) * p.seqlen_q + query) * p.num_interval_heads * p.group_size + head * p.group_size +
            row % p.group_size;
        *reinterpret_cast<uint4*>(static_cast<char*>(p.dquery) + (place * p.head_dim + column * 8) * 2) = make_uint4(
            pack<Element>(even.x * scale, odd.x * scale), pack<Element>(even.y * scale, odd.y * scale),
            pack<Element>(even.z * scale, odd.z * scale), pack<Element>(even.w * scale, odd.w * scale));
    }
}

// Writes dkey and dvalue from their sums, 8 numbers of each a thread.
template <typename Element>
__global__ void __launch_bounds__(kPassThreads) finish_key_sums(const BackwardParams p) {
    const int num_kv_heads = p.num_interval_heads / p.interval_heads_per_kv_head;
    const int64_t pieces = int64_t(p.batch) * p.seqlen_k * num_kv_heads * (p.head_dim / 8);
    const int64_t piece = int64_t(blockIdx.x) * kPassThreads + threadIdx.x;
    if (piece >= pieces) return;
    const float4* key_sums = reinterpret_cast<const float4*>(p.dkey_sums) + piece * 2;
    const float4* value_sums = reinterpret_cast<const float4*>(p.dvalue_sums) + piece * 2;
    const float4 k0 = __ldcs(key_sums), k1 = __ldcs(key_sums + 1), v0 = __ldcs(value_sums), v1 = __ldcs(value_sums + 1);
    const float scale = p.softmax_scale;
    static_cast<uint4*>(p.dkey)[piece] = make_uint4(
        pack<Element>(k0.x * scale, k0.y * scale), pack<Element>(k0.z * scale, k0.w * scale),
        pack<Element>(k1.x * scale, k1.y * scale), pack<Element>(k1.z * scale, k1.w * scale));
    static_cast<uint4*>(p.dvalue)[piece] = make_uint4(
        pack<Element>(v0.x, v0.y), pack<Element>(v0.z, v0.w), pack<Element>(v1.x, v1.y), pack<Element>(v1.z, v1.w));
}

}  // namespace flash_dmattn::sm80
