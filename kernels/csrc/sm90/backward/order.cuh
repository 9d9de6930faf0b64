// The fixed order in which key tiles are added to the sums of dquery in the sm90 backward.
#pragma once

#include "schedule.cuh"

namespace flash_dmattn::sm90 {

// In the deterministic order: when a key tile is added to a query tile's dquery, which is the order of the list. One
// thread of a warpgroup, or of each half of the head dim, keeps it.
template <typename Traits>
struct TileOrder {
    int turn = 0;  // how many key tiles come before; -1 where the item has nothing to add
    int tile = 0;
    bool is_pending = false;  // added, and not told to the next yet

    __device__ void start(const BackwardKernelParams& p, const WorkItem& item, int tile) {
        this->tile = tile;
        turn = item.offset / Traits::kBlockN;
        if (p.entries == nullptr) return;
        const int2 stretch =
            __ldg(reinterpret_cast<const int2*>(p.stretches) + item.list(p) * p.tiles_per_epoch + tile);
        turn = stretch.x < stretch.y ? turn - stretch.x / Traits::kBlockN : -1;
    }

    __device__ void wait(const BackwardKernelParams& p, int position, int half) {
        if (turn > 0) wait_for_counter(p.tile_counter(position, tile, half), turn);
        fence_global_for_reductions();
        is_pending = turn >= 0;
    }

    // Called when what was added has arrived.
    __device__ void tell(const BackwardKernelParams& p, int position, int half) {
        fence_global_for_reductions();
        set_counter(p.tile_counter(position, tile, half), turn + 1);
        is_pending = false;
    }
};

// Waits and tells for a warpgroup of consumers, of which nobody waits for memory then: one thread for each of the two.
// Adds the dquery that the warpgroup leaves in shared memory, or lets it add from its registers.
template <typename Traits>
__device__ __forceinline__ void keep_order(const BackwardKernelParams& p, char* smem, int warpgroup) {
    const BackwardMemory<Traits> shared{shared_address(smem)};
    const WorkItem& current = *reinterpret_cast<const WorkItem*>(smem + Traits::kItemOffset);
    TileOrder<Traits> order;
    int half = 0, sums_phase = 0;
    for (int phase = 0;; phase ^= 1) {
        barrier_wait(shared.item_full(), phase);
        if (current.position < 0) break;
        const WorkItem item = current;
        barrier_arrive(shared.keys_empty());
        for (int i = 0; i < item.num_tiles; ++i, half ^= 1) {
            if (!Traits::kSplitsHeadDim && half != warpgroup) continue;
            const int tile = item.first_tile + i;
            order.start(p, item, tile);
            if constexpr (Traits::kSplitsHeadDim) {
                order.wait(p, item.position, warpgroup);
                barrier_arrive(shared.sums_empty(warpgroup));
                barrier_wait(shared.sums_full(warpgroup), sums_phase);
            } else {
                barrier_wait(shared.sums_full(warpgroup), sums_phase);
                order.wait(p, item.position, 0);
                if (order.is_pending) {
                    reduce_bulk(item.dquery_sums<Traits>(p, tile), shared.sums(warpgroup), Traits::kSumBytes);
                }
                reduce_bulk_wait_read();
                barrier_arrive(shared.sums_empty(warpgroup));
                reduce_bulk_wait_all();
            }
            sums_phase ^= 1;
            if (order.is_pending) order.tell(p, item.position, Traits::kSplitsHeadDim ? warpgroup : 0);
        }
        barrier_arrive(shared.sums_added(warpgroup));
        barrier_wait(shared.sums_added(warpgroup), phase);
    }
}

}  // namespace flash_dmattn::sm90
