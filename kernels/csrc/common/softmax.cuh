// From products of queries and keys to weights, and from weighted sums to results. Accumulators are those of 16 rows by
// 8 columns a warp, side by side: a thread holds columns i * 8 + lane % 4 * 2 and the next of rows lane / 4 and 8 below.
#pragma once

#include <cmath>
#include <cstdint>

#include "query_tiles.cuh"

namespace flash_dmattn {

constexpr float kLn2 = 0.6931471805599453f;

// Turns products into exponents of 2: scale, softcap, bias.
template <bool kHasSoftcap, int kSize>
__device__ __forceinline__ void add_bias(float (&scores)[kSize], const KernelParams& p, const float* bias, int lane) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(bias + i * 8 + lane % 4 * 2);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float& score = scores[i * 4 + k];
            const float addend = k % 2 == 0 ? pair.x : pair.y;
            if constexpr (kHasSoftcap) {
                const float tanh = __fdividef(2.f, 1.f + exp2_approx(score * p.tanh_factor)) - 1.f;
                score = fmaf(tanh, p.exponent_cap, addend);
            } else {
                score = fmaf(score, p.exponent_factor, addend);
            }
        }
    }
}

// Exponents of keys that a row does not see become -inf.
template <int kSize>
__device__ __forceinline__ void hide_invisible(
    float (&scores)[kSize], const int* birth, const int* death, const int (&rows)[2], int lane) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const int2 births = *reinterpret_cast<const int2*>(birth + i * 8 + lane % 4 * 2);
        const int2 deaths = *reinterpret_cast<const int2*>(death + i * 8 + lane % 4 * 2);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!(births.x <= rows[r] && rows[r] < deaths.x)) scores[i * 4 + r * 2] = -INFINITY;
            if (!(births.y <= rows[r] && rows[r] < deaths.y)) scores[i * 4 + r * 2 + 1] = -INFINITY;
        }
    }
}

// The running softmax of a thread's two rows. Exponents are of 2; `shift` is what they are taken relative to, which
// need not be the highest: it follows when the highest is far enough above it for the weights to grow too large.
struct RunningSoftmax {
    float shift[2] = {-INFINITY, -INFINITY};
    float total[2] = {0.f, 0.f};  // over the thread's own columns
    float rescale[2];

    // Turns exponents into weights. Returns whether what was accumulated before is to be multiplied by `rescale`.
    template <int kSize>
    __device__ __forceinline__ bool weigh(float (&scores)[kSize]) {
        constexpr float kTolerance = 8.f;
        float highest[2][2] = {{scores[0], scores[1]}, {scores[2], scores[3]}};
#pragma unroll
        for (int i = 4; i < kSize; ++i) highest[i >> 1 & 1][i & 1] = fmaxf(highest[i >> 1 & 1][i & 1], scores[i]);
        bool must_follow = false;
        float row_highest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float high = fmaxf(highest[r][0], highest[r][1]);
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            row_highest[r] = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            must_follow |= row_highest[r] > shift[r] + kTolerance;
        }
        must_follow = __any_sync(~0u, must_follow);
        if (must_follow) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float next = fmaxf(shift[r], row_highest[r]);
                rescale[r] = next == -INFINITY ? 1.f : exp2_approx(shift[r] - next);
                total[r] *= rescale[r];
                shift[r] = next;
            }
        }
        const float offset[2] = {shift[0] == -INFINITY ? 0.f : shift[0], shift[1] == -INFINITY ? 0.f : shift[1]};
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const int r = i >> 1 & 1;
            scores[i] = exp2_approx(scores[i] - offset[r]);
            total[r] += scores[i];
        }
        return must_follow;
    }
};

template <int kSize>
__device__ __forceinline__ void rescale_rows(float (&acc)[kSize], const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) acc[i] *= rescale[i >> 1 & 1];
}

// Divides the accumulators by their rows' totals and writes out, stats, and lse if it is asked for.
template <typename Traits>
__device__ __forceinline__ void store_rows(
    const KernelParams& p, const QueryTile& tile, float (&acc)[Traits::kHeadDim / 2], const RunningSoftmax& softmax,
    const int (&rows)[2], int first_row, int lane) {
    const int num_heads = p.num_interval_heads * p.group_size;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const QueryRow query(p, tile, first_row + r * 8 + lane / 4);
        float total = softmax.total[r];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const bool sees_any = rows[r] >= 0 && total != 0.f;
        const float inverse = 1.f / total;
        char* out = static_cast<char*>(p.out) +
                    ((int64_t(tile.batch) * p.seqlen_q + query.query) * num_heads + query.head) * Traits::kHeadDim * 2;
#pragma unroll
        for (int i = 0; i < Traits::kHeadDim / 32; ++i) {
            uint32_t words[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float low = acc[(i * 4 + k) * 4 + r * 2], high = acc[(i * 4 + k) * 4 + r * 2 + 1];
                words[k] = sees_any ? pack<typename Traits::Element>(low * inverse, high * inverse) : 0;
            }
            transpose_in_quad(words, lane);
            if (query.exists) {
                *reinterpret_cast<uint4*>(out + (i * 4 + lane % 4) * 16) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
        if (query.exists && lane % 4 == 0) {
            const int64_t place = (int64_t(tile.batch) * num_heads + query.head) * p.seqlen_q + query.query;
            const float log_total = sees_any ? log2f(total) : 0.f;
            if (p.lse) p.lse[place] = sees_any ? (softmax.shift[r] + log_total) * kLn2 : -INFINITY;
            p.stats[place] = sees_any ? softmax.shift[r] : INFINITY;
            p.stats[place + int64_t(p.batch) * num_heads * p.seqlen_q] = log_total;
        }
    }
}

}  // namespace flash_dmattn
