// The work of the backward for all architectures: a tile of an epoch's keys and the query tiles that see some of it, and
// their way into shared memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "../backward_mma_shapes.h"
#include "../fragments.cuh"
#include "../shared_memory.cuh"

namespace flash_dmattn {

struct MmaBackwardKernelParams : MmaBackwardParams {
    EpochRange epochs;
    int key_tiles;          // of the longest list
    uint32_t group_factor;  // rows of a query tile times this, over 2^16, are tokens
    float exponent_factor;  // of products, without softcap
    float exponent_cap;     // the softcap as an exponent of 2
    float tanh_factor;      // of products in tanh(x) = 2 / (1 + 2^(factor x)) - 1

    MmaBackwardKernelParams(const MmaBackwardParams& p, EpochRange range, int block_n)
        : MmaBackwardParams(p),
          epochs(range),
          key_tiles((p.capacity + block_n - 1) / block_n),
          group_factor(((1 << 16) + p.group_size - 1) / p.group_size),
          exponent_factor(p.softmax_scale * kLog2e),
          exponent_cap(p.softcap * kLog2e),
          tanh_factor(-2 * kLog2e * p.softmax_scale / p.softcap) {}
};

template <typename Element_, int kHeadDim_, typename Shape>
struct MmaBackwardTraits : Shape {
    using Element = Element_;
    using Shape::kBlockM;
    using Shape::kBlockN;
    using Shape::kStages;
    using Shape::kWarps;
    using Shape::kBlocks;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kThreads = kWarps * 32;

    // Of keys by queries, and of keys by columns, a warp has kKeysOfWarp rows and its share of the columns.
    static constexpr int kKeysOfWarp = kBlockN >= 64 && kHeadDim * (kBlockN / 32) % (kWarps * 16) == 0 ? 32 : 16;
    static constexpr int kKeyTiles = kKeysOfWarp / 16;
    static constexpr int kKeyGroups = kBlockN / kKeysOfWarp;
    static constexpr int kQueriesOfWarp = kBlockM * kKeyGroups / kWarps;
    static constexpr int kColumnsOfWarp = kHeadDim * kKeyGroups / kWarps;
    // Of queries by columns.
    static constexpr int kRowsOfWarp = kHeadDim % 64 == 0 ? 32 : 16;
    static constexpr int kRowTiles = kRowsOfWarp / 16;
    static constexpr int kRowGroups = kBlockM / kRowsOfWarp;
    static constexpr int kRowColumns = kHeadDim * kRowGroups / kWarps;

    // A matrix lies in shared memory as pieces of kRowBytes columns, each piece with all its rows.
    static constexpr int kRowBytes = kHeadDim % 64 == 0 ? 128 : 64;
    static constexpr int kPieces = kHeadDim * 2 / kRowBytes;
    static constexpr int kLanesPerRow = kRowBytes / 16;
    static constexpr int kRowsPerCopy = 32 / kLanesPerRow;
    static constexpr int kKeyCopies = (kBlockN + kWarps * kRowsPerCopy - 1) / (kWarps * kRowsPerCopy);
    static constexpr int kQueryCopies = kBlockM / (kWarps * kRowsPerCopy);

    static constexpr int kTileBytes = kBlockN * kHeadDim * 2;
    static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
    static constexpr int kWeightRowBytes = kBlockM * 2;
    static constexpr int kKeyOffset = 0;
    static constexpr int kValueOffset = kKeyOffset + kTileBytes;
    static constexpr int kQueryOffset = kValueOffset + kTileBytes;
    static constexpr int kDoutOffset = kQueryOffset + kStages * kQueryBytes;
    static constexpr int kWeightsOffset = kDoutOffset + kStages * kQueryBytes;  // of keys by queries, 16 bits
    static constexpr int kDscoresOffset = kWeightsOffset + kBlockN * kWeightRowBytes;
    static constexpr int kFactsOffset = kDscoresOffset + kBlockN * kWeightRowBytes;
    static constexpr int kFactBytes = 4 * kBlockM * 4;
    static constexpr int kSharedBytes = kFactsOffset + kStages * kFactBytes;

    static_assert(kSharedBytes == Shape::shared_bytes(kHeadDim));
    static_assert(4 * kBlockM % kThreads == 0 && kWeightRowBytes == 128);
    static_assert(kQueriesOfWarp % 16 == 0 && kColumnsOfWarp % 16 == 0 && kRowColumns % 16 == 0);
    static_assert(kBlockM % (kWarps * kRowsPerCopy) == 0);
};

// A tile of an epoch's keys and the run of query tiles that see some of it.
struct MmaWorkItem {
    int list_head;  // batch * Hi + interval head
    int batch;
    int epoch;
    int offset;  // of the keys in the list
    int num_keys;
    int first_tile;
    int num_tiles = 0;
    bool is_partial;  // some of its keys may be invisible to some of the queries

    __device__ MmaWorkItem(const MmaBackwardKernelParams& p, int number, int block_n, int lane) {
        const int list = number / p.key_tiles;
        offset = (number - list * p.key_tiles) * block_n;
        list_head = list / p.epochs.count;
        epoch = p.epochs.first + list - list_head * p.epochs.count;
        batch = list_head / p.num_interval_heads;
        if (p.entries == nullptr) {
            meet_in_order(p, block_n);
        } else {
            meet_listed(p, block_n, lane);
        }
    }

    __device__ int64_t list(const MmaBackwardParams& p) const { return int64_t(list_head) * p.num_epochs + epoch; }

    // The place of the epoch's sums of dquery.
    __device__ int64_t sums(const MmaBackwardKernelParams& p) const {
        return int64_t(list_head) * p.epochs_at_once + epoch - p.epochs.first;
    }

    // The number of the tile's i-th key, -1 for none and for one that weighs nothing; reads its bias.
    __device__ int key(const MmaBackwardParams& p, int i, float& bias) const {
        bias = -INFINITY;
        if (i >= num_keys) return -1;
        const int64_t first = p.entries == nullptr ? int64_t(list_head) * p.seqlen_k : list(p) * p.capacity;
        bias = p.biases == nullptr ? 0.f : __ldg(p.biases + first + offset + i);
        if (bias == -INFINITY) return -1;
        return p.entries == nullptr ? offset + i : __ldg(p.entries + first + offset + i);
    }

private:
    __device__ void meet_in_order(const MmaBackwardKernelParams& p, int block_n) {
        const int start = p.query_start[batch];
        const int first_query = epoch * p.epoch_size;
        const int num_queries = min(p.epoch_size, p.seqlen_q - first_query);
        num_keys = min(block_n, min(p.seqlen_k, start + first_query + num_queries) - offset);
        if (num_keys <= 0) return;
        first_tile = max(0, offset - start - first_query) / p.tile_size;
        num_tiles = (num_queries + p.tile_size - 1) / p.tile_size - first_tile;
        is_partial = offset + num_keys - 1 > start + first_query + first_tile * p.tile_size;
    }

    __device__ void meet_listed(const MmaBackwardKernelParams& p, int block_n, int lane) {
        const int* sections = p.sections + list(p) * 3;
        num_keys = min(block_n, __ldg(sections + 2) - offset);
        if (num_keys <= 0) return;
        is_partial = offset < __ldg(sections) || offset + num_keys > __ldg(sections + 1);
        // The query tiles whose stretch meets this tile are a run, because begin and end only grow.
        const int* stretches = p.stretches + list(p) * p.tiles_per_epoch * 2;
        int first = INT32_MAX, last = -1;
        for (int tile = lane; tile < p.tiles_per_epoch; tile += 32) {
            if (__ldg(stretches + tile * 2) < offset + num_keys && __ldg(stretches + tile * 2 + 1) > offset) {
                first = min(first, tile);
                last = tile;
            }
        }
        first_tile = __reduce_min_sync(~0u, first);
        last = __reduce_max_sync(~0u, last);
        num_tiles = last < 0 ? 0 : last - first_tile + 1;
    }
};

// Starts to copy rows of the item's keys; rows of no key become zero.
template <typename Traits>
__device__ __forceinline__ void start_key_rows(
    uint32_t target, const void* matrix, const int64_t (&strides)[3], const MmaBackwardKernelParams& p,
    const MmaWorkItem& item) {
    const int head = (item.list_head - item.batch * p.num_interval_heads) / p.interval_heads_per_kv_head;
    const int piece = threadIdx.x % Traits::kLanesPerRow;
    const char* base =
        static_cast<const char*>(matrix) + (item.batch * strides[0] + head * strides[2]) * 2 + piece * 16;
#pragma unroll
    for (int i = 0; i < Traits::kKeyCopies; ++i) {
        const int row = threadIdx.x / Traits::kLanesPerRow + i * Traits::kWarps * Traits::kRowsPerCopy;
        if (Traits::kBlockN % (Traits::kWarps * Traits::kRowsPerCopy) != 0 && row >= Traits::kBlockN) break;
        float bias;
        const int key = item.key(p, row, bias);
        const char* source = base + max(key, 0) * (strides[1] * 2);
        const uint32_t place = target + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
        for (int k = 0; k < Traits::kPieces; ++k) {
            copy_async(
                place + k * Traits::kBlockN * Traits::kRowBytes, source + k * Traits::kRowBytes, key >= 0 ? 16 : 0);
        }
    }
}

// Brings query tile after query tile: rows of query and dout, and of every row four facts: shift, log_total, delta, row
// number. Rows that see nothing are zero, have the shift +inf and no delta.
template <typename Traits>
struct QueryTiles {
    static constexpr int kCopies = Traits::kQueryCopies;

    const MmaBackwardKernelParams& p;
    const MmaWorkItem& item;
    char* smem;
    int first_head;        // of the interval head, among all query heads
    int end;               // the query after the epoch's last
    float shifts[kCopies];  // of the rows that this thread copies of the next tile

    __device__ QueryTiles(const MmaBackwardKernelParams& params, const MmaWorkItem& work, char* shared)
        : p(params), item(work), smem(shared) {
        first_head = (item.list_head - item.batch * p.num_interval_heads) * p.group_size;
        end = min((item.epoch + 1) * p.epoch_size, p.seqlen_q);
        load_shifts(0);
    }

    // The query of a row of the item's n-th tile, and its head; a query from `end` on does not exist.
    __device__ int query_of(int n, int row, int& head) const {
        const int token = row * p.group_factor >> 16;
        head = first_head + row - token * p.group_size;
        const int query = item.epoch * p.epoch_size + (item.first_tile + n) * p.tile_size + token;
        return token < p.tile_size ? query : end;
    }

    __device__ int64_t place(int query, int head) const {
        return (int64_t(item.batch) * p.num_interval_heads * p.group_size + head) * p.seqlen_q + query;
    }

    __device__ void load_shifts(int n) {
        const int first_row = compute_here(threadIdx.x) / Traits::kLanesPerRow;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            int head;
            const int query = query_of(n, first_row + i * Traits::kWarps * Traits::kRowsPerCopy, head);
            shifts[i] = n < item.num_tiles && query < end ? __ldg(p.stats + place(query, head)) : INFINITY;
        }
    }

    __device__ float* facts(int stage) const {
        return reinterpret_cast<float*>(smem + Traits::kFactsOffset + stage * Traits::kFactBytes);
    }

    __device__ void start(int n, int stage) {
        start_facts(n, facts(stage));
        const int thread = compute_here(threadIdx.x);
        const int piece = thread % Traits::kLanesPerRow;
        const uint32_t base = shared_address(smem) + stage * Traits::kQueryBytes;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const int row = thread / Traits::kLanesPerRow + i * Traits::kWarps * Traits::kRowsPerCopy;
            int head;
            const int query = query_of(n, row, head);
            const bool copies = shifts[i] < INFINITY;
            const int64_t query_place =
                item.batch * p.query_strides[0] + query * p.query_strides[1] + head * p.query_strides[2];
            const int64_t dout_place =
                ((int64_t(item.batch) * p.seqlen_q + query) * p.num_interval_heads * p.group_size + head) *
                Traits::kHeadDim;
            const char* query_row = static_cast<const char*>(p.query) + (copies ? query_place * 2 + piece * 16 : 0);
            const char* dout_row = static_cast<const char*>(p.dout) + (copies ? dout_place * 2 + piece * 16 : 0);
            const uint32_t place = base + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
            for (int k = 0; k < Traits::kPieces; ++k) {
                const uint32_t target = place + k * Traits::kBlockM * Traits::kRowBytes;
                copy_async(target + Traits::kQueryOffset, query_row + k * Traits::kRowBytes, copies ? 16 : 0);
                copy_async(target + Traits::kDoutOffset, dout_row + k * Traits::kRowBytes, copies ? 16 : 0);
            }
        }
        load_shifts(n + 1);
    }

    __device__ void start_facts(int n, float* target) const {
#pragma unroll
        for (int i = threadIdx.x; i < 4 * Traits::kBlockM; i += Traits::kThreads) {
            start_fact(n, i / Traits::kBlockM, i % Traits::kBlockM, target + i);
        }
    }

    __device__ void start_fact(int n, int kind, int row, float* target) const {
        int head;
        const int query = query_of(n, row, head);
        if (query >= end) {
            *target = kind == 0 ? INFINITY : kind == 3 ? __int_as_float(-1) : 0.f;
        } else if (kind == 3 && p.query_positions == nullptr) {
            *target = __int_as_float(p.query_start[item.batch] + query);
        } else {
            const int64_t log_totals = int64_t(p.batch) * p.num_interval_heads * p.group_size * p.seqlen_q;
            const void* source = kind == 0   ? p.stats + place(query, head)
                                 : kind == 1 ? p.stats + log_totals + place(query, head)
                                 : kind == 2 ? p.deltas + place(query, head)
                                             : static_cast<const void*>(
                                                   p.query_positions + int64_t(item.batch) * p.seqlen_q + query);
            copy_word_async(shared_address(target), source);
        }
    }
};

}  // namespace flash_dmattn
