// What producer and consumers of the sm90 forward agree on: shapes, the layout of shared memory, the order of work.
#pragma once

#include <cstdint>

#include "../../common/query_tiles.cuh"
#include "../hopper.cuh"
#include "shapes.h"

namespace flash_dmattn::sm90 {

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

// The sm80 kernels lack the registers for a start that may be left out.
struct Sm90Params : KernelParams {
    int last_start;  // that of queries which are the last rows

    explicit Sm90Params(const flash_dmattn_forward_params& p)
        : KernelParams(p), last_start(p.seqlen_k - p.seqlen_q) {}

    __device__ int start(int batch) const { return query_start == nullptr ? last_start : query_start[batch]; }
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

// The query tiles of a block: one of each round, from alternating ends, so that nobody gets the longest of every round.
struct BlockSchedule {
    int round = -1;

    // Returns the number of the next tile with queries, or -1.
    __device__ int next(const Sm90Params& p) {
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

}  // namespace flash_dmattn::sm90
