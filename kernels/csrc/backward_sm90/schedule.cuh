// What producer and consumers of the sm_90a backward agree on: shapes, the layout of shared memory, the work.
#pragma once

#include <cstdint>

#include "../backward_sm90.h"
#include "../hopper.cuh"

namespace flash_dmattn {

struct BackwardKernelParams : BackwardParams {
    int key_tiles;  // of the longest list
    int num_items;
    float exponent_factor;  // of products, without softcap
    float exponent_cap;     // the softcap as an exponent of 2
    float tanh_factor;      // of products in tanh(x) = 2 / (1 + 2^(factor x)) - 1

    BackwardKernelParams(const BackwardParams& p, int block_n)
        : BackwardParams(p),
          key_tiles((p.capacity + block_n - 1) / block_n),
          num_items(p.batch * p.num_interval_heads * p.num_epochs * key_tiles),
          exponent_factor(p.softmax_scale * kLog2e),
          exponent_cap(p.softcap * kLog2e),
          tanh_factor(-2 * kLog2e * p.softmax_scale / p.softcap) {}
};

template <typename Element_, int kHeadDim_>
struct BackwardTraits : BackwardShape<kHeadDim_> {
    using Element = Element_;
    using Shape = BackwardShape<kHeadDim_>;
    using Shape::kBlockN;
    using Shape::kSplitsHeadDim;
    using Shape::kStages;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBackwardTileRows;
    static constexpr int kConsumers = 2;  // warpgroups
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;

    // A matrix lies in shared memory as pieces of kRowBytes wide rows, each piece with all its rows. A warpgroup's part
    // of the head dim is a number of pieces.
    static constexpr int kRowBytes = kHeadDim % (kSplitsHeadDim ? 128 : 64) == 0 ? 128 : 64;
    static constexpr int kPieces = kHeadDim * 2 / kRowBytes;
    static constexpr int kDepthsPerPiece = kRowBytes / 32;  // a product is 16 elements deep
    static constexpr int kLanesPerRow = kRowBytes / 16;
    static constexpr int kRowsPerCopy = 32 / kLanesPerRow;
    static constexpr int kKeysPerWarp = kBlockN / 4;
    static constexpr int kRowsPerWarp = kBlockM / 4;
    static constexpr int kColumns = kSplitsHeadDim ? kHeadDim / 2 : kHeadDim;  // of dkey and dvalue in a warpgroup

    // Of dS^T, and of P^T where both warpgroups need all of it: a row of kBlockM queries per key.
    static constexpr int kWeightBytes = kBlockN * kBlockM * 2;
    static constexpr int kTileBytes = kBlockN * kHeadDim * 2;
    static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
    static constexpr int kSumBytes = kBlockM * kHeadDim * 4;

    static constexpr int kKeyOffset = 0;
    static constexpr int kValueOffset = kKeyOffset + kTileBytes;
    static constexpr int kQueryOffset = kValueOffset + kTileBytes;
    static constexpr int kDoutOffset = kQueryOffset + kStages * kQueryBytes;
    static constexpr int kDscoresOffset = kDoutOffset + kStages * kQueryBytes;
    static constexpr int kWeightsOffset = kDscoresOffset + 2 * kWeightBytes;
    // Sums of dquery on their way to memory, one tile per warpgroup; without room they go there from registers.
    static constexpr int kSumsOffset = kWeightsOffset + (kSplitsHeadDim ? 2 * kWeightBytes : 0);
    static constexpr int kFactsOffset = kSumsOffset + (kSplitsHeadDim ? 0 : 2 * kSumBytes);
    static constexpr int kFactBytes = 4 * kBlockM * 4;  // shift, log_total, delta, row of the queries of a stage
    static constexpr int kItemOffset = kFactsOffset + kStages * kFactBytes;
    static constexpr int kSlotsOffset = kItemOffset + 32;
    static constexpr int kBarrierOffset = kSlotsOffset + 8;
    static constexpr int kSharedBytes = kBarrierOffset + (2 * kStages + 3) * 8;

    static_assert(kKeysPerWarp % kRowsPerCopy == 0 && kRowsPerWarp % kRowsPerCopy == 0 && kKeysPerWarp <= 32);
    static_assert(kTileBytes % 1024 == 0 && kQueryBytes % 1024 == 0 && kWeightBytes % 1024 == 0);
    static_assert(!kSplitsHeadDim || kPieces % 2 == 0);
    static_assert(kSharedBytes <= 232448);
};

// Addresses in shared memory of the stages and of the barriers.
template <typename Traits>
struct BackwardMemory {
    uint32_t base;

    __device__ uint32_t key() const { return base + Traits::kKeyOffset; }
    __device__ uint32_t value() const { return base + Traits::kValueOffset; }
    __device__ uint32_t query(int stage) const { return base + Traits::kQueryOffset + stage * Traits::kQueryBytes; }
    __device__ uint32_t dout(int stage) const { return base + Traits::kDoutOffset + stage * Traits::kQueryBytes; }
    __device__ uint32_t dscores(int half) const { return base + Traits::kDscoresOffset + half * Traits::kWeightBytes; }
    __device__ uint32_t weights(int half) const { return base + Traits::kWeightsOffset + half * Traits::kWeightBytes; }
    __device__ uint32_t sums(int warpgroup) const { return base + Traits::kSumsOffset + warpgroup * Traits::kSumBytes; }
    __device__ uint32_t rows_full(int stage) const { return barrier(stage); }
    __device__ uint32_t rows_empty(int stage) const { return barrier(Traits::kStages + stage); }
    __device__ uint32_t item_full() const { return barrier(2 * Traits::kStages); }
    __device__ uint32_t keys_full() const { return barrier(2 * Traits::kStages + 1); }
    __device__ uint32_t keys_empty() const { return barrier(2 * Traits::kStages + 2); }
    __device__ uint32_t barrier(int number) const { return base + Traits::kBarrierOffset + number * 8; }
};

// A tile of an epoch's keys and the run of query tiles that see some of it.
struct WorkItem {
    int num_tiles;  // 0: there is no further item
    int first_tile;
    int list_head;  // batch * Hi + interval head
    int epoch;
    int offset;  // of the keys in the list
    int num_keys;
    int is_partial;  // some of its keys may be invisible to some of the queries

    __device__ int64_t list(const BackwardParams& p) const { return int64_t(list_head) * p.num_epochs + epoch; }

    // The number of the tile's i-th key, -1 for none and for one that weighs nothing; reads its bias.
    __device__ int key(const BackwardParams& p, int i, float& bias) const {
        bias = -INFINITY;
        if (i >= num_keys) return -1;
        const int place = offset + i;
        if (p.entries == nullptr) {
            bias = p.biases == nullptr ? 0.f : __ldg(p.biases + int64_t(list_head) * p.seqlen_k + place);
            return bias == -INFINITY ? -1 : place;
        }
        bias = p.biases == nullptr ? 0.f : __ldg(p.biases + list(p) * p.capacity + place);
        return __ldg(p.entries + list(p) * p.capacity + place);
    }
};

// Hands out items to the blocks as they come for them, in the order of the lists, so that blocks at work share lists.
// All threads of the producer warpgroup walk together.
template <typename Traits>
struct ItemWalk {
    static constexpr int kMeeting = 7;  // named barrier of the producers
    const BackwardKernelParams& p;
    int* slots;  // two numbers in shared memory
    int turn = 0;

    __device__ ItemWalk(const BackwardKernelParams& params, int* slots) : p(params), slots(slots) {}

    __device__ WorkItem next(int lane) {
        WorkItem item;
        item.num_tiles = 0;
        while (item.num_tiles == 0) {
            if (threadIdx.x % kWarpgroup == 0) slots[turn] = atomicAdd(p.next_item, 1);
            named_sync(kMeeting, kWarpgroup);
            const int number = slots[turn];
            turn ^= 1;
            if (number >= p.num_items) break;
            const int list = number / p.key_tiles;
            item.offset = (number - list * p.key_tiles) * Traits::kBlockN;
            item.list_head = list / p.num_epochs;
            item.epoch = list - item.list_head * p.num_epochs;
            if (p.entries == nullptr) {
                meet_in_order(item);
            } else {
                meet_listed(item, list, lane);
            }
        }
        return item;
    }

private:
    __device__ void meet_in_order(WorkItem& item) {
        const int start = p.query_start[item.list_head / p.num_interval_heads];
        const int first_query = item.epoch * p.epoch_size;
        const int num_queries = min(p.epoch_size, p.seqlen_q - first_query);
        const int num_listed = min(p.seqlen_k, start + first_query + num_queries);
        item.num_keys = min(Traits::kBlockN, num_listed - item.offset);
        if (item.num_keys <= 0) return;
        item.first_tile = max(0, item.offset - start - first_query) / p.tile_size;
        item.num_tiles = (num_queries + p.tile_size - 1) / p.tile_size - item.first_tile;
        item.is_partial = item.offset + item.num_keys - 1 > start + first_query + item.first_tile * p.tile_size;
    }

    __device__ void meet_listed(WorkItem& item, int list, int lane) {
        const int* sections = p.sections + int64_t(list) * 3;
        item.num_keys = min(Traits::kBlockN, __ldg(sections + 2) - item.offset);
        if (item.num_keys <= 0) return;
        item.is_partial = item.offset < __ldg(sections) || item.offset + item.num_keys > __ldg(sections + 1);
        // The query tiles whose stretch meets this tile are a run, because begin and end only grow.
        const int2* stretches = reinterpret_cast<const int2*>(p.stretches) + int64_t(list) * p.tiles_per_epoch;
        int first = INT32_MAX, last = -1;
        for (int tile = lane; tile < p.tiles_per_epoch; tile += 32) {
            const int2 stretch = __ldg(stretches + tile);
            if (stretch.x < item.offset + item.num_keys && stretch.y > item.offset) {
                first = min(first, tile);
                last = tile;
            }
        }
        item.first_tile = __reduce_min_sync(~0u, first);
        last = __reduce_max_sync(~0u, last);
        item.num_tiles = last < 0 ? 0 : last - item.first_tile + 1;
    }
};

}  // namespace flash_dmattn
