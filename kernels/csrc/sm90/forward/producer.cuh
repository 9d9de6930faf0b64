// The producer warpgroup of the sm90 forward: walks the key lists and gathers rows of K and V into shared memory.
#pragma once

#include <cmath>

#include "schedule.cuh"

namespace flash_dmattn::sm90 {

// A key tile on its way to shared memory: the lane's keys, -1 for none, and their biases.
template <typename Traits>
struct KeyTile {
    bool exists;
    bool may_be_partial;  // some of its keys may be invisible to some of the queries
    int list_head;
    int first_row;
    int last_row;
    int keys[Traits::kKeysPerLane];
    float biases[Traits::kKeysPerLane];
};

template <typename Traits>
struct Intervals {
    int birth[Traits::kKeysPerLane];
    int death[Traits::kKeysPerLane];
};

// What an importance adds to an exponent of 2; NaN counts as -inf.
__device__ __forceinline__ float bias_of(float importance) {
    constexpr float kLargest = 2.3e38f;  // times log2(e) it is still finite
    return importance > -INFINITY ? fminf(importance, kLargest) * kLog2e : -INFINITY;
}

// Walks the key tiles of all query tiles of the block.
template <typename Traits>
struct KeyWalk {
    const Sm90Params& p;
    BlockSchedule schedule;
    int narrow;
    int remaining = 0;
    int position;
    int end;
    int num_dying;
    int num_alive;
    int list_head;
    int first_row;
    int last_row;
    int64_t list;

    __device__ explicit KeyWalk(const Sm90Params& params) : p(params) {}

    __device__ KeyTile<Traits> next(int warp, int lane) {
        KeyTile<Traits> tile;
        if (remaining == 0) {
            const int number = schedule.next(p);
            tile.exists = number >= 0;
            if (!tile.exists) return tile;
            enter(QueryTile(p, number), lane);
        }
        tile.exists = true;
        tile.list_head = list_head;
        tile.first_row = first_row;
        tile.last_row = last_row;
        const int stop = narrow > 0 ? position + narrow : end;
        const int next_position = narrow > 0 ? stop : position + Traits::kBlockN;
        tile.may_be_partial = position < num_dying || next_position > num_alive;
#pragma unroll
        for (int i = 0; i < Traits::kKeysPerLane; ++i) {
            const int key_of_warp = i * 32 + lane;
            const int place = position + warp * Traits::kKeysPerWarp + key_of_warp;
            const bool is_listed = key_of_warp < Traits::kKeysPerWarp && place < stop;
            tile.keys[i] = is_listed ? p.entries == nullptr ? place : __ldg(p.entries + list + place) : -1;
            tile.biases[i] = is_listed ? p.biases == nullptr ? 0.f : __ldg(p.biases + list + place) : -INFINITY;
            if (p.entries == nullptr) tile.biases[i] = bias_of(tile.biases[i]);
        }
        narrow = 0;
        position = next_position;
        --remaining;
        return tile;
    }

    __device__ void enter(const QueryTile& queries, int lane) {
        const int2 stretch = queries.stretch(p);
        const KeyCut<Traits> cut(stretch);
        narrow = cut.narrow;
        remaining = cut.num_tiles + (narrow > 0);
        position = stretch.x;
        end = stretch.y;
        list = queries.list(p) * p.capacity;
        list_head = queries.list_head;
        if (p.query_positions == nullptr) {
            first_row = p.start(queries.batch) + queries.first_query;
            last_row = first_row + queries.num_tokens - 1;
        } else {
            first_row = INT32_MAX;
            last_row = -1;
            for (int token = lane; token < queries.num_tokens; token += 32) {
                const int row = p.query_positions[int64_t(queries.batch) * p.seqlen_q + queries.first_query + token];
                if (row >= 0) first_row = min(first_row, row);
                last_row = max(last_row, row);
            }
            first_row = __reduce_min_sync(~0u, first_row);
            last_row = __reduce_max_sync(~0u, last_row);
        }
        num_dying = p.entries == nullptr ? 0 : p.sections[queries.list(p) * 3];
        num_alive = p.entries == nullptr ? first_row + 1 : p.sections[queries.list(p) * 3 + 1];
    }
};

// Loads what is compared with the rows. Keys that weigh nothing become none.
template <typename Traits>
__device__ __forceinline__ Intervals<Traits> load_intervals(const Sm90Params& p, KeyTile<Traits>& tile) {
    Intervals<Traits> intervals;
    const int64_t row = int64_t(tile.list_head) * p.seqlen_k;
#pragma unroll
    for (int i = 0; i < Traits::kKeysPerLane; ++i) {
        if (tile.biases[i] == -INFINITY) tile.keys[i] = -1;
        intervals.birth[i] = p.birth == nullptr ? tile.keys[i] : 0;
        intervals.death[i] = INT32_MAX;
        if (p.birth != nullptr && tile.may_be_partial && tile.keys[i] >= 0) {
            intervals.birth[i] = __ldg(p.birth + row + tile.keys[i]);
            intervals.death[i] = __ldg(p.death + row + tile.keys[i]);
        }
    }
    return intervals;
}

// Copies the rows of the warp's keys to their places in a tile of shared memory; rows of no key become zero.
template <typename Traits>
__device__ __forceinline__ void gather(
    uint32_t target, const void* matrix, const int64_t (&strides)[3], uint32_t row_bytes, const Sm90Params& p,
    const KeyTile<Traits>& tile, int warp, int lane) {
    const int batch = p.by_interval_heads.divide(tile.list_head);
    const int head = p.by_heads_of_kv_head.divide(tile.list_head - batch * p.num_interval_heads);
    const int piece = lane % Traits::kLanesPerRow;
    const int row_of_copy = lane / Traits::kLanesPerRow;
    const char* base = static_cast<const char*>(matrix) + (batch * strides[0] + head * strides[2]) * 2 + piece * 16;
#pragma unroll
    for (int first = 0; first < Traits::kKeysPerWarp; first += Traits::kRowsPerCopy) {
        const int key = __shfl_sync(~0u, tile.keys[first / 32], first % 32 + row_of_copy);
        const char* source = base + uint64_t(uint32_t(max(key, 0))) * row_bytes;
        const int bytes = key >= 0 ? 16 : 0;
        const int row = warp * Traits::kKeysPerWarp + first + row_of_copy;
        const uint32_t place = target + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
        for (int i = 0; i < Traits::kPieces; ++i) {
            copy_async(place + i * Traits::kBlockN * Traits::kRowBytes, source + i * Traits::kRowBytes, bytes);
        }
    }
}

// Writes the biases of a tile, its births and deaths where they may be needed, and whether they are.
template <typename Traits>
__device__ __forceinline__ void store_facts(
    char* smem, int stage, const KeyTile<Traits>& tile, const Intervals<Traits>& intervals, int warp, int lane) {
    float* bias = reinterpret_cast<float*>(smem + Traits::kBiasOffset) + stage * Traits::kBlockN;
    int* birth = reinterpret_cast<int*>(smem + Traits::kBirthOffset) + stage * Traits::kBlockN;
    int* death = reinterpret_cast<int*>(smem + Traits::kDeathOffset) + stage * Traits::kBlockN;
    bool is_partial = false;
#pragma unroll
    for (int i = 0; i < Traits::kKeysPerLane; ++i) {
        const int key_of_warp = i * 32 + lane;
        const int place = warp * Traits::kKeysPerWarp + key_of_warp;
        if (key_of_warp < Traits::kKeysPerWarp) {
            bias[place] = tile.biases[i];
            if (tile.may_be_partial) {
                birth[place] = intervals.birth[i];
                death[place] = intervals.death[i];
                is_partial |=
                    tile.keys[i] >= 0 && (intervals.birth[i] > tile.first_row || intervals.death[i] <= tile.last_row);
            }
        }
    }
    is_partial = __any_sync(~0u, is_partial);
    if (lane == 0) reinterpret_cast<int*>(smem + Traits::kPartialOffset)[stage * 4 + warp] = is_partial;
}

template <typename Traits>
__device__ __forceinline__ void produce(const Sm90Params& p, char* smem) {
    const SharedMemory<Traits> shared{shared_address(smem)};
    const int warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    KeyWalk<Traits> walk(p);
    Ring<Traits::kStages> key_ring, value_ring;

    const auto copy_value = [&](const KeyTile<Traits>& tile) {
        barrier_wait(shared.value_empty(value_ring.stage), value_ring.phase ^ 1);
        gather<Traits>(
            shared.value(value_ring.stage), p.value, p.value_strides, p.value_row_bytes, p, tile, warp, lane);
        copy_async_arrive(shared.value_full(value_ring.stage));
        value_ring.advance();
    };

    // Keys and biases are read two tiles ahead, intervals one tile ahead; V follows K by one tile.
    KeyTile<Traits> previous, tile = walk.next(warp, lane);
    previous.exists = false;
    Intervals<Traits> intervals;
    if (tile.exists) intervals = load_intervals(p, tile);
    KeyTile<Traits> following = tile;
    if (tile.exists) following = walk.next(warp, lane);
    while (tile.exists) {
        barrier_wait(shared.key_empty(key_ring.stage), key_ring.phase ^ 1);
        gather<Traits>(shared.key(key_ring.stage), p.key, p.key_strides, p.key_row_bytes, p, tile, warp, lane);
        store_facts<Traits>(smem, key_ring.stage, tile, intervals, warp, lane);
        copy_async_arrive(shared.key_full(key_ring.stage));
        barrier_arrive(shared.key_full(key_ring.stage));
        key_ring.advance();
        if (previous.exists) copy_value(previous);
        previous = tile;
        tile = following;
        if (tile.exists) {
            intervals = load_intervals(p, tile);
            following = walk.next(warp, lane);
        }
    }
    if (previous.exists) copy_value(previous);
    copy_async_wait_all();
}

}  // namespace flash_dmattn::sm90
