// The consumers of the sm_90a backward for head dims above 128: both warpgroups own all 64 keys of the tile and half of
// the head dim. For the weights each takes half of the queries; weights and dscores meet in shared memory.
#pragma once

#include "gradients.cuh"

namespace flash_dmattn {

// acc += a b, of a in shared memory with 64 queries in each of its 64 rows, and of kBlockM rows of query or dout.
template <typename Traits>
__device__ __forceinline__ void start_sum(float (&acc)[Traits::kColumns / 2], uint32_t a, uint32_t b) {
#pragma unroll
    for (int depth = 0; depth < Traits::kBlockM / 16; ++depth) {
        Wgmma<Traits::kColumns, typename Traits::Element>::template multiply<true, false, true>(
            acc, matrix_descriptor<128>(a + depth * 32, 16),
            matrix_descriptor<Traits::kRowBytes>(
                b + depth * 16 * Traits::kRowBytes, Traits::kBlockM * Traits::kRowBytes));
    }
}

template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void consume_wide(const BackwardKernelParams& p, char* smem, int warpgroup) {
    using Element = typename Traits::Element;
    constexpr int kHeadDim = Traits::kHeadDim, kBlockM = Traits::kBlockM, kColumns = Traits::kColumns;
    constexpr int kKeyPieces = Traits::kBlockN * Traits::kRowBytes, kQueryPieces = kBlockM * Traits::kRowBytes;
    constexpr int kMyQueries = kBlockM / 2, kMyPieces = Traits::kPieces / 2;
    static_assert(Traits::kBlockN == 64);
    const BackwardMemory<Traits> shared{shared_address(smem)};
    const int warp = threadIdx.x / 32 % 4;
    const int lane = keep(threadIdx.x % 32) & 31;
    const int thread = threadIdx.x % kWarpgroup;
    warpgroup = keep_of_warp(warpgroup);
    const uint32_t my_queries = warpgroup * kMyQueries * Traits::kRowBytes;
    const uint32_t my_query_columns = warpgroup * kMyPieces * kQueryPieces;
    constexpr int kComplete = 1;  // the named barrier where weights and dscores meet

    float dkey[kColumns / 2], dvalue[kColumns / 2], dbias[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) dkey[i] = dvalue[i] = 0.f;
    const WorkItem& item = *reinterpret_cast<const WorkItem*>(smem + Traits::kItemOffset);
    Ring<Traits::kStages> ring;
    int half = 0;

    for (int phase = 0;; phase ^= 1) {
        barrier_wait(shared.item_full(), phase);
        if (item.num_tiles == 0) break;
        const ThreadKeys keys(p, item, warp * 16 + lane / 4);
        // In the order of the accumulators, which is undone when the sums are complete.
        float* sums = p.dquery_sums + (item.list(p) * p.tiles_per_epoch + item.first_tile) * (kBlockM * kHeadDim) +
                      warpgroup * kBlockM * kColumns + thread * 4;
        barrier_wait(shared.keys_full(), phase);

        for (int tiles = keep_of_warp(item.num_tiles); tiles > 0; --tiles, half ^= 1) {
            const float* facts =
                reinterpret_cast<const float*>(smem + Traits::kFactsOffset + ring.stage * Traits::kFactBytes) +
                warpgroup * kMyQueries + lane % 4 * 2;
            {
                float scores[kMyQueries / 2], dweights[kMyQueries / 2];
                uint32_t packed[kMyQueries / 4];
                __half2 slopes[kHasSoftcap ? kMyQueries / 4 : 1];
                barrier_wait(shared.rows_full(ring.stage), ring.phase);
                fence_shared_for_tensor_cores();
                wgmma_fence();
                start_products<Traits, kMyQueries>(
                    scores, shared.key(), kKeyPieces, shared.query(ring.stage) + my_queries, kQueryPieces);
                start_products<Traits, kMyQueries>(
                    dweights, shared.value(), kKeyPieces, shared.dout(ring.stage) + my_queries, kQueryPieces);
                wgmma_wait<1>();
                pin(scores);
                weigh_products<kHasSoftcap>(scores, slopes, p, keys, item, facts);
                pack_weights<Element>(packed, scores);
                store_transposed<kMyQueries / 8>(
                    shared.weights(half), packed, warp * 16, warpgroup * kMyQueries / 8, lane);
                wgmma_wait<0>();
                pin(dweights);
                differentiate<kHasSoftcap>(dweights, dbias, scores, slopes, facts);
                pack_weights<Element>(packed, dweights);
                store_transposed<kMyQueries / 8>(
                    shared.dscores(half), packed, warp * 16, warpgroup * kMyQueries / 8, lane);
            }
            fence_shared_for_tensor_cores();
            named_sync(kComplete, 2 * kWarpgroup);

            float dquery[kColumns / 2];
            wgmma_fence();
            start_dquery<Traits, kColumns, Traits::kBlockN>(
                dquery, shared.dscores(half), shared.key() + warpgroup * kMyPieces * kKeyPieces);
            start_sum<Traits>(dvalue, shared.weights(half), shared.dout(ring.stage) + my_query_columns);
            start_sum<Traits>(dkey, shared.dscores(half), shared.query(ring.stage) + my_query_columns);
            wgmma_commit();
            wgmma_wait<1>();
            pin(dquery);
#pragma unroll
            for (int i = 0; i < kColumns / 8; ++i) {
                reduce(
                    sums + i * kWarpgroup * 4,
                    make_float4(dquery[i * 4], dquery[i * 4 + 1], dquery[i * 4 + 2], dquery[i * 4 + 3]));
            }
            sums += kBlockM * kHeadDim;
            wgmma_wait<0>();
            pin(dvalue);
            pin(dkey);
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.rows_empty(ring.stage));
            ring.advance();
        }

        const int list_head = keep_of_warp(item.list_head);  // the last that is read of the item
        if (lane == 0) barrier_arrive(shared.keys_empty());
        flush_item<Traits>(p, keys, list_head, warpgroup * kColumns, dkey, dvalue, dbias, lane);
    }
}

}  // namespace flash_dmattn
