// The consumer warpgroups of the sm_90a forward: each attends 64 query rows to the keys in shared memory.
#pragma once

#include <cmath>

#include "../wgmma.cuh"
#include "schedule.cuh"

namespace flash_dmattn {

constexpr float kLn2 = 0.6931471805599453f;

// One row of a tile: the query and its head, if there are such.
struct QueryRow {
    bool exists;
    int query;
    int head;  // among all query heads

    __device__ QueryRow(const KernelParams& p, const QueryTile& tile, int row_of_tile) {
        const int token = p.by_group.divide(row_of_tile);
        exists = token < tile.num_tokens;
        query = tile.first_query + token;
        head = tile.head * p.group_size + row_of_tile - token * p.group_size;
    }

    __device__ int row(const KernelParams& p, int batch) const {
        if (!exists) return -1;
        return p.query_positions == nullptr ? p.query_start[batch] + query
                                            : p.query_positions[int64_t(batch) * p.seqlen_q + query];
    }
};

// Starts to copy the query rows of the warp (16 of its warpgroup's 64) to shared memory.
template <typename Traits>
__device__ __forceinline__ void copy_query(
    uint32_t target, const KernelParams& p, const QueryTile& tile, int first_row, int lane) {
    const int piece = lane % Traits::kLanesPerRow;
    const char* base = static_cast<const char*>(p.query) + int64_t(tile.batch) * p.query_strides[0] * 2 + piece * 16;
#pragma unroll
    for (int first = 0; first < 16; first += Traits::kRowsPerCopy) {
        const int row = first_row + first + lane / Traits::kLanesPerRow;
        const QueryRow query(p, tile, row);
        const int64_t offset = query.exists ? query.query * p.query_strides[1] + query.head * p.query_strides[2] : 0;
        const uint32_t place = target + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
        for (int i = 0; i < Traits::kPieces; ++i) {
            copy_async(
                place + i * Traits::kBlockM * Traits::kRowBytes, base + offset * 2 + i * Traits::kRowBytes,
                query.exists ? 16 : 0);
        }
    }
}

// scores = query key^T; 64 rows x kKeys.
template <typename Traits, int kKeys>
__device__ __forceinline__ void start_scores(float (&scores)[kKeys / 2], uint32_t query, uint32_t key) {
    using Product = Wgmma<kKeys, typename Traits::Element>;
#pragma unroll
    for (int depth = 0; depth < Traits::kHeadDim / 16; ++depth) {
        const int piece = depth / Traits::kDepthsPerPiece;
        const int offset = depth % Traits::kDepthsPerPiece * 32;
        const uint64_t a =
            matrix_descriptor<Traits::kRowBytes>(query + piece * Traits::kBlockM * Traits::kRowBytes + offset, 16);
        const uint64_t b =
            matrix_descriptor<Traits::kRowBytes>(key + piece * Traits::kBlockN * Traits::kRowBytes + offset, 16);
        if (depth == 0) {
            Product::template score<false>(scores, a, b);
        } else {
            Product::template score<true>(scores, a, b);
        }
    }
    wgmma_commit();
}

// acc += weights value; 64 rows x kHeadDim.
template <typename Traits, int kKeys>
__device__ __forceinline__ void start_weighing(
    float (&acc)[Traits::kHeadDim / 2], const uint32_t (&weights)[kKeys / 4], uint32_t value) {
#pragma unroll
    for (int depth = 0; depth < kKeys / 16; ++depth) {
        Wgmma<Traits::kHeadDim, typename Traits::Element>::weigh(
            acc, weights + depth * 4,
            matrix_descriptor<Traits::kRowBytes>(
                value + depth * 16 * Traits::kRowBytes, Traits::kBlockN * Traits::kRowBytes));
    }
    wgmma_commit();
}

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

// Divides the accumulators by their rows' totals and writes out, lse and stats.
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
            p.lse[place] = sees_any ? (softmax.shift[r] + log_total) * kLn2 : -INFINITY;
            p.stats[place] = sees_any ? softmax.shift[r] : INFINITY;
            p.stats[place + int64_t(p.batch) * num_heads * p.seqlen_q] = log_total;
        }
    }
}

template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void consume(const KernelParams& p, char* smem, int warpgroup) {
    using Element = typename Traits::Element;
    constexpr int kBlockN = Traits::kBlockN, kNarrow = Traits::kNarrow;
    const SharedMemory<Traits> shared{shared_address(smem)};
    const int warp = threadIdx.x / 32 % 4;
    const int lane = keep(threadIdx.x % 32) & 31;
    const int first_row = warpgroup * 64 + warp * 16;  // of the warp
    const uint32_t query = shared.base + warpgroup * 64 * Traits::kRowBytes;
    // Named barriers: one for the turns of each warpgroup, one for each to meet on its own.
    const int my_turn = keep_of_warp(1 + warpgroup), next_turn = keep_of_warp(1 + (warpgroup + 1) % Traits::kConsumers);
    const int meeting = 1 + Traits::kConsumers + warpgroup;

    float acc[Traits::kHeadDim / 2];
    float scores[kBlockN / 2];
    uint32_t weights[kBlockN / 4];
    Ring<Traits::kStages> key_ring, value_ring;

    const auto wait_for_key = [&] {
        barrier_wait(shared.key_full(key_ring.stage), key_ring.phase);
        fence_shared_for_tensor_cores();
    };
    const auto wait_for_value = [&] {
        barrier_wait(shared.value_full(value_ring.stage), value_ring.phase);
        fence_shared_for_tensor_cores();
    };
    const auto finish_key = [&](auto& scores, const int(&rows)[2]) {
        const int first = key_ring.stage * kBlockN;
        add_bias<kHasSoftcap>(scores, p, reinterpret_cast<float*>(smem + Traits::kBiasOffset) + first, lane);
        const int4 partial = *reinterpret_cast<int4*>(smem + Traits::kPartialOffset + key_ring.stage * 16);
        if (partial.x | partial.y | partial.z | partial.w) {
            hide_invisible(
                scores, reinterpret_cast<int*>(smem + Traits::kBirthOffset) + first,
                reinterpret_cast<int*>(smem + Traits::kDeathOffset) + first, rows, lane);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.key_empty(key_ring.stage));
        key_ring.advance();
    };
    const auto release_value = [&] {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.value_empty(value_ring.stage));
        value_ring.advance();
    };

    BlockSchedule schedule;
    int number = schedule.next(p);
    if (number < 0) return;
    KeyCut<Traits> next_cut(QueryTile(p, number).stretch(p));
    copy_query<Traits>(shared.base, p, QueryTile(p, number), first_row, lane);
    if (warpgroup == Traits::kConsumers - 1) named_arrive(next_turn, 2 * kWarpgroup);

    while (true) {
        int rows[2];
        {
            const QueryTile tile(p, number);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                rows[r] = QueryRow(p, tile, compute_here(first_row) + r * 8 + lane / 4).row(p, tile.batch);
            }
        }
        const KeyCut<Traits> cut = next_cut;
        RunningSoftmax softmax;
#pragma unroll
        for (int i = 0; i < Traits::kHeadDim / 2; ++i) acc[i] = 0.f;
        copy_async_wait_all();
        fence_shared_for_tensor_cores();
        named_sync(meeting, kWarpgroup);

        if (cut.narrow > 0) {
            float narrow_scores[kNarrow / 2];
            uint32_t narrow_weights[kNarrow / 4];
            wait_for_key();
            wgmma_fence();
            start_scores<Traits, kNarrow>(narrow_scores, query, shared.key(key_ring.stage));
            wgmma_wait<0>();
            pin(narrow_scores);
            finish_key(narrow_scores, rows);
            softmax.weigh(narrow_scores);
            pack_weights<Element>(narrow_weights, narrow_scores);
            wait_for_value();
            wgmma_fence();
            start_weighing<Traits, kNarrow>(acc, narrow_weights, shared.value(value_ring.stage));
            wgmma_wait<0>();
            pin(acc);
            release_value();
        }
        wait_for_key();
        wgmma_fence();
        start_scores<Traits, kBlockN>(scores, query, shared.key(key_ring.stage));
        wgmma_wait<0>();
        pin(scores);
        finish_key(scores, rows);
        if (softmax.weigh(scores)) rescale_rows(acc, softmax.rescale);
        pack_weights<Element>(weights, scores);

        for (int n = 1; n < cut.num_tiles; ++n) {
            wait_for_key();
            named_sync(my_turn, 2 * kWarpgroup);
            wgmma_fence();
            start_scores<Traits, kBlockN>(scores, query, shared.key(key_ring.stage));
            wait_for_value();
            wgmma_fence();
            start_weighing<Traits, kBlockN>(acc, weights, shared.value(value_ring.stage));
            named_arrive(next_turn, 2 * kWarpgroup);
            wgmma_wait<1>();
            pin(scores);
            finish_key(scores, rows);
            const bool must_rescale = softmax.weigh(scores);
            finish_before_wait(softmax.total[0] + softmax.total[1], shared.base);
            wgmma_wait<0>();
            pin(acc);
            release_value();
            if (must_rescale) rescale_rows(acc, softmax.rescale);
            pack_weights<Element>(weights, scores);
        }

        wait_for_value();
        wgmma_fence();
        start_weighing<Traits, kBlockN>(acc, weights, shared.value(value_ring.stage));
        const QueryTile tile(p, number);
        number = schedule.next(p);
        named_sync(meeting, kWarpgroup);  // no warp reads its queries any more
        if (number >= 0) {
            const QueryTile next(p, number);
            next_cut = KeyCut<Traits>(next.stretch(p));
            copy_query<Traits>(shared.base, p, next, compute_here(first_row), lane);
        }
        wgmma_wait<0>();
        pin(acc);
        release_value();
        store_rows<Traits>(p, tile, acc, softmax, rows, compute_here(first_row), lane);
        if (number < 0) break;
    }
}

}  // namespace flash_dmattn
