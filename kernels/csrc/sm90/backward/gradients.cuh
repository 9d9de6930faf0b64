// What both kinds of consumers of the sm90 backward do with transposed products, keys by queries, in registers.
#pragma once

#include <cmath>

#include "../wgmma.cuh"
#include "schedule.cuh"

namespace flash_dmattn::sm90 {

// The two keys of a tile whose rows of the products a thread holds.
struct ThreadKeys {
    int key[2];  // -1 for none
    float bias[2];

    __device__ ThreadKeys(const BackwardKernelParams& p, const WorkItem& item, int first_row) {
#pragma unroll
        for (int r = 0; r < 2; ++r) key[r] = item.key(p, first_row + r * 8, bias[r]);
    }

    // The rows from which on and until which a key is visible; read again for every tile to save registers.
    __device__ __forceinline__ int2 interval(const BackwardKernelParams& p, int list_head, int r) const {
        if (key[r] < 0 || p.birth == nullptr) return make_int2(key[r], INT32_MAX);
        const int64_t place = int64_t(list_head) * p.seqlen_k + key[r];
        return make_int2(__ldg(p.birth + place), __ldg(p.death + place));
    }
};

// acc = a b^T, both with rows of kRowBytes-wide pieces along the depth; `pieces`: bytes from piece to piece.
template <typename Traits, int kN>
__device__ __forceinline__ void start_products(
    float (&acc)[kN / 2], uint32_t a, int a_pieces, uint32_t b, int b_pieces) {
    using Product = Wgmma<kN, typename Traits::Element>;
#pragma unroll
    for (int depth = 0; depth < Traits::kHeadDim / 16; ++depth) {
        const int piece = depth / Traits::kDepthsPerPiece;
        const int offset = depth % Traits::kDepthsPerPiece * 32;
        const uint64_t a_matrix = matrix_descriptor<Traits::kRowBytes>(a + piece * a_pieces + offset, 16);
        const uint64_t b_matrix = matrix_descriptor<Traits::kRowBytes>(b + piece * b_pieces + offset, 16);
        if (depth == 0) {
            Product::template score<false>(acc, a_matrix, b_matrix);
        } else {
            Product::template score<true>(acc, a_matrix, b_matrix);
        }
    }
    wgmma_commit();
}

// acc = dscores keys, of kN columns and kKeys keys: of dscores^T in shared memory, a row of 64 queries per key, and of
// rows of K.
template <typename Traits, int kN, int kKeys>
__device__ __forceinline__ void start_dquery(float (&acc)[kN / 2], uint32_t dscores, uint32_t key) {
    using Product = Wgmma<kN, typename Traits::Element>;
#pragma unroll
    for (int depth = 0; depth < kKeys / 16; ++depth) {
        const uint64_t a = matrix_descriptor<128>(dscores + depth * 16 * 128, 16);
        const uint64_t b = matrix_descriptor<Traits::kRowBytes>(
            key + depth * 16 * Traits::kRowBytes, Traits::kBlockN * Traits::kRowBytes);
        if (depth == 0) {
            Product::template multiply<false, true, true>(acc, a, b);
        } else {
            Product::template multiply<true, true, true>(acc, a, b);
        }
    }
    wgmma_commit();
}

// Turns products of keys and queries into weights; `facts` are those of the thread's first query.
template <int kSize>
__device__ __forceinline__ void weigh_products(
    float (&scores)[kSize], const BackwardKernelParams& p, const ThreadKeys& keys, const WorkItem& item,
    const float* facts) {
    constexpr int kRows = kBackwardTileRows;
#pragma unroll
    for (int i = 0; i < kSize; ++i) scores[i] = fmaf(scores[i], p.exponent_factor, keys.bias[i >> 1 & 1]);
    if (item.is_partial) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int2 interval = keys.interval(p, item.list_head, r);
#pragma unroll
            for (int i = 0; i < kSize / 4; ++i) {
                const int2 rows = *reinterpret_cast<const int2*>(facts + 3 * kRows + i * 8);
                if (!(interval.x <= rows.x && rows.x < interval.y)) scores[i * 4 + r * 2] = -INFINITY;
                if (!(interval.x <= rows.y && rows.y < interval.y)) scores[i * 4 + r * 2 + 1] = -INFINITY;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        // Apart from each other: beside a huge bias their sum has no room for the log of the total.
        const float2 shift = *reinterpret_cast<const float2*>(facts + i * 8);
        const float2 log_total = *reinterpret_cast<const float2*>(facts + kRows + i * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float& score = scores[i * 4 + k];
            score = exp2_approx(score - (k % 2 ? shift.y : shift.x) - (k % 2 ? log_total.y : log_total.x));
        }
    }
}

// Turns the gradients of the weights into those of the products, over the scale, and adds those of the keys' biases.
template <int kSize>
__device__ __forceinline__ void differentiate(
    float (&dweights)[kSize], float (&dbias)[2], const float (&weights)[kSize], const float* facts) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const float2 delta = *reinterpret_cast<const float2*>(facts + 2 * kBackwardTileRows + i * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float& dscore = dweights[i * 4 + k];
            dscore = weights[i * 4 + k] * (dscore - (k % 2 ? delta.y : delta.x));
            dbias[k / 2] += dscore;
        }
    }
}

// Both at once, with softcap: so the slopes of tanh need no registers between the two.
template <int kSize>
__device__ __forceinline__ void weigh_and_differentiate_capped(
    float (&scores)[kSize], float (&dweights)[kSize], float (&dbias)[2], const BackwardKernelParams& p,
    const ThreadKeys& keys, const WorkItem& item, const float* facts) {
    constexpr int kRows = kBackwardTileRows;
    int2 intervals[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        intervals[r] = item.is_partial ? keys.interval(p, item.list_head, r) : make_int2(INT32_MIN, INT32_MAX);
    }
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const float2 shift = *reinterpret_cast<const float2*>(facts + i * 8);
        const float2 log_total = *reinterpret_cast<const float2*>(facts + kRows + i * 8);
        const float2 delta = *reinterpret_cast<const float2*>(facts + 2 * kRows + i * 8);
        const int2 rows = *reinterpret_cast<const int2*>(facts + 3 * kRows + i * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float &score = scores[i * 4 + k], &dscore = dweights[i * 4 + k];
            const int2 interval = intervals[k / 2];
            const int row = k % 2 ? rows.y : rows.x;
            const float tanh = __fdividef(2.f, 1.f + exp2_approx(score * p.tanh_factor)) - 1.f;
            const float capped = fmaf(tanh, p.exponent_cap, keys.bias[k / 2]);
            const bool is_visible = interval.x <= row && row < interval.y;
            const float exponent = capped - (k % 2 ? shift.y : shift.x) - (k % 2 ? log_total.y : log_total.x);
            score = exp2_approx(is_visible ? exponent : -INFINITY);
            dscore = score * (dscore - (k % 2 ? delta.y : delta.x));
            dbias[k / 2] += dscore;
            dscore *= fmaf(-tanh, tanh, 1.f);
        }
    }
}

// Writes 16-bit values, a thread's rows of keys and 8 kPieces columns of queries, to a swizzled matrix of 64 queries.
template <int kPieces>
__device__ __forceinline__ void store_transposed(
    uint32_t target, const uint32_t (&values)[kPieces * 2], int first_row, int first_piece, int lane) {
    const uint32_t row = target + (first_row + lane % 16) * 128;
#pragma unroll
    for (int i = 0; i < kPieces; i += 2) {
        store_matrices(row + ((first_piece + i + lane / 16) ^ (lane & 7)) * 16, values + i * 2);
    }
}

}  // namespace flash_dmattn::sm90
