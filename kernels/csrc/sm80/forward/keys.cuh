// The keys of the sm80 forward: which they are, and their way into shared memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "../../common/query_tiles.cuh"
#include "shapes.h"

namespace flash_dmattn::sm80 {

template <typename Element_, int kHeadDim_, typename Shape>
struct ForwardTraits : Shape {
    using Element = Element_;
    using Shape::kBlockM;
    using Shape::kBlockN;
    using Shape::kStages;
    using Shape::kWarps;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kRowTiles = kBlockM / (kWarps * 16);  // of 16 query rows, in a warp

    // A matrix lies in shared memory as pieces of kRowBytes columns, each piece with all its rows.
    static constexpr int kRowBytes = kHeadDim % 64 == 0 ? 128 : 64;
    static constexpr int kPieces = kHeadDim * 2 / kRowBytes;
    static constexpr int kLanesPerRow = kRowBytes / 16;
    static constexpr int kRowsPerCopy = 32 / kLanesPerRow;
    static constexpr int kKeysPerWarp = kBlockN / kWarps;

    // Numbers and biases of keys are there kStages tiles before the keys, births and deaths together with them.
    static constexpr int kEntrySlots = 2 * kStages;
    static constexpr int kTileBytes = kBlockN * kHeadDim * 2;
    static constexpr int kKeyOffset = kBlockM * kHeadDim * 2;
    static constexpr int kValueOffset = kKeyOffset + kStages * kTileBytes;
    static constexpr int kEntryOffset = kValueOffset + kStages * kTileBytes;
    static constexpr int kIntervalOffset = kEntryOffset + kEntrySlots * kBlockN * 8;
    static constexpr int kSharedBytes = kIntervalOffset + kStages * kBlockN * 8;

    static_assert(kBlockM % (kWarps * 16) == 0 && kBlockN % 16 == 0 && kKeysPerWarp % kRowsPerCopy == 0);
    static_assert(kTileBytes % 1024 == 0 && kKeyOffset % 1024 == 0);
};

// The stretch of a key list that a query tile attends to, in key tiles of kBlockN, and their places in shared memory.
template <typename Traits>
struct KeyTiles {
    static constexpr int kBlockN = Traits::kBlockN;

    const KernelParams& p;
    char* smem;
    int64_t list;   // its first entry among those of all lists
    int64_t lane;   // the first key of the batch row and interval head, in births and deaths
    int begin;      // the first entry
    int end;        // the one after the last
    int num_dying;  // entries before it may die while the epoch lasts
    int num_alive;  // entries from it on may be born in the epoch
    const char* keys;
    const char* values;

    __device__ KeyTiles(const KernelParams& params, const QueryTile& queries, char* shared) : p(params), smem(shared) {
        const int2 stretch = queries.stretch(p);
        begin = stretch.x;
        end = stretch.y;
        list = queries.list(p) * p.capacity;
        lane = int64_t(queries.list_head) * p.seqlen_k;
        if (p.entries == nullptr) {
            num_dying = 0;
            num_alive = p.query_start[queries.batch] + queries.first_query + 1;
        } else {
            num_dying = p.sections[queries.list(p) * 3];
            num_alive = p.sections[queries.list(p) * 3 + 1];
        }
        const int head = p.by_heads_of_kv_head.divide(queries.head);
        const int piece = threadIdx.x % Traits::kLanesPerRow * 16;
        keys = static_cast<const char*>(p.key) + piece +
               (queries.batch * p.key_strides[0] + head * p.key_strides[2]) * 2;
        values = static_cast<const char*>(p.value) + piece +
                 (queries.batch * p.value_strides[0] + head * p.value_strides[2]) * 2;
    }

    __device__ int count() const { return (end - begin + kBlockN - 1) / kBlockN; }

    // Whether some keys of the tile may be invisible to some rows.
    __device__ bool may_be_partial(int tile) const {
        const int position = begin + tile * kBlockN;
        return position < num_dying || position + kBlockN > num_alive;
    }

    // -1 for none.
    __device__ int* numbers(int tile) const {
        return reinterpret_cast<int*>(smem + Traits::kEntryOffset) + tile % Traits::kEntrySlots * 2 * kBlockN;
    }
    // -inf for keys that weigh nothing, and for none.
    __device__ float* biases(int tile) const { return reinterpret_cast<float*>(numbers(tile) + kBlockN); }
    // Of tiles that may be partial.
    __device__ int* births(int tile) const {
        return reinterpret_cast<int*>(smem + Traits::kIntervalOffset) + tile % Traits::kStages * 2 * kBlockN;
    }
    __device__ int* deaths(int tile) const { return births(tile) + kBlockN; }

    // Starts to copy numbers and biases.
    __device__ void start_entries(int tile) const {
#pragma unroll
        for (int first = 0; first < 2 * kBlockN; first += Traits::kThreads) {
            const int i = first + threadIdx.x;
            if (2 * kBlockN % Traits::kThreads != 0 && i >= 2 * kBlockN) break;
            const bool is_bias = i >= kBlockN;
            const int place = begin + tile * kBlockN + i - (is_bias ? kBlockN : 0);
            const void* source = is_bias ? static_cast<const void*>(p.biases) : p.entries;
            int* target = numbers(tile) + i;
            if (place < end && source != nullptr) {
                copy_word_async(shared_address(target), static_cast<const int*>(source) + list + place);
            } else if (place < end) {
                *target = is_bias ? 0 : place;
            } else {
                *target = is_bias ? __float_as_int(-INFINITY) : -1;
            }
        }
    }

    // Starts to copy births and deaths, if they may be needed, of keys whose numbers are there.
    __device__ void start_intervals(int tile) const {
        if (!may_be_partial(tile)) return;
#pragma unroll
        for (int first = 0; first < 2 * kBlockN; first += Traits::kThreads) {
            const int i = first + threadIdx.x;
            if (2 * kBlockN % Traits::kThreads != 0 && i >= 2 * kBlockN) break;
            const bool is_death = i >= kBlockN;
            const int number = numbers(tile)[i - (is_death ? kBlockN : 0)];
            int* target = births(tile) + i;
            if (number >= 0 && p.birth != nullptr) {
                copy_word_async(shared_address(target), (is_death ? p.death : p.birth) + lane + number);
            } else {
                *target = is_death ? INT32_MAX : number;
            }
        }
    }

    __device__ void start_keys(int tile) const { gather(Traits::kKeyOffset, keys, p.key_row_bytes, tile); }
    __device__ void start_values(int tile) const { gather(Traits::kValueOffset, values, p.value_row_bytes, tile); }

    // Starts to copy rows whose numbers and biases are there; rows that weigh nothing become zero.
    __device__ void gather(int offset, const char* matrix, uint32_t row_bytes, int tile) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int first_row = warp * Traits::kKeysPerWarp + lane / Traits::kLanesPerRow;
        const uint32_t stage = shared_address(smem) + offset + tile % Traits::kStages * Traits::kTileBytes;
#pragma unroll
        for (int i = 0; i < Traits::kKeysPerWarp; i += Traits::kRowsPerCopy) {
            const int row = first_row + i;
            const int number = biases(tile)[row] == -INFINITY ? -1 : numbers(tile)[row];
            const char* source = matrix + uint64_t(uint32_t(max(number, 0))) * row_bytes;
            const uint32_t target = stage + row * Traits::kRowBytes +
                                    swizzled_piece<Traits::kRowBytes>(row, lane % Traits::kLanesPerRow) * 16;
#pragma unroll
            for (int piece = 0; piece < Traits::kPieces; ++piece) {
                copy_async(
                    target + piece * kBlockN * Traits::kRowBytes, source + piece * Traits::kRowBytes,
                    number >= 0 ? 16 : 0);
            }
        }
    }
};

}  // namespace flash_dmattn::sm80
