// The work of the sm80 backward: a tile of an epoch's keys and the query tiles that see some of it, and
// their way into shared memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "../../common/fragments.cuh"
#include "../../common/shared_memory.cuh"
#include "shapes.h"

namespace flash_dmattn::sm80 {

struct BackwardKernelParams : BackwardParams {
    EpochRange epochs;
    int key_tiles;          // of the longest list
    uint32_t group_factor;  // rows of a query tile times this, over 2^16, are tokens
    int query_row_bytes;    // from token to token
    int query_head_bytes;
    int dout_row_bytes;
    int64_t num_rows;  // of all query heads
    float exponent_factor;  // of products, without softcap
    float exponent_cap;     // the softcap as an exponent of 2
    float tanh_factor;      // of products in tanh(x) = 2 / (1 + 2^(factor x)) - 1

    BackwardKernelParams(const BackwardParams& p, EpochRange range, int block_n)
        : BackwardParams(p),
          epochs(range),
          key_tiles((p.capacity + block_n - 1) / block_n),
          group_factor(((1 << 16) + p.group_size - 1) / p.group_size),
          query_row_bytes(int(p.query_strides[1] * 2)),
          query_head_bytes(int(p.query_strides[2] * 2)),
          dout_row_bytes(p.num_interval_heads * p.group_size * p.head_dim * 2),
          num_rows(int64_t(p.batch) * p.num_interval_heads * p.group_size * p.seqlen_q),
          exponent_factor(p.softmax_scale * kLog2e),
          exponent_cap(p.softcap * kLog2e),
          tanh_factor(-2 * kLog2e * p.softmax_scale / p.softcap) {}
};

template <typename Element_, int kHeadDim_, typename Shape>
struct BackwardTraits : Shape {
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
struct WorkItem {
    int list_head;  // batch * Hi + interval head
    int batch;
    int epoch;
    int offset;  // of the keys in the list
    int num_keys;
    int first_tile;
    int num_tiles = 0;
    bool is_partial;  // some of its keys may be invisible to some of the queries

    __device__ WorkItem(const BackwardKernelParams& p, int number, int block_n, int lane) {
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

    __device__ int64_t list(const BackwardParams& p) const { return int64_t(list_head) * p.num_epochs + epoch; }

    // The place of the epoch's sums of dquery.
    __device__ int64_t sums(const BackwardKernelParams& p) const {
        return int64_t(list_head) * p.epochs_at_once + epoch - p.epochs.first;
    }

    // The number of the tile's i-th key, -1 for none and for one that weighs nothing; reads its bias.
    __device__ int key(const BackwardParams& p, int i, float& bias) const {
        bias = -INFINITY;
        if (i >= num_keys) return -1;
        const int64_t first = p.entries == nullptr ? int64_t(list_head) * p.seqlen_k : list(p) * p.capacity;
        bias = p.biases == nullptr ? 0.f : __ldg(p.biases + first + offset + i);
        if (bias == -INFINITY) return -1;
        return p.entries == nullptr ? offset + i : __ldg(p.entries + first + offset + i);
    }

private:
    __device__ void meet_in_order(const BackwardKernelParams& p, int block_n) {
        const int start = p.query_start[batch];
        const int first_query = epoch * p.epoch_size;
        const int num_queries = min(p.epoch_size, p.seqlen_q - first_query);
        num_keys = min(block_n, min(p.seqlen_k, start + first_query + num_queries) - offset);
        if (num_keys <= 0) return;
        first_tile = max(0, offset - start - first_query) / p.tile_size;
        num_tiles = (num_queries + p.tile_size - 1) / p.tile_size - first_tile;
        is_partial = offset + num_keys - 1 > start + first_query + first_tile * p.tile_size;
    }

    __device__ void meet_listed(const BackwardKernelParams& p, int block_n, int lane) {
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
    uint32_t target, const void* matrix, const int64_t (&strides)[3], const BackwardKernelParams& p,
    const WorkItem& item) {
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

    const BackwardKernelParams& p;
    char* smem;
    const char* query;  // of the epoch's batch row and first head, from token 0 on
    const char* dout;
    const float* stats;
    const float* deltas;
    const int* positions;  // of the batch row, or null
    int start_row;         // of token 0, without positions
    int first;             // token of the item's first tile
    int end;               // the token after the epoch's last
    int num_tiles;
    float shifts[kCopies];  // of the rows that this thread copies of the next tile

    __device__ QueryTiles(const BackwardKernelParams& params, const WorkItem& item, char* shared)
        : p(params), smem(shared), positions(nullptr), start_row(0), num_tiles(item.num_tiles) {
        const int first_head = (item.list_head - item.batch * p.num_interval_heads) * p.group_size;
        const int num_heads = p.num_interval_heads * p.group_size;
        const int64_t place = (int64_t(item.batch) * num_heads + first_head) * p.seqlen_q;
        query = static_cast<const char*>(p.query) + (item.batch * p.query_strides[0] + first_head * p.query_strides[2]) * 2;
        dout = static_cast<const char*>(p.dout) +
               (int64_t(item.batch) * p.seqlen_q * num_heads + first_head) * (Traits::kHeadDim * 2);
        stats = p.stats + place;
        deltas = p.deltas + place;
        if (p.query_positions != nullptr) {
            positions = p.query_positions + int64_t(item.batch) * p.seqlen_q;
        } else {
            start_row = __ldg(p.query_start + item.batch);
        }
        first = item.epoch * p.epoch_size + item.first_tile * p.tile_size;
        end = min((item.epoch + 1) * p.epoch_size, p.seqlen_q);
        const int rows = rows_from(first), first_row = threadIdx.x / Traits::kLanesPerRow;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) shifts[i] = load_shift(first_row + i * kRowsOfStep, rows, first);
    }

    // Rows of the tile from this token on that exist.
    __device__ int rows_from(int token) const { return min(p.tile_size, end - token) * p.group_size; }

    __device__ int token_of(int row) const { return row * p.group_factor >> 16; }

    __device__ float load_shift(int row, int rows, int tile) const {
        const int token = token_of(row);
        return row < rows ? __ldg(stats + (row - token * p.group_size) * p.seqlen_q + (tile + token)) : INFINITY;
    }

    __device__ float* facts(int stage) const {
        return reinterpret_cast<float*>(smem + Traits::kFactsOffset + stage * Traits::kFactBytes);
    }

    __device__ void start(int n, int stage) {
        const int thread = compute_here(threadIdx.x);
        const int tile = first + n * p.tile_size;
        start_facts(tile, thread, facts(stage));
        const int piece = thread % Traits::kLanesPerRow, first_row = thread / Traits::kLanesPerRow;
        const uint32_t base = shared_address(smem) + stage * Traits::kQueryBytes;
        const int next_rows = n + 1 < num_tiles ? rows_from(tile + p.tile_size) : 0;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const int row = first_row + i * kRowsOfStep;
            const int bytes = shifts[i] < INFINITY ? 16 : 0;
            // A row that is not read may lie anywhere: its address is the first one's.
            const int token = token_of(row), head = bytes ? row - token * p.group_size : 0;
            const int64_t place = bytes ? tile + token : 0;
            const char* query_row = query + place * p.query_row_bytes + int64_t(head) * p.query_head_bytes + piece * 16;
            const char* dout_row = dout + place * p.dout_row_bytes + (head * Traits::kHeadDim * 2 + piece * 16);
            const uint32_t target = base + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
            for (int k = 0; k < Traits::kPieces; ++k) {
                const uint32_t place_of_piece = target + k * Traits::kBlockM * Traits::kRowBytes;
                copy_async(place_of_piece + Traits::kQueryOffset, query_row + k * Traits::kRowBytes, bytes);
                copy_async(place_of_piece + Traits::kDoutOffset, dout_row + k * Traits::kRowBytes, bytes);
            }
            shifts[i] = load_shift(row, next_rows, tile + p.tile_size);
        }
    }

private:
    static constexpr int kRowsOfStep = Traits::kWarps * Traits::kRowsPerCopy;

    __device__ void start_facts(int tile, int thread, float* target) const {
        const int rows = rows_from(tile);
#pragma unroll
        for (int i = 0; i < 4 * Traits::kBlockM / Traits::kThreads; ++i) {
            const int number = thread + i * Traits::kThreads;
            const int kind = number / Traits::kBlockM, row = number % Traits::kBlockM;
            const int token = token_of(row);
            if (row >= rows) {
                target[number] = kind == 0 ? INFINITY : kind == 3 ? __int_as_float(-1) : 0.f;
            } else if (kind == 3) {
                if (positions != nullptr) {
                    copy_word_async(shared_address(target + number), positions + tile + token);
                } else {
                    target[number] = __int_as_float(start_row + tile + token);
                }
            } else {
                const float* source = kind == 0 ? stats : kind == 1 ? stats + p.num_rows : deltas;
                const int offset = (row - token * p.group_size) * p.seqlen_q + (tile + token);
                copy_word_async(shared_address(target + number), source + offset);
            }
        }
    }
};

}  // namespace flash_dmattn::sm80
