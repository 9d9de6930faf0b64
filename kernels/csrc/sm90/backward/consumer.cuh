// The consumers of the sm90 backward up to head dim 128: each warpgroup owns 64 keys of the tile.
//
// dscores of both meet in shared memory for dquery, which the warpgroups compute in turns, a query tile each: while one
// does, the other goes on to the next query tile. Of a narrow item, 64 keys or less, both own all keys, and each
// computes everything for the query tiles of its turns.
#pragma once

#include "finish.cuh"

namespace flash_dmattn::sm90 {

// acc += a b, of a in registers, 64 keys by queries, and of a tile of rows of query or dout.
template <typename Traits>
__device__ __forceinline__ void start_sum(
    float (&acc)[Traits::kHeadDim / 2], const uint32_t (&a)[Traits::kBlockM / 4], uint32_t b) {
#pragma unroll
    for (int depth = 0; depth < Traits::kBlockM / 16; ++depth) {
        Wgmma<Traits::kHeadDim, typename Traits::Element>::weigh(
            acc, a + depth * 4,
            matrix_descriptor<Traits::kRowBytes>(
                b + depth * 16 * Traits::kRowBytes, Traits::kBlockM * Traits::kRowBytes));
    }
    wgmma_commit();
}

template <typename Traits>
__device__ __forceinline__ void consume_rows(const BackwardKernelParams& p, char* smem, int warpgroup) {
    using Element = typename Traits::Element;
    constexpr bool kHasSoftcap = Traits::kHasSoftcap, kIsDeterministic = Traits::kIsDeterministic;
    constexpr int kHeadDim = Traits::kHeadDim, kBlockM = Traits::kBlockM;
    constexpr int kKeyPieces = Traits::kBlockN * Traits::kRowBytes, kQueryPieces = kBlockM * Traits::kRowBytes;
    const BackwardMemory<Traits> shared{shared_address(smem)};
    const int warp = threadIdx.x / 32 % 4;
    const int lane = keep(threadIdx.x % 32) & 31;
    const int thread = threadIdx.x % kWarpgroup;
    warpgroup = keep_of_warp(warpgroup);
    // Named barriers: 1 and 2, dscores are complete; 3 and 4, they may be written again; 5 and 6, a warpgroup alone.
    constexpr int kComplete = 1, kFree = 3, kMeeting = 5;

    float dkey[kHeadDim / 2], dvalue[kHeadDim / 2], dbias[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dkey[i] = dvalue[i] = 0.f;
    const WorkItem& item = *reinterpret_cast<const WorkItem*>(smem + Traits::kItemOffset);
    Ring<Traits::kStages> ring;
    int half = 0, sums_phase = 1;
    named_arrive(kFree + warpgroup, 2 * kWarpgroup);

    for (int phase = 0;; phase ^= 1) {
        barrier_wait(shared.item_full(), phase);
        if (item.position < 0) break;
        fence_global_for_reductions();
        // In a fixed order keys are summed up by one warpgroup.
        const bool is_narrow = !kIsDeterministic && keep_of_warp(item.num_keys) <= 64;
        const int first_key = is_narrow ? 0 : warpgroup * 64;
        const ThreadKeys keys(p, item, first_key + warp * 16 + lane / 4);
        int tile = keep_of_warp(item.first_tile);
        const int end = tile + keep_of_warp(item.num_tiles);
        const auto advance = [&] {
            ring.advance();
            half ^= 1;
            ++tile;
        };
        // Of a narrow item: what a warpgroup has to do for a query tile of the other.
        const auto pass_turn = [&] {
            barrier_wait(shared.rows_full(ring.stage), ring.phase);
            // The other multiplies all 128 rows of dscores by keys, of which the last 64 are zero.
            const uint32_t zeros[kBlockM / 4] = {};
            named_sync(kFree + half, 2 * kWarpgroup);
            store_transposed<kBlockM / 8>(shared.dscores(half), zeros, 64 + warp * 16, 0, lane);
            fence_shared_for_tensor_cores();
            named_arrive(kComplete + half, 2 * kWarpgroup);
            barrier_arrive(shared.rows_empty(ring.stage));
            advance();
        };
        if (is_narrow && half != warpgroup && tile < end) pass_turn();

        while (tile < end) {
            const bool is_my_turn = half == warpgroup;
            const float* facts =
                reinterpret_cast<const float*>(smem + Traits::kFactsOffset + ring.stage * Traits::kFactBytes) +
                lane % 4 * 2;
            float scores[kBlockM / 2], dweights[kBlockM / 2];
            uint32_t weights[kBlockM / 4], dscores[kBlockM / 4];

            barrier_wait(shared.rows_full(ring.stage), ring.phase);
            wgmma_fence();
            start_products<Traits, kBlockM>(
                scores, shared.key() + first_key * Traits::kRowBytes, kKeyPieces, shared.query(ring.stage),
                kQueryPieces);
            start_products<Traits, kBlockM>(
                dweights, shared.value() + first_key * Traits::kRowBytes, kKeyPieces, shared.dout(ring.stage),
                kQueryPieces);
            const auto start_dvalue = [&] {
                wgmma_fence();
                start_sum<Traits>(dvalue, weights, shared.dout(ring.stage));
            };
            if constexpr (kHasSoftcap) {
                wgmma_wait<0>();
                pin(scores);
                pin(dweights);
                weigh_and_differentiate_capped(scores, dweights, dbias, p, keys, item, facts);
                pack_weights<Element>(weights, scores);
            } else {
                wgmma_wait<1>();
                pin(scores);
                weigh_products(scores, p, keys, item, facts);
                pack_weights<Element>(weights, scores);
                if constexpr (!Traits::kAddsLate) start_dvalue();
                wgmma_wait<Traits::kAddsLate ? 0 : 1>();
                pin(dweights);
                differentiate(dweights, dbias, scores, facts);
            }
            pack_weights<Element>(dscores, dweights);

            // The other warpgroup reads what is written over in its own turns only.
            if (!is_my_turn) named_sync(kFree + half, 2 * kWarpgroup);
            store_transposed<kBlockM / 8>(shared.dscores(half), dscores, first_key + warp * 16, 0, lane);
            fence_shared_for_tensor_cores();
            if (!is_my_turn) named_arrive(kComplete + half, 2 * kWarpgroup);

            if constexpr (Traits::kAddsLate) start_dvalue();
            wgmma_fence();
            start_sum<Traits>(dkey, dscores, shared.query(ring.stage));
            wgmma_wait<0>();
            pin(dvalue);
            pin(dkey);
            barrier_arrive(shared.rows_empty(ring.stage));

            if (is_my_turn) {
                float dquery[kHeadDim / 2];
                if (!kIsDeterministic && thread == 0) reduce_bulk_wait_read();
                named_sync(kComplete + half, 2 * kWarpgroup);
                wgmma_fence();
                start_dquery<Traits, kHeadDim, Traits::kBlockN>(dquery, shared.dscores(half), shared.key());
                wgmma_wait<0>();
                pin(dquery);
                named_arrive(kFree + half, 2 * kWarpgroup);
                if constexpr (kIsDeterministic) barrier_wait(shared.sums_empty(warpgroup), sums_phase);
                // In the order of the accumulators, which is undone when the sums are complete.
                float4* target =
                    reinterpret_cast<float4*>(smem + Traits::kSumsOffset + warpgroup * Traits::kSumBytes) + thread;
#pragma unroll
                for (int i = 0; i < kHeadDim / 8; ++i) {
                    target[i * kWarpgroup] =
                        make_float4(dquery[i * 4], dquery[i * 4 + 1], dquery[i * 4 + 2], dquery[i * 4 + 3]);
                }
                fence_shared_for_tensor_cores();
                if constexpr (kIsDeterministic) {
                    barrier_arrive(shared.sums_full(warpgroup));
                    sums_phase ^= 1;
                } else {
                    named_sync(kMeeting + warpgroup, kWarpgroup);
                    if (thread == 0) {
                        reduce_bulk(item.dquery_sums<Traits>(p, tile), shared.sums(warpgroup), Traits::kSumBytes);
                    }
                }
            }
            advance();
            if (is_narrow && tile < end) pass_turn();
        }

        const EndedItem ended(item);
        barrier_arrive(shared.keys_empty());
        if constexpr (kIsDeterministic) wait_for_earlier_list(p, ended.position, kMeeting + warpgroup);
        flush_item<Traits>(p, keys, ended.list_head, 0, dkey, dvalue, dbias, lane);
        if constexpr (kIsDeterministic) {
            barrier_arrive(shared.sums_added(warpgroup));
            barrier_wait(shared.sums_added(warpgroup), phase);
        }
        finish_item<Traits>(p, ended, kMeeting + warpgroup);
    }
}

}  // namespace flash_dmattn::sm90
