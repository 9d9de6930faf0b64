// The consumers of the sm_90a backward up to head dim 128: each warpgroup owns 64 keys of the tile.
//
// dscores of both meet in shared memory for dquery, which the warpgroups compute in turns, a query tile each: while one
// does, the other goes on to the next query tile. Of a narrow item, 64 keys or less, both own all keys, and each
// computes everything for the query tiles of its turns.
#pragma once

#include "gradients.cuh"

namespace flash_dmattn {

template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void consume_rows(const BackwardKernelParams& p, char* smem, int warpgroup) {
    using Element = typename Traits::Element;
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
    int half = 0;
    named_arrive(kFree + warpgroup, 2 * kWarpgroup);

    for (int phase = 0;; phase ^= 1) {
        barrier_wait(shared.item_full(), phase);
        if (item.num_tiles == 0) break;
        const bool is_narrow = keep_of_warp(item.num_keys) <= 64;
        const int first_key = is_narrow ? 0 : warpgroup * 64;
        const ThreadKeys keys(p, item, first_key + warp * 16 + lane / 4);
        const int end = keep_of_warp(item.first_tile + item.num_tiles);
        barrier_wait(shared.keys_full(), phase);

        int tile = keep_of_warp(item.first_tile);
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
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.rows_empty(ring.stage));
            advance();
        };
        if (is_narrow && half != warpgroup) pass_turn();

        while (tile < end) {
            const bool is_my_turn = half == warpgroup;
            const float* facts =
                reinterpret_cast<const float*>(smem + Traits::kFactsOffset + ring.stage * Traits::kFactBytes) +
                lane % 4 * 2;
            float scores[kBlockM / 2], dweights[kBlockM / 2];
            uint32_t weights[kBlockM / 4], dscores[kBlockM / 4];
            __half2 slopes[kHasSoftcap ? kBlockM / 4 : 1];

            barrier_wait(shared.rows_full(ring.stage), ring.phase);
            fence_shared_for_tensor_cores();
            wgmma_fence();
            start_products<Traits, kBlockM>(
                scores, shared.key() + first_key * Traits::kRowBytes, kKeyPieces, shared.query(ring.stage),
                kQueryPieces);
            start_products<Traits, kBlockM>(
                dweights, shared.value() + first_key * Traits::kRowBytes, kKeyPieces, shared.dout(ring.stage),
                kQueryPieces);
            wgmma_wait<1>();
            pin(scores);
            weigh_products<kHasSoftcap>(scores, slopes, p, keys, item, facts);
            pack_weights<Element>(weights, scores);

            wgmma_fence();
#pragma unroll
            for (int depth = 0; depth < kBlockM / 16; ++depth) {
                Wgmma<kHeadDim, Element>::weigh(
                    dvalue, weights + depth * 4,
                    matrix_descriptor<Traits::kRowBytes>(
                        shared.dout(ring.stage) + depth * 16 * Traits::kRowBytes, kQueryPieces));
            }
            wgmma_commit();
            wgmma_wait<1>();
            pin(dweights);
            differentiate<kHasSoftcap>(dweights, dbias, scores, slopes, facts);
            pack_weights<Element>(dscores, dweights);

            // The other warpgroup reads what is written over in its own turns only.
            if (!is_my_turn) named_sync(kFree + half, 2 * kWarpgroup);
            store_transposed<kBlockM / 8>(shared.dscores(half), dscores, first_key + warp * 16, 0, lane);
            fence_shared_for_tensor_cores();
            if (!is_my_turn) named_arrive(kComplete + half, 2 * kWarpgroup);

            wgmma_fence();
#pragma unroll
            for (int depth = 0; depth < kBlockM / 16; ++depth) {
                Wgmma<kHeadDim, Element>::weigh(
                    dkey, dscores + depth * 4,
                    matrix_descriptor<Traits::kRowBytes>(
                        shared.query(ring.stage) + depth * 16 * Traits::kRowBytes, kQueryPieces));
            }
            wgmma_commit();
            wgmma_wait<0>();
            pin(dvalue);
            pin(dkey);
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.rows_empty(ring.stage));

            if (is_my_turn) {
                float dquery[kHeadDim / 2];
                if (thread == 0) reduce_bulk_wait_read();
                named_sync(kComplete + half, 2 * kWarpgroup);
                wgmma_fence();
                start_dquery<Traits, kHeadDim, Traits::kBlockN>(dquery, shared.dscores(half), shared.key());
                wgmma_wait<0>();
                pin(dquery);
                named_arrive(kFree + half, 2 * kWarpgroup);
                // In the order of the accumulators, which is undone when the sums are complete.
                float4* target =
                    reinterpret_cast<float4*>(smem + Traits::kSumsOffset + warpgroup * Traits::kSumBytes) + thread;
#pragma unroll
                for (int i = 0; i < kHeadDim / 8; ++i) {
                    target[i * kWarpgroup] =
                        make_float4(dquery[i * 4], dquery[i * 4 + 1], dquery[i * 4 + 2], dquery[i * 4 + 3]);
                }
                fence_shared_for_tensor_cores();
                named_sync(kMeeting + warpgroup, kWarpgroup);
                if (thread == 0) {
                    float* sums = p.dquery_sums + (item.list(p) * p.tiles_per_epoch + tile) * (kBlockM * kHeadDim);
                    reduce_bulk(sums, shared.sums(warpgroup), Traits::kSumBytes);
                }
            }
            advance();
            if (is_narrow && tile < end) pass_turn();
        }

        const int list_head = keep_of_warp(item.list_head);  // the last that is read of the item
        if (lane == 0) barrier_arrive(shared.keys_empty());
        flush_item<Traits>(p, keys, list_head, 0, dkey, dvalue, dbias, lane);
    }
    if (thread == 0) reduce_bulk_wait_all();
}

}  // namespace flash_dmattn
