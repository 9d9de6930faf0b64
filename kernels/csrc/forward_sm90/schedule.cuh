// What producer and consumers of the sm_90a forward agree on: shapes, the layout of shared memory, the order of work.
#pragma once

#include <cstdint>

#include "../forward_sm90.h"
#include "../hopper.cuh"

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

struct KernelParams : ForwardParams {
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

    explicit KernelParams(const ForwardParams& p)
        : ForwardParams(p),
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
};

template <typename Element_, int kHeadDim_>
struct ForwardTraits : ForwardShape<kHeadDim_> {
    using Element = Element_;
    using Shape = ForwardShape<kHeadDim_>;
    using Shape::kBlockM;
    using Shape::kBlockN;
    using Shape::kStages;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kConsumers = kBlockM / 64;  // warpgroups
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
    static constexpr int kNarrow = 32;  // keys of a short first tile

    // A matrix lies in shared memory as pieces of kRowBytes columns, each piece with all its rows.
    static constexpr int kRowBytes = kHeadDim % 64 == 0 ? 128 : 64;
    static constexpr int kPieces = kHeadDim * 2 / kRowBytes;
    static constexpr int kDepthsPerPiece = kRowBytes / 32;  // a product is 16 elements deep
    static constexpr int kLanesPerRow = kRowBytes / 16;
    static constexpr int kRowsPerCopy = 32 / kLanesPerRow;
    static constexpr int kKeysPerWarp = kBlockN / 4;
    static constexpr int kKeysPerLane = (kKeysPerWarp + 31) / 32;

    static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
    static constexpr int kTileBytes = kBlockN * kHeadDim * 2;
    static constexpr int kKeyOffset = kQueryBytes;
    static constexpr int kValueOffset = kKeyOffset + kStages * kTileBytes;
    static constexpr int kBiasOffset = kValueOffset + kStages * kTileBytes;
    static constexpr int kBirthOffset = kBiasOffset + kStages * kBlockN * 4;
    static constexpr int kDeathOffset = kBirthOffset + kStages * kBlockN * 4;
    static constexpr int kPartialOffset = kDeathOffset + kStages * kBlockN * 4;
    static constexpr int kBarrierOffset = kPartialOffset + kStages * 16;
    static constexpr int kSharedBytes = kBarrierOffset + 4 * kStages * 8;

    static_assert(kBlockM % 64 == 0 && kBlockN % 16 == 0 && kBlockN > kNarrow);
    static_assert(kKeysPerWarp % kRowsPerCopy == 0);
    static_assert(kTileBytes % 1024 == 0 && kQueryBytes % 1024 == 0);
    static_assert(kSharedBytes <= 232448);
};

// Addresses in shared memory of the stages and of their barriers.
template <typename Traits>
struct SharedMemory {
    uint32_t base;

    __device__ uint32_t key(int stage) const { return base + Traits::kKeyOffset + stage * Traits::kTileBytes; }
    __device__ uint32_t value(int stage) const { return base + Traits::kValueOffset + stage * Traits::kTileBytes; }
    __device__ uint32_t key_full(int stage) const { return barrier(stage); }
    __device__ uint32_t key_empty(int stage) const { return barrier(Traits::kStages + stage); }
    __device__ uint32_t value_full(int stage) const { return barrier(2 * Traits::kStages + stage); }
    __device__ uint32_t value_empty(int stage) const { return barrier(3 * Traits::kStages + stage); }
    __device__ uint32_t barrier(int number) const { return base + Traits::kBarrierOffset + number * 8; }
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
    __device__ int2 stretch(const KernelParams& p) const {
        if (p.entries == nullptr) {
            const int last_row = p.query_start[batch] + first_query + num_tokens - 1;
            return make_int2(0, min(last_row + 1, p.seqlen_k));
        }
        return reinterpret_cast<const int2*>(p.stretches)[list(p) * p.tiles_per_epoch + tile];
    }
};

// The query tiles of a block: one of each round, from alternating ends, so that nobody gets the longest of every round.
struct BlockSchedule {
    int round = -1;

    // Returns the number of the next tile with queries, or -1.
    __device__ int next(const KernelParams& p) {
        while (true) {
            ++round;
            const int first = round * gridDim.x;
            if (first >= p.num_query_tiles) return -1;
            const int number = first + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
            if (number < p.num_query_tiles && QueryTile(p, number).num_tokens > 0) return number;
        }
    }
};

// How a stretch is cut into key tiles: full ones, the last filled up with nothing. If little would be left for the last,
// a narrow tile goes before them instead.
template <typename Traits>
struct KeyCut {
    int narrow;     // keys of the narrow tile, 0 for none
    int num_tiles;  // full tiles, at least 1, so that every query tile takes the same way

    __device__ explicit KeyCut(int2 stretch) {
        const int count = stretch.y - stretch.x;
        const int rest = count % Traits::kBlockN;
        narrow = count > Traits::kBlockN && rest <= Traits::kNarrow ? rest : 0;
        num_tiles = max(1, (count - narrow + Traits::kBlockN - 1) / Traits::kBlockN);
    }
};

}  // namespace flash_dmattn
