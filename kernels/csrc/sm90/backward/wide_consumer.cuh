// The consumers of the sm90 backward for head dims above 128: both warpgroups own all 64 keys of the tile and half of
// the head dim. For the weights each takes half of the queries; weights and dscores meet in shared memory.
#pragma once

#include "finish.cuh"

namespace flash_dmattn::sm90 {

// acc += a b, of a in shared memory with 64 queries in each of its 64 rows, and of kBlockM rows of query or dout.
template <typename Traits>
__device__ __forceinline__ void start_wide_sum(float (&acc)[Traits::kColumns / 2], uint32_t a, uint32_t b) {
#pragma unroll
    for (int depth = 0; depth < Traits::kBlockM / 16; ++depth) {
        Wgmma<Traits::kColumns, typename Traits::Element>::template multiply<true, false, true>(
            acc, matrix_descriptor<128>(a + depth * 32, 16),
            matrix_descriptor<Traits::kRowBytes>(
                b + depth * 16 * Traits::kRowBytes, Traits::kBlockM * Traits::kRowBytes));
    }
}

template <typename Traits>
__device__ __forceinline__ void consume_wide(const BackwardKernelParams& p, char* smem, int warpgroup) {
    using Element = typename Traits::Element;
    constexpr bool kHasSoftcap = Traits::kHasSoftcap, kIsDeterministic = Traits::kIsDeterministic;
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
    // Named barriers: where weights and dscores meet; the biases of one warpgroup are added; a warpgroup alone.
    constexpr int kComplete = 1, kAdded = 2, kMeeting = 5;

    float dkey[kColumns / 2], dvalue[kColumns / 2], dbias[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) dkey[i] = dvalue[i] = 0.f;
    const WorkItem& item = *reinterpret_cast<const WorkItem*>(smem + Traits::kItemOffset);
    Ring<Traits::kStages> ring;
    int half = 0, sums_phase = 0;

    for (int phase = 0;; phase ^= 1) {
        barrier_wait(shared.item_full(), phase);
        if (item.position < 0) break;
        const ThreadKeys keys(p, item, warp * 16 + lane / 4);
        // In the order of the accumulators, which is undone when the sums are complete.
        float* sums = item.dquery_sums<Traits>(p, item.first_tile) + warpgroup * kBlockM * kColumns + thread * 4;

        for (int tiles = keep_of_warp(item.num_tiles); tiles > 0; --tiles, half ^= 1) {
            const float* facts =
                reinterpret_cast<const float*>(smem + Traits::kFactsOffset + ring.stage * Traits::kFactBytes) +
                warpgroup * kMyQueries + lane % 4 * 2;
            {
                float scores[kMyQueries / 2], dweights[kMyQueries / 2];
                uint32_t packed[kMyQueries / 4];
                barrier_wait(shared.rows_full(ring.stage), ring.phase);
                wgmma_fence();
                start_products<Traits, kMyQueries>(
                    scores, shared.key(), kKeyPieces, shared.query(ring.stage) + my_queries, kQueryPieces);
                start_products<Traits, kMyQueries>(
                    dweights, shared.value(), kKeyPieces, shared.dout(ring.stage) + my_queries, kQueryPieces);
                if constexpr (kHasSoftcap) {
                    wgmma_wait<0>();
                    pin(scores);
                    pin(dweights);
                    weigh_and_differentiate_capped(scores, dweights, dbias, p, keys, item, facts);
                } else {
                    wgmma_wait<1>();
                    pin(scores);
                    weigh_products(scores, p, keys, item, facts);
                }
                pack_weights<Element>(packed, scores);
                store_transposed<kMyQueries / 8>(
                    shared.weights(half), packed, warp * 16, warpgroup * kMyQueries / 8, lane);
                if constexpr (!kHasSoftcap) {
                    wgmma_wait<0>();
                    pin(dweights);
                    differentiate(dweights, dbias, scores, facts);
                }
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
            start_wide_sum<Traits>(dvalue, shared.weights(half), shared.dout(ring.stage) + my_query_columns);
            start_wide_sum<Traits>(dkey, shared.dscores(half), shared.query(ring.stage) + my_query_columns);
            wgmma_commit();
            wgmma_wait<1>();
            pin(dquery);
            if constexpr (kIsDeterministic) {
                barrier_wait(shared.sums_empty(warpgroup), sums_phase);
                sums_phase ^= 1;
            }
#pragma unroll
            for (int i = 0; i < kColumns / 8; ++i) {
                reduce(
                    sums + i * kWarpgroup * 4,
                    make_float4(dquery[i * 4], dquery[i * 4 + 1], dquery[i * 4 + 2], dquery[i * 4 + 3]));
            }
            if constexpr (kIsDeterministic) barrier_arrive(shared.sums_full(warpgroup));
            sums += kBlockM * kHeadDim;
            wgmma_wait<0>();
            pin(dvalue);
            pin(dkey);
            barrier_arrive(shared.rows_empty(ring.stage));
            ring.advance();
        }

        const EndedItem ended(item);
        barrier_arrive(shared.keys_empty());
        if constexpr (kIsDeterministic) {
            wait_for_earlier_list(p, ended.position, kMeeting + warpgroup);
            if (warpgroup == 1) named_sync(kAdded, 2 * kWarpgroup);
        }
        flush_item<Traits>(p, keys, ended.list_head, warpgroup * kColumns, dkey, dvalue, dbias, lane);
        if constexpr (kIsDeterministic) {
            if (warpgroup == 0) {
                __threadfence();
                named_arrive(kAdded, 2 * kWarpgroup);
            }
            barrier_arrive(shared.sums_added(warpgroup));
            barrier_wait(shared.sums_added(warpgroup), phase);
        }
        finish_item<Traits>(p, ended, kMeeting + warpgroup);
    }
}

}  // namespace flash_dmattn::sm90
