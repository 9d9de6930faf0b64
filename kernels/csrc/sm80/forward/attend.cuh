// What a block of the sm80 forward does: attends one query tile to its stretch of a key list.
#pragma once

#include "../../common/softmax.cuh"
#include "../mma.cuh"
#include "keys.cuh"

namespace flash_dmattn::sm80 {

// scores = query key^T; the warp's rows x kBlockN. query, key: addresses of the lane's rows for the first 16 columns.
template <typename Traits>
__device__ __forceinline__ void score(
    float (&scores)[Traits::kRowTiles][Traits::kBlockN / 2], uint32_t query, uint32_t key) {
    using Element = typename Traits::Element;
    constexpr int kRowBytes = Traits::kRowBytes;
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < Traits::kBlockN / 2; ++i) scores[m][i] = 0.f;
    }
#pragma unroll
    for (int depth = 0; depth < Traits::kHeadDim / 16; ++depth) {
        uint32_t queries[Traits::kRowTiles][4];
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) {
            load_matrices(
                queries[m], advance_columns<kRowBytes, Traits::kBlockM>(query, depth) + m * 16 * kRowBytes);
        }
#pragma unroll
        for (int n = 0; n < Traits::kBlockN / 16; ++n) {
            uint32_t keys[4];
            load_matrices(keys, advance_columns<kRowBytes, Traits::kBlockN>(key, depth) + n * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < Traits::kRowTiles; ++m) {
                multiply<Element>(scores[m] + n * 8, queries[m], keys);
                multiply<Element>(scores[m] + n * 8 + 4, queries[m], keys + 2);
            }
        }
    }
}

// acc += weights value. value: address of the lane's row for the first 16 columns.
template <typename Traits>
__device__ __forceinline__ void weigh_values(
    float (&acc)[Traits::kRowTiles][Traits::kHeadDim / 2],
    const uint32_t (&weights)[Traits::kRowTiles][Traits::kBlockN / 16][4], uint32_t value) {
    using Element = typename Traits::Element;
    constexpr int kRowBytes = Traits::kRowBytes;
#pragma unroll
    for (int depth = 0; depth < Traits::kBlockN / 16; ++depth) {
#pragma unroll
        for (int n = 0; n < Traits::kHeadDim / 16; ++n) {
            uint32_t values[4];
            load_transposed(values, advance_columns<kRowBytes, Traits::kBlockN>(value, n) + depth * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < Traits::kRowTiles; ++m) {
                multiply<Element>(acc[m] + n * 8, weights[m][depth], values);
                multiply<Element>(acc[m] + n * 8 + 4, weights[m][depth], values + 2);
            }
        }
    }
}

// The rows of a lane, and the first and last of its warp.
template <typename Traits>
struct Rows {
    int rows[Traits::kRowTiles][2];  // -1 sees nothing
    int first = INT32_MAX;
    int last = -1;

    __device__ Rows(const KernelParams& p, const QueryTile& tile, int first_row, int lane) {
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = QueryRow(p, tile, first_row + m * 16 + r * 8 + lane / 4).row(p, tile.batch);
                rows[m][r] = row;
                if (row >= 0) first = min(first, row);
                last = max(last, row);
            }
        }
        first = __reduce_min_sync(~0u, first);
        last = __reduce_max_sync(~0u, last);
    }

    // Whether a row of the warp does not see a key of the tile.
    __device__ bool miss_any(const KeyTiles<Traits>& tiles, int tile, int lane) const {
        bool any = false;
        if (tiles.may_be_partial(tile)) {
#pragma unroll
            for (int i = 0; i < Traits::kBlockN; i += 32) {
                any |= tiles.births(tile)[i + lane] > first || tiles.deaths(tile)[i + lane] <= last;
            }
        }
        return __any_sync(~0u, any);
    }
};

template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void attend(const KernelParams& p, const QueryTile& queries, char* smem) {
    constexpr int kStages = Traits::kStages, kRowBytes = Traits::kRowBytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = warp * Traits::kRowTiles * 16;  // of the warp
    const KeyTiles<Traits> tiles(p, queries, smem);
    const int count = tiles.count();
    const uint32_t base = shared_address(smem);

    // The copies of a thread form groups, in this order: queries and entries, keys 0, values 0, keys 1, ...
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) copy_query<Traits>(base, p, queries, first_row + m * 16, lane);
#pragma unroll
    for (int tile = 0; tile < 2 * kStages - 1; ++tile) tiles.start_entries(tile);
    copy_async_wait_all();
    __syncthreads();
    const auto start_keys = [&](int tile) {
        if (tile < count) {
            tiles.start_keys(tile);
            tiles.start_intervals(tile);
        }
        copy_async_commit();
    };
    const auto start_values = [&](int tile) {
        if (tile < count) tiles.start_values(tile);
        tiles.start_entries(tile + kStages);
        copy_async_commit();
    };
#pragma unroll
    for (int tile = 0; tile < kStages; ++tile) {
        start_keys(tile);
        if (tile < kStages - 1) start_values(tile);
    }

    const Rows<Traits> rows(p, queries, first_row, lane);
    const uint32_t query = row_address<kRowBytes>(base, first_row + lane % 16, lane / 16);
    const uint32_t key = row_address<kRowBytes>(base + Traits::kKeyOffset, lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const uint32_t value = row_address<kRowBytes>(base + Traits::kValueOffset, lane % 16, lane / 16);
    RunningSoftmax softmax[Traits::kRowTiles];
    float acc[Traits::kRowTiles][Traits::kHeadDim / 2];
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < Traits::kHeadDim / 2; ++i) acc[m][i] = 0.f;
    }

    for (int tile = 0; tile < count; ++tile) {
        const int stage = tile % kStages * Traits::kTileBytes;
        copy_async_wait<2 * kStages - 2>();
        __syncthreads();  // the tile's keys are there; nobody reads values of the tile before any more
        start_values(tile + kStages - 1);

        float scores[Traits::kRowTiles][Traits::kBlockN / 2];
        uint32_t weights[Traits::kRowTiles][Traits::kBlockN / 16][4];
        score<Traits>(scores, query, key + stage);
        const bool is_partial = rows.miss_any(tiles, tile, lane);
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) {
            add_bias<kHasSoftcap>(scores[m], p, tiles.biases(tile), lane);
            if (is_partial) hide_invisible(scores[m], tiles.births(tile), tiles.deaths(tile), rows.rows[m], lane);
            if (softmax[m].weigh(scores[m])) rescale_rows(acc[m], softmax[m].rescale);
#pragma unroll
            for (int i = 0; i < Traits::kBlockN / 4; ++i) {
                weights[m][i / 4][i % 4] = pack<typename Traits::Element>(scores[m][2 * i], scores[m][2 * i + 1]);
            }
        }

        copy_async_wait<2 * kStages - 2>();
        __syncthreads();  // its values are there; nobody reads its keys any more
        start_keys(tile + kStages);
        weigh_values<Traits>(acc, weights, value + stage);
    }

#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
        store_rows<Traits>(p, queries, acc[m], softmax[m], rows.rows[m], first_row + m * 16, lane);
    }
}

}  // namespace flash_dmattn::sm80
