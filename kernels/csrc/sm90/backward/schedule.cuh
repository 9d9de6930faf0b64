// What producer and consumers of the sm90 backward agree on: shapes, the layout of shared memory, the work.
#pragma once

#include <cstdint>

#include "../hopper.cuh"
#include "shapes.h"

namespace flash_dmattn::sm90 {

constexpr int kWarpgroups = 2;  // of consumers

struct BackwardKernelParams : BackwardParams {
    int num_lists;
    int lists_at_once;  // whose items are handed out in turns
    int key_tiles;      // of the longest list
    int num_items;
    float exponent_factor;  // of products, without softcap
    float exponent_cap;     // the softcap as an exponent of 2
    float tanh_factor;      // of products in tanh(x) = 2 / (1 + 2^(factor x)) - 1

    BackwardKernelParams(const BackwardParams& p, int block_n)
        : BackwardParams(p),
          num_lists(p.batch * p.num_interval_heads * p.num_epochs),
          lists_at_once(p.deterministic ? min(independent_lists(p), 8) : 1),
          key_tiles((p.capacity + block_n - 1) / block_n),
          num_items((num_lists + lists_at_once - 1) / lists_at_once * lists_at_once * key_tiles),
          exponent_factor(p.softmax_scale * kLog2e),
          exponent_cap(p.softcap * kLog2e),
          tanh_factor(-2 * kLog2e * p.softmax_scale / p.softcap) {}

    // Lists of one epoch that share no kv head: in the deterministic order they follow each other.
    static __host__ __device__ int independent_lists(const BackwardParams& p) {
        return p.batch * (p.num_interval_heads / p.interval_heads_per_kv_head);
    }

    // Counts the warpgroups that are through with an item of a list, by its position in the order of work.
    __device__ int* list_counter(int position) const { return counters + 1 + position; }
    static constexpr int kSummedUp = 1 << 29;  // of a list's counter: its sums are complete
    static constexpr int kFinished = 1 << 30;  // and its dquery is written, the slot is free

    // Counts the key tiles that have been added to a query tile's dquery, in the deterministic order.
    __device__ int* tile_counter(int position, int tile, int warpgroup) const {
        return counters + 1 + num_lists + (int64_t(position) * tiles_per_epoch + tile) * kWarpgroups + warpgroup;
    }
};

template <typename Element_, int kHeadDim_, bool kHasSoftcap_, bool kIsDeterministic_>
struct BackwardTraits : BackwardShape<kHeadDim_> {
    using Element = Element_;
    using Shape = BackwardShape<kHeadDim_>;
    using Shape::kBlockN;
    using Shape::kSplitsHeadDim;
    using Shape::kStages;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr bool kHasSoftcap = kHasSoftcap_;
    static constexpr bool kIsDeterministic = kIsDeterministic_;
    static constexpr int kBlockM = kBackwardTileRows;
    // In a fixed order threads of a fourth warpgroup keep it.
    static constexpr int kThreads = (kWarpgroups + 1 + kIsDeterministic) * kWarpgroup;
    static constexpr int kConsumerRegs = kIsDeterministic ? Shape::kOrderedConsumerRegs : Shape::kConsumerRegs;
    // Whether the product for dvalue starts with that for dkey: where registers are short.
    static constexpr bool kAddsLate = kHasSoftcap || (kIsDeterministic && kHeadDim == 128);
    static constexpr int kProducerRegs = kIsDeterministic ? 256 - kConsumerRegs : Shape::kProducerRegs;
    static constexpr int kLag = kStages > 2;  // stages that are under way while the producers wait for an older one

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
    static constexpr int kOffsetsOffset = kFactsOffset + kStages * kFactBytes;  // of the rows of a tile
    static constexpr int kItemOffset = kOffsetsOffset + kBlockM * 8;
    static constexpr int kNumbersOffset = kItemOffset + 48;
    static constexpr int kBarrierOffset = kNumbersOffset + 8;
    static constexpr int kSharedBytes = kBarrierOffset + (2 * kStages + 2 + 3 * kWarpgroups) * 8;

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
    __device__ uint32_t keys_empty() const { return barrier(2 * Traits::kStages + 1); }
    // In a fixed order, of a warpgroup of consumers: its dquery lies in shared memory or, from registers, is added; the
    // place may be written again or its turn has come; all of an item is added.
    __device__ uint32_t sums_full(int warpgroup) const { return barrier(2 * Traits::kStages + 2 + warpgroup); }
    __device__ uint32_t sums_empty(int warpgroup) const { return barrier(2 * Traits::kStages + 4 + warpgroup); }
    __device__ uint32_t sums_added(int warpgroup) const { return barrier(2 * Traits::kStages + 6 + warpgroup); }
    __device__ uint32_t barrier(int number) const { return base + Traits::kBarrierOffset + number * 8; }
};

// A tile of an epoch's keys and the run of query tiles that see some of it.
struct WorkItem {
    int position;   // of its list in the order of work; -1: there is no further item
    int slot;       // where the dquery of the list's query tiles is summed up
    int list_head;  // batch * Hi + interval head
    int epoch;
    int num_parts;  // key tiles of the list, at least 1
    int offset;     // of the keys in the list
    int num_keys;
    int first_tile;
    int num_tiles;   // may be 0
    int is_partial;  // some of its keys may be invisible to some of the queries

    __device__ int64_t list(const BackwardParams& p) const { return int64_t(list_head) * p.num_epochs + epoch; }

    template <typename Traits>
    __device__ float* dquery_sums(const BackwardParams& p, int tile) const {
        return p.dquery_sums + (int64_t(slot) * p.tiles_per_epoch + tile) * (Traits::kBlockM * Traits::kHeadDim);
    }

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

// Hands out items to the blocks as they come for them, list by list, so that blocks at work share lists. All threads of
// the producer warpgroup walk together.
//
// The deterministic order goes epoch by epoch, and of lists that do not depend on each other takes a key tile each in
// turn. What an item waits for, it or a block that works on it comes earlier in either order.
template <typename Traits>
struct ItemWalk {
    static constexpr int kMeeting = 7;  // named barrier of the producers
    const BackwardKernelParams& p;
    int* numbers;  // two in shared memory
    int turn = 0;

    __device__ ItemWalk(const BackwardKernelParams& params, int* numbers) : p(params), numbers(numbers) {}

    __device__ WorkItem next(int lane) {
        WorkItem item;
        while (true) {
            if (threadIdx.x % kWarpgroup == 0) numbers[turn] = atomicAdd(p.counters, 1);
            named_sync(kMeeting, kWarpgroup);
            const int number = numbers[turn];
            turn ^= 1;
            item.position = -1;
            if (number >= p.num_items) break;
            const int key_tile = find_list(item, number);
            if (item.position >= p.num_lists) continue;
            item.slot = item.position % p.num_slots;
            item.offset = key_tile * Traits::kBlockN;
            if (p.entries == nullptr) {
                meet_in_order(item);
            } else {
                meet_listed(item, lane);
            }
            if (key_tile < item.num_parts) break;
            // The list has no more key tiles, but numbers for as many as the longest.
            if (!Traits::kIsDeterministic && threadIdx.x % kWarpgroup == 0) {
                atomicMax(p.counters, (item.position + 1) * p.key_tiles);
            }
        }
        return item;
    }

private:
    __device__ int find_list(WorkItem& item, int number) const {
        if constexpr (!Traits::kIsDeterministic) {
            item.position = number / p.key_tiles;
            item.list_head = item.position / p.num_epochs;
            item.epoch = item.position - item.list_head * p.num_epochs;
            return number - item.position * p.key_tiles;
        } else {
            const int turns = number / p.lists_at_once;
            const int first_list = turns / p.key_tiles * p.lists_at_once;
            item.position = first_list + number - turns * p.lists_at_once;
            item.epoch = item.position / (p.batch * p.num_interval_heads);
            const int list_of_epoch = item.position - item.epoch * (p.batch * p.num_interval_heads);
            const int independent = BackwardKernelParams::independent_lists(p);
            const int head_of_kv_head = list_of_epoch / independent;
            item.list_head =
                (list_of_epoch - head_of_kv_head * independent) * p.interval_heads_per_kv_head + head_of_kv_head;
            return turns % p.key_tiles;
        }
    }

    __device__ void set_keys(WorkItem& item, int num_listed) const {
        item.num_parts = max(1, (num_listed + Traits::kBlockN - 1) / Traits::kBlockN);
        item.num_keys = min(Traits::kBlockN, num_listed - item.offset);
        item.num_tiles = 0;
    }

    __device__ void meet_in_order(WorkItem& item) const {
        const int start = p.query_start[item.list_head / p.num_interval_heads];
        const int first_query = item.epoch * p.epoch_size;
        const int num_queries = min(p.epoch_size, p.seqlen_q - first_query);
        set_keys(item, min(p.seqlen_k, start + first_query + num_queries));
        if (item.num_keys <= 0) return;
        item.first_tile = max(0, item.offset - start - first_query) / p.tile_size;
        item.num_tiles = (num_queries + p.tile_size - 1) / p.tile_size - item.first_tile;
        item.is_partial = item.offset + item.num_keys - 1 > start + first_query + item.first_tile * p.tile_size;
    }

    __device__ void meet_listed(WorkItem& item, int lane) const {
        const int64_t list = item.list(p);
        const int* sections = p.sections + list * 3;
        set_keys(item, __ldg(sections + 2));
        if (item.num_keys <= 0) return;
        item.is_partial = item.offset < __ldg(sections) || item.offset + item.num_keys > __ldg(sections + 1);
        // The query tiles whose stretch meets this tile are a run, because begin and end only grow.
        const int2* stretches = reinterpret_cast<const int2*>(p.stretches) + list * p.tiles_per_epoch;
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

}  // namespace flash_dmattn::sm90
