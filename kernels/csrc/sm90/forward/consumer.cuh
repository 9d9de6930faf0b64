// The consumer warpgroups of the sm90 forward: each attends 64 query rows to the keys in shared memory.
#pragma once

#include "../wgmma.cuh"
#include "guessing_softmax.cuh"
#include "schedule.cuh"

namespace flash_dmattn::sm90 {

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

template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void consume(const Sm90Params& p, char* smem, int warpgroup) {
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
        barrier_arrive(shared.key_empty(key_ring.stage));
        key_ring.advance();
    };
    const auto release_value = [&] {
        barrier_arrive(shared.value_empty(value_ring.stage));
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
        GuessingSoftmax softmax(rows);
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
            softmax.follow(narrow_scores);
            softmax.weigh<Element>(narrow_weights, narrow_scores);
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
        if (cut.narrow == 0) softmax.follow(scores);
        if (softmax.weigh<Element>(weights, scores)) rescale_rows(acc, softmax.rescale);

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
            wgmma_wait<0>();  // long done
            pin(acc);
            release_value();
            if (softmax.weigh<Element>(weights, scores)) rescale_rows(acc, softmax.rescale);
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

}  // namespace flash_dmattn::sm90
