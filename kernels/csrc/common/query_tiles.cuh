// How the rows of the forward are cut into tiles, in what order tiles are taken, and how their queries are loaded.
#pragma once

#include <cstdint>

#include "../params.h"
#include "fragments.cuh"
#include "shared_memory.cuh"

namespace flash_dmattn {

// Division by a number that is known before the launch.
struct Divisor {
    uint32_t divisor;
    uint32_t multiplier;
    uint32_t shift;

    explicit Divisor(int number) : divisor(number), shift(0) {
        while (uint64_t(1) << shift < divisor) ++shift;
        multiplier = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
    }

    // Returns dividend / divisor for a dividend from 0 to 2^31 - 1.
    __device__ __forceinline__ int divide(int dividend) const {
        return int((__umulhi(uint32_t(dividend), multiplier) + uint32_t(dividend)) >> shift);
    }
};

struct KernelParams : flash_dmattn_forward_params {
    static constexpr int kHeadsTogether = 8;  // their tiles alternate, so that long ones come before short ones

    Divisor by_tiles_together;
    Divisor by_last_heads;
    Divisor by_tiles_of_epoch;
    Divisor by_interval_heads;
    Divisor by_heads_of_kv_head;
    Divisor by_group;
    int num_lists;  // B * Hi
    int tiles_of_head;
    int num_query_tiles;
    uint32_t key_row_bytes;
    uint32_t value_row_bytes;
    float exponent_factor;  // of products, without softcap
    float exponent_cap;     // the softcap as an exponent of 2
    float tanh_factor;      // of products in tanh(x) = 2 / (1 + 2^(factor x)) - 1

    explicit KernelParams(const flash_dmattn_forward_params& p)
        : flash_dmattn_forward_params(p),
          by_tiles_together(p.num_epochs * p.tiles_per_epoch * kHeadsTogether),
          by_last_heads((p.batch * p.num_interval_heads - 1) % kHeadsTogether + 1),
          by_tiles_of_epoch(p.tiles_per_epoch),
          by_interval_heads(p.num_interval_heads),
          by_heads_of_kv_head(p.interval_heads_per_kv_head),
          by_group(p.group_size),
          num_lists(p.batch * p.num_interval_heads),
          tiles_of_head(p.num_epochs * p.tiles_per_epoch),
          num_query_tiles(num_lists * tiles_of_head),
          key_row_bytes(uint32_t(p.key_strides[1] * 2)),
          value_row_bytes(uint32_t(p.value_strides[1] * 2)),
          exponent_factor(p.softmax_scale * kLog2e),
          exponent_cap(p.softcap * kLog2e),
          tanh_factor(-2 * kLog2e * p.softmax_scale / p.softcap) {}

    // The row of the first query, where the others follow it.
    __device__ int start(int batch) const { return query_start[batch]; }
};

// A query tile: `num_tokens` queries from `first_query` on, of one interval head.
struct QueryTile {
    int list_head;  // batch * Hi + interval head
    int batch;
    int head;
    int epoch;
    int tile;
    int first_query;
    int num_tokens;  // at most 0 beyond the last query

    __device__ QueryTile(const KernelParams& p, int number) {
        constexpr int kHeads = KernelParams::kHeadsTogether;
        const int together = p.by_tiles_together.divide(number);
        const int rest = number - together * kHeads * p.tiles_of_head;
        const int num_heads = min(kHeads, p.num_lists - together * kHeads);
        const int rank = num_heads == kHeads ? rest / kHeads : p.by_last_heads.divide(rest);
        list_head = together * kHeads + rest - rank * num_heads;
        batch = p.by_interval_heads.divide(list_head);
        head = list_head - batch * p.num_interval_heads;
        const int tile_of_head = p.tiles_of_head - 1 - rank;  // late tiles of a causal head are long
        epoch = p.by_tiles_of_epoch.divide(tile_of_head);
        tile = tile_of_head - epoch * p.tiles_per_epoch;
        first_query = epoch * p.epoch_size + tile * p.tile_size;
        const int end = min(first_query + p.tile_size, min((epoch + 1) * p.epoch_size, p.seqlen_q));
        num_tokens = end - first_query;
    }

    __device__ int64_t list(const KernelParams& p) const { return int64_t(list_head) * p.num_epochs + epoch; }

    // The first entry of the list that the tile needs and the one after its last.
    template <typename Params>
    __device__ int2 stretch(const Params& p) const {
        if (p.entries == nullptr) {
            const int last_row = p.start(batch) + first_query + num_tokens - 1;
            return make_int2(0, min(last_row + 1, p.seqlen_k));
        }
        return reinterpret_cast<const int2*>(p.stretches)[list(p) * p.tiles_per_epoch + tile];
    }
};

// One row of a tile: the query and its head, if there are such.
struct QueryRow {
    bool exists;
    int query;
    int head;  // among all query heads

    __device__ QueryRow(const KernelParams& p, const QueryTile& tile, int row_of_tile) {
        const int token = p.by_group.divide(row_of_tile);
        exists = token < tile.num_tokens;
        query = tile.first_query + token;
        head = tile.head * p.group_size + row_of_tile - token * p.group_size;
    }

    template <typename Params>
    __device__ int row(const Params& p, int batch) const {
        if (!exists) return -1;
        return p.query_positions == nullptr ? p.start(batch) + query
                                            : p.query_positions[int64_t(batch) * p.seqlen_q + query];
    }
};

// Starts to copy the query rows of the warp (16 of its warpgroup's 64) to shared memory.
template <typename Traits>
__device__ __forceinline__ void copy_query(
    uint32_t target, const KernelParams& p, const QueryTile& tile, int first_row, int lane) {
    const int piece = lane % Traits::kLanesPerRow;
    const char* base = static_cast<const char*>(p.query) + int64_t(tile.batch) * p.query_strides[0] * 2 + piece * 16;
#pragma unroll
    for (int first = 0; first < 16; first += Traits::kRowsPerCopy) {
        const int row = first_row + first + lane / Traits::kLanesPerRow;
        const QueryRow query(p, tile, row);
        const int64_t offset = query.exists ? query.query * p.query_strides[1] + query.head * p.query_strides[2] : 0;
        const uint32_t place = target + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
        for (int i = 0; i < Traits::kPieces; ++i) {
            copy_async(
                place + i * Traits::kBlockM * Traits::kRowBytes, base + offset * 2 + i * Traits::kRowBytes,
                query.exists ? 16 : 0);
        }
    }
}

}  // namespace flash_dmattn
