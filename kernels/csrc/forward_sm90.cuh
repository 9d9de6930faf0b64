// Forward of interval attention for sm_90a.
//
// A persistent block attends one query tile after the other to its stretch of a key list. The rows of a tile are
// tokens x group heads of one interval head. A producer warpgroup gathers the listed rows of K and V into shared
// memory; consumer warpgroups take 64 query rows each and take turns on the tensor cores: while one multiplies, the
// other exponentiates.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

#include "forward_sm90.h"
#include "hopper.cuh"
#include "wgmma.cuh"

namespace flash_dmattn {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

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
    Divisor by_tiles_of_head;
    Divisor by_tiles_of_epoch;
    Divisor by_interval_heads;
    Divisor by_heads_of_kv_head;
    Divisor by_group;
    int num_query_tiles;
    uint32_t key_row_bytes;
    uint32_t value_row_bytes;

    explicit KernelParams(const ForwardParams& p)
        : ForwardParams(p),
          by_tiles_of_head(p.num_epochs * p.tiles_per_epoch),
          by_tiles_of_epoch(p.tiles_per_epoch),
          by_interval_heads(p.num_interval_heads),
          by_heads_of_kv_head(p.interval_heads_per_kv_head),
          by_group(p.group_size),
          num_query_tiles(p.batch * p.num_interval_heads * p.num_epochs * p.tiles_per_epoch),
          key_row_bytes(uint32_t(p.key_strides[1] * 2)),
          value_row_bytes(uint32_t(p.value_strides[1] * 2)) {}
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

    // A matrix lies in shared memory as pieces of kRowBytes columns, each piece with all its rows.
    static constexpr int kRowBytes = kHeadDim % 64 == 0 ? 128 : 64;
    static constexpr int kPieces = kHeadDim * 2 / kRowBytes;
    static constexpr int kDepthsPerPiece = kRowBytes / 32;  // a product is 16 elements deep
    static constexpr int kLanesPerRow = kRowBytes / 16;
    static constexpr int kRowsPerCopy = 32 / kLanesPerRow;
    static constexpr int kKeysPerWarp = kBlockN / 4;
    static constexpr int kIndexRegs = (kKeysPerWarp + 31) / 32;

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

    static_assert(kBlockM % 64 == 0 && kBlockN % 16 == 0);
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

// Position in a ring of stages.
template <int kStages>
struct Ring {
    int stage = 0;
    int phase = 0;

    __device__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
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
        const int tiles = p.num_epochs * p.tiles_per_epoch;
        list_head = p.by_tiles_of_head.divide(number);
        // The late tiles of a causal head are the long ones: they go first.
        const int tile_of_head = tiles - 1 - (number - list_head * tiles);
        batch = p.by_interval_heads.divide(list_head);
        head = list_head - batch * p.num_interval_heads;
        epoch = p.by_tiles_of_epoch.divide(tile_of_head);
        tile = tile_of_head - epoch * p.tiles_per_epoch;
        first_query = epoch * p.epoch_size + tile * p.tile_size;
        const int end = min(first_query + p.tile_size, min((epoch + 1) * p.epoch_size, p.seqlen_q));
        num_tokens = end - first_query;
    }

    __device__ int64_t list(const KernelParams& p) const { return int64_t(list_head) * p.num_epochs + epoch; }

    // The first entry of the list that the tile needs and the one after its last.
    __device__ int2 stretch(const KernelParams& p) const {
        return reinterpret_cast<const int2*>(p.stretches)[list(p) * p.tiles_per_epoch + tile];
    }
};

// Returns the number of the block's next tile from `number` on that has queries, or the number of all tiles.
__device__ __forceinline__ int skip_empty_tiles(const KernelParams& p, int number) {
    while (number < p.num_query_tiles && QueryTile(p, number).num_tokens <= 0) number += gridDim.x;
    return min(number, p.num_query_tiles);
}

// Key tiles of a query tile: one of nothing when it sees nothing, so that every tile takes the same way.
template <int kBlockN>
__device__ __forceinline__ int num_key_tiles(int2 stretch) {
    return max(1, (stretch.y - stretch.x + kBlockN - 1) / kBlockN);
}

// Producer ------------------------------------------------------------------------------------------------------------

// A key tile on its way to shared memory: the warp's part of its keys, -1 for none.
template <typename Traits>
struct KeyTile {
    bool exists;
    bool may_be_partial;  // some of its keys may be invisible to some of the queries
    int list_head;
    int first_row;
    int last_row;
    int keys[Traits::kIndexRegs];
};

// What is known of the keys of a tile besides K and V.
template <typename Traits>
struct KeyFacts {
    float importance[Traits::kIndexRegs];
    int birth[Traits::kIndexRegs];
    int death[Traits::kIndexRegs];
};

// Walks the key tiles of all query tiles of the block.
template <typename Traits>
struct KeyWalk {
    const KernelParams& p;
    int number;
    int remaining = 0;
    int position;
    int end;
    int num_dying;
    int num_alive;
    int list_head;
    int first_row;
    int last_row;
    const int32_t* entries;

    __device__ explicit KeyWalk(const KernelParams& params) : p(params), number(int(blockIdx.x) - int(gridDim.x)) {}

    __device__ KeyTile<Traits> next(int warp, int lane) {
        KeyTile<Traits> tile;
        if (remaining == 0) {
            number = skip_empty_tiles(p, number + gridDim.x);
            tile.exists = number < p.num_query_tiles;
            if (!tile.exists) return tile;
            enter(lane);
        }
        tile.exists = true;
        tile.list_head = list_head;
        tile.first_row = first_row;
        tile.last_row = last_row;
        tile.may_be_partial = position < num_dying || position + Traits::kBlockN > num_alive;
#pragma unroll
        for (int i = 0; i < Traits::kIndexRegs; ++i) {
            const int key_of_warp = i * 32 + lane;
            const int place = position + warp * Traits::kKeysPerWarp + key_of_warp;
            tile.keys[i] = key_of_warp < Traits::kKeysPerWarp && place < end ? __ldg(entries + place) : -1;
        }
        position += Traits::kBlockN;
        --remaining;
        return tile;
    }

    __device__ void enter(int lane) {
        const QueryTile queries(p, number);
        const int64_t list = queries.list(p);
        const int2 stretch = queries.stretch(p);
        position = stretch.x;
        end = stretch.y;
        remaining = num_key_tiles<Traits::kBlockN>(stretch);
        num_dying = p.sections[list * 3];
        num_alive = p.sections[list * 3 + 1];
        entries = p.entries + list * p.capacity;
        list_head = queries.list_head;
        if (p.query_positions == nullptr) {
            first_row = p.query_start[queries.batch] + queries.first_query;
            last_row = first_row + queries.num_tokens - 1;
            return;
        }
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
};

template <typename Traits>
__device__ __forceinline__ KeyFacts<Traits> load_facts(const KernelParams& p, const KeyTile<Traits>& tile) {
    KeyFacts<Traits> facts;
    const int64_t row = int64_t(tile.list_head) * p.seqlen_k;
#pragma unroll
    for (int i = 0; i < Traits::kIndexRegs; ++i) {
        const bool is_listed = tile.keys[i] >= 0;
        facts.importance[i] = is_listed && p.importance != nullptr ? __ldg(p.importance + row + tile.keys[i]) : 0.f;
        facts.birth[i] = is_listed && tile.may_be_partial ? __ldg(p.birth + row + tile.keys[i]) : 0;
        facts.death[i] = is_listed && tile.may_be_partial ? __ldg(p.death + row + tile.keys[i]) : INT32_MAX;
    }
    return facts;
}

// Copies the rows of the warp's keys to their places in a tile of shared memory; rows of no key become zero.
template <typename Traits>
__device__ __forceinline__ void gather(
    uint32_t target, const void* matrix, const int64_t (&strides)[3], uint32_t row_bytes, const KernelParams& p,
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
        const uint32_t place =
            target + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
        for (int i = 0; i < Traits::kPieces; ++i) {
            copy_async(
                place + i * Traits::kBlockN * Traits::kRowBytes, source + i * Traits::kRowBytes, bytes);
        }
    }
}

// Writes the biases of a tile, its births and deaths where they may be needed, and whether they are.
template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void store_facts(
    char* smem, int stage, const KernelParams& p, const KeyTile<Traits>& tile, const KeyFacts<Traits>& facts,
    int warp, int lane) {
    // Biases are in units of the scores that they are added to: products, or with softcap exponents of 2.
    const float factor = kHasSoftcap ? kLog2e : 1.f / p.softmax_scale;
    const float limit = FLT_MAX / 4.f * fminf(p.softmax_scale, 1.f);
    float* bias = reinterpret_cast<float*>(smem + Traits::kBiasOffset) + stage * Traits::kBlockN;
    int* birth = reinterpret_cast<int*>(smem + Traits::kBirthOffset) + stage * Traits::kBlockN;
    int* death = reinterpret_cast<int*>(smem + Traits::kDeathOffset) + stage * Traits::kBlockN;
    bool is_partial = false;
#pragma unroll
    for (int i = 0; i < Traits::kIndexRegs; ++i) {
        const int key_of_warp = i * 32 + lane;
        const int place = warp * Traits::kKeysPerWarp + key_of_warp;
        if (key_of_warp < Traits::kKeysPerWarp) {
            const float importance = fminf(fmaxf(facts.importance[i], -limit), limit);
            bias[place] = tile.keys[i] >= 0 ? importance * factor : -INFINITY;
            if (tile.may_be_partial) {
                birth[place] = facts.birth[i];
                death[place] = facts.death[i];
                is_partial |= tile.keys[i] >= 0 && (facts.birth[i] > tile.first_row || facts.death[i] <= tile.last_row);
            }
        }
    }
    is_partial = __any_sync(~0u, is_partial);
    if (lane == 0) reinterpret_cast<int*>(smem + Traits::kPartialOffset)[stage * 4 + warp] = is_partial;
}

template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void produce(const KernelParams& p, char* smem) {
    const SharedMemory<Traits> shared{shared_address(smem)};
    const int warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    KeyWalk<Traits> walk(p);
    Ring<Traits::kStages> key_ring, value_ring;

    const auto copy_value = [&](const KeyTile<Traits>& tile) {
        barrier_wait(shared.value_empty(value_ring.stage), value_ring.phase ^ 1);
        gather<Traits>(shared.value(value_ring.stage), p.value, p.value_strides, p.value_row_bytes, p, tile, warp, lane);
        copy_async_arrive(shared.value_full(value_ring.stage));
        value_ring.advance();
    };

    // Keys are read two tiles ahead, what is known of them one tile ahead; V follows K by one tile.
    KeyTile<Traits> previous, tile = walk.next(warp, lane);
    previous.exists = false;
    KeyFacts<Traits> facts;
    if (tile.exists) facts = load_facts(p, tile);
    KeyTile<Traits> following = tile;
    if (tile.exists) following = walk.next(warp, lane);
    while (tile.exists) {
        barrier_wait(shared.key_empty(key_ring.stage), key_ring.phase ^ 1);
        gather<Traits>(shared.key(key_ring.stage), p.key, p.key_strides, p.key_row_bytes, p, tile, warp, lane);
        store_facts<Traits, kHasSoftcap>(smem, key_ring.stage, p, tile, facts, warp, lane);
        copy_async_arrive(shared.key_full(key_ring.stage));
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.key_full(key_ring.stage));
        key_ring.advance();
        if (previous.exists) copy_value(previous);
        previous = tile;
        tile = following;
        if (tile.exists) {
            facts = load_facts(p, tile);
            following = walk.next(warp, lane);
        }
    }
    if (previous.exists) copy_value(previous);
    copy_async_wait_all();
}

// Consumers -----------------------------------------------------------------------------------------------------------

// One row of a thread's accumulators: the query and its head, if there are such.
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

    __device__ int row(const KernelParams& p, int batch) const {
        if (!exists) return -1;
        return p.query_positions == nullptr ? p.query_start[batch] + query
                                            : p.query_positions[int64_t(batch) * p.seqlen_q + query];
    }
};

// Starts to copy the query rows of the warp (16 of its warpgroup's 64) to shared memory.
template <typename Traits>
__device__ __forceinline__ void copy_query(
    uint32_t target, const KernelParams& p, const QueryTile& tile, int first_row, int lane) {
    const int piece = lane % Traits::kLanesPerRow;
    const char* base =
        static_cast<const char*>(p.query) + int64_t(tile.batch) * p.query_strides[0] * 2 + piece * 16;
#pragma unroll
    for (int first = 0; first < 16; first += Traits::kRowsPerCopy) {
        const int row = first_row + first + lane / Traits::kLanesPerRow;
        const QueryRow query(p, tile, row);
        const int64_t offset = query.exists ? query.query * p.query_strides[1] + query.head * p.query_strides[2] : 0;
        const uint32_t place =
            target + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
        for (int i = 0; i < Traits::kPieces; ++i) {
            copy_async(
                place + i * Traits::kBlockM * Traits::kRowBytes, base + offset * 2 + i * Traits::kRowBytes,
                query.exists ? 16 : 0);
        }
    }
}

// scores += query key^T; 64 x kBlockN.
template <typename Traits>
__device__ __forceinline__ void start_scores(float (&scores)[Traits::kBlockN / 2], uint32_t query, uint32_t key) {
#pragma unroll
    for (int depth = 0; depth < Traits::kHeadDim / 16; ++depth) {
        const int piece = depth / Traits::kDepthsPerPiece;
        const int offset = depth % Traits::kDepthsPerPiece * 32;
        Wgmma<Traits::kBlockN, typename Traits::Element>::score(
            scores,
            matrix_descriptor<Traits::kRowBytes>(query + piece * Traits::kBlockM * Traits::kRowBytes + offset, 16),
            matrix_descriptor<Traits::kRowBytes>(key + piece * Traits::kBlockN * Traits::kRowBytes + offset, 16));
    }
    wgmma_commit();
}

// acc += weights value; 64 x kHeadDim.
template <typename Traits>
__device__ __forceinline__ void start_weighing(
    float (&acc)[Traits::kHeadDim / 2], const uint32_t (&weights)[Traits::kBlockN / 4], uint32_t value) {
#pragma unroll
    for (int depth = 0; depth < Traits::kBlockN / 16; ++depth) {
        Wgmma<Traits::kHeadDim, typename Traits::Element>::weigh(
            acc, weights + depth * 4,
            matrix_descriptor<Traits::kRowBytes>(
                value + depth * 16 * Traits::kRowBytes, Traits::kBlockN * Traits::kRowBytes));
    }
    wgmma_commit();
}

// The running softmax of a thread's two rows. Exponents are of 2; `shift` is what they are taken relative to, which
// need not be the highest: it follows when the highest is far enough above it for the weights to grow too large.
struct RunningSoftmax {
    float shift[2] = {-INFINITY, -INFINITY};
    float total[2] = {0.f, 0.f};  // over the thread's own columns
    float rescale[2];

    // Turns scores into weights. Returns whether what was accumulated before is to be multiplied by `rescale`.
    template <int kSize>
    __device__ __forceinline__ bool weigh(float (&scores)[kSize], float factor) {
        constexpr float kTolerance = 8.f;
        float highest[2][2] = {{scores[0], scores[1]}, {scores[2], scores[3]}};
#pragma unroll
        for (int i = 4; i < kSize; ++i) highest[i >> 1 & 1][i & 1] = fmaxf(highest[i >> 1 & 1][i & 1], scores[i]);
        bool must_follow = false;
        float row_highest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float high = fmaxf(highest[r][0], highest[r][1]);
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            row_highest[r] = high * factor;
            must_follow |= row_highest[r] > shift[r] + kTolerance;
        }
        must_follow = __any_sync(~0u, must_follow);
        if (must_follow) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float next = fmaxf(shift[r], row_highest[r]);
                rescale[r] = next == -INFINITY ? 1.f : exp2_approx(shift[r] - next);
                total[r] *= rescale[r];
                shift[r] = next;
            }
        }
        const float offset[2] = {
            shift[0] == -INFINITY ? 0.f : -shift[0], shift[1] == -INFINITY ? 0.f : -shift[1]};
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const int r = i >> 1 & 1;
            scores[i] = exp2_approx(fmaf(scores[i], factor, offset[r]));
            total[r] += scores[i];
        }
        return must_follow;
    }
};

template <int kSize>
__device__ __forceinline__ void rescale_rows(float (&acc)[kSize], const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) acc[i] *= rescale[i >> 1 & 1];
}

// Lays the accumulators' 16-bit values out as the left operand of the next product.
template <typename Element, int kSize>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[kSize / 2], const float (&weights)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) packed[i] = pack<Element>(weights[2 * i], weights[2 * i + 1]);
}

// Scores start from the bias of their key.
template <int kSize>
__device__ __forceinline__ void start_from_bias(float (&scores)[kSize], const float* bias, int lane) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(bias + i * 8 + lane % 4 * 2);
        scores[i * 4] = scores[i * 4 + 2] = pair.x;
        scores[i * 4 + 1] = scores[i * 4 + 3] = pair.y;
    }
}

// Softcap, and only then the bias: exponents of 2.
template <int kSize>
__device__ __forceinline__ void cap_scores(
    float (&scores)[kSize], const float* bias, int lane, float softmax_scale, float softcap) {
    const float factor = -2.f * kLog2e * softmax_scale / softcap;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        const float tanh = __fdividef(2.f, 1.f + exp2_approx(scores[i] * factor)) - 1.f;
        scores[i] = fmaf(tanh, softcap * kLog2e, bias[i / 4 * 8 + lane % 4 * 2 + i % 2]);
    }
}

// Scores of keys that a row does not see become -inf.
template <int kSize>
__device__ __forceinline__ void hide_invisible(
    float (&scores)[kSize], const int* birth, const int* death, const int (&rows)[2], int lane) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const int2 births = *reinterpret_cast<const int2*>(birth + i * 8 + lane % 4 * 2);
        const int2 deaths = *reinterpret_cast<const int2*>(death + i * 8 + lane % 4 * 2);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!(births.x <= rows[r] && rows[r] < deaths.x)) scores[i * 4 + r * 2] = -INFINITY;
            if (!(births.y <= rows[r] && rows[r] < deaths.y)) scores[i * 4 + r * 2 + 1] = -INFINITY;
        }
    }
}

// Transposes the 4 x 4 matrix of which each lane of a quad holds one row.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool is_high = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const uint32_t sent = is_high ? words[i] : words[i | bit];
            const uint32_t received = __shfl_xor_sync(~0u, sent, bit);
            (is_high ? words[i] : words[i | bit]) = received;
        }
    }
}

// Divides the accumulators by their rows' totals and writes out and lse.
template <typename Traits>
__device__ __forceinline__ void store_rows(
    const KernelParams& p, const QueryTile& tile, float (&acc)[Traits::kHeadDim / 2], RunningSoftmax& softmax,
    const int (&rows)[2], int first_row, int lane) {
    const int num_heads = p.num_interval_heads * p.group_size;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const QueryRow query(p, tile, first_row + r * 8 + lane / 4);
        float total = softmax.total[r];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const bool sees_any = rows[r] >= 0 && total != 0.f;
        const float inverse = 1.f / total;
        char* out = static_cast<char*>(p.out) +
                    ((int64_t(tile.batch) * p.seqlen_q + query.query) * num_heads + query.head) * Traits::kHeadDim * 2;
#pragma unroll
        for (int i = 0; i < Traits::kHeadDim / 32; ++i) {
            uint32_t words[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float low = acc[(i * 4 + k) * 4 + r * 2], high = acc[(i * 4 + k) * 4 + r * 2 + 1];
                words[k] = sees_any ? pack<typename Traits::Element>(low * inverse, high * inverse) : 0;
            }
            transpose_in_quad(words, lane);
            if (query.exists) {
                *reinterpret_cast<uint4*>(out + (i * 4 + lane % 4) * 16) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
        if (query.exists && lane % 4 == 0) {
            p.lse[(int64_t(tile.batch) * num_heads + query.head) * p.seqlen_q + query.query] =
                sees_any ? (softmax.shift[r] + log2f(total)) * kLn2 : -INFINITY;
        }
    }
}

template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void consume(const KernelParams& p, char* smem, int warpgroup) {
    constexpr int kBlockN = Traits::kBlockN;
    const SharedMemory<Traits> shared{shared_address(smem)};
    const int warp = threadIdx.x / 32 % 4;
    const int lane = keep(threadIdx.x % 32);
    const int first_row = warpgroup * 64 + warp * 16;  // of the warp
    const uint32_t query = shared.base + warpgroup * 64 * Traits::kRowBytes;
    const float factor = kHasSoftcap ? 1.f : p.softmax_scale * kLog2e;
    // Named barriers: one for the turns of each warpgroup, one for each to meet on its own.
    const int my_turn = keep_of_warp(1 + warpgroup), next_turn = keep_of_warp(1 + (warpgroup + 1) % Traits::kConsumers);
    const int meeting = 1 + Traits::kConsumers + warpgroup;

    float acc[Traits::kHeadDim / 2];
    float scores[kBlockN / 2];
    uint32_t weights[kBlockN / 4];
    Ring<Traits::kStages> key_ring, value_ring;

    const auto wait_for_key = [&] {
        barrier_wait(shared.key_full(key_ring.stage), key_ring.phase);
        fence_shared_for_tensor_cores();
        if constexpr (kHasSoftcap) {
#pragma unroll
            for (int i = 0; i < kBlockN / 2; ++i) scores[i] = 0.f;
        } else {
            start_from_bias(
                scores, reinterpret_cast<float*>(smem + Traits::kBiasOffset) + key_ring.stage * kBlockN, lane);
        }
    };
    const auto wait_for_value = [&] {
        barrier_wait(shared.value_full(value_ring.stage), value_ring.phase);
        fence_shared_for_tensor_cores();
    };
    const auto finish_key = [&](const int(&rows)[2]) {
        if constexpr (kHasSoftcap) {
            cap_scores(
                scores, reinterpret_cast<float*>(smem + Traits::kBiasOffset) + key_ring.stage * kBlockN, lane,
                p.softmax_scale, p.softcap);
        }
        const int4 partial = *reinterpret_cast<int4*>(smem + Traits::kPartialOffset + key_ring.stage * 16);
        if (partial.x | partial.y | partial.z | partial.w) {
            hide_invisible(
                scores, reinterpret_cast<int*>(smem + Traits::kBirthOffset) + key_ring.stage * kBlockN,
                reinterpret_cast<int*>(smem + Traits::kDeathOffset) + key_ring.stage * kBlockN, rows, lane);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.key_empty(key_ring.stage));
        key_ring.advance();
    };
    const auto release_value = [&] {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.value_empty(value_ring.stage));
        value_ring.advance();
    };

    int number = skip_empty_tiles(p, blockIdx.x);
    if (number >= p.num_query_tiles) return;
    int2 stretch = QueryTile(p, number).stretch(p);
    copy_query<Traits>(shared.base, p, QueryTile(p, number), first_row, lane);
    if (warpgroup == Traits::kConsumers - 1) named_arrive(next_turn, 2 * kWarpgroup);

    while (true) {
        int rows[2];
        {
            const QueryTile tile(p, number);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                rows[r] = QueryRow(p, tile, first_row + r * 8 + lane / 4).row(p, tile.batch);
            }
        }
        const int num_tiles = num_key_tiles<kBlockN>(stretch);
        RunningSoftmax softmax;
#pragma unroll
        for (int i = 0; i < Traits::kHeadDim / 2; ++i) acc[i] = 0.f;
        copy_async_wait_all();
        fence_shared_for_tensor_cores();
        named_sync(meeting, kWarpgroup);

        wait_for_key();
        wgmma_fence();
        start_scores<Traits>(scores, query, shared.key(key_ring.stage));
        wgmma_wait<0>();
        pin(scores);
        finish_key(rows);
        softmax.weigh(scores, factor);
        pack_weights<typename Traits::Element>(weights, scores);

        for (int n = 1; n < num_tiles; ++n) {
            wait_for_key();
            named_sync(my_turn, 2 * kWarpgroup);
            wgmma_fence();
            start_scores<Traits>(scores, query, shared.key(key_ring.stage));
            wait_for_value();
            wgmma_fence();
            start_weighing<Traits>(acc, weights, shared.value(value_ring.stage));
            named_arrive(next_turn, 2 * kWarpgroup);
            wgmma_wait<1>();
            pin(scores);
            finish_key(rows);
            const bool must_rescale = softmax.weigh(scores, factor);
            finish_before_wait(softmax.total[0] + softmax.total[1], shared.base);
            wgmma_wait<0>();
            pin(acc);
            release_value();
            if (must_rescale) rescale_rows(acc, softmax.rescale);
            pack_weights<typename Traits::Element>(weights, scores);
        }

        wait_for_value();
        wgmma_fence();
        start_weighing<Traits>(acc, weights, shared.value(value_ring.stage));
        const QueryTile tile(p, number);
        number = skip_empty_tiles(p, number + gridDim.x);
        named_sync(meeting, kWarpgroup);  // no warp reads its queries any more
        if (number < p.num_query_tiles) {
            const QueryTile next(p, number);
            stretch = next.stretch(p);
            copy_query<Traits>(shared.base, p, next, first_row, lane);
        }
        wgmma_wait<0>();
        pin(acc);
        release_value();
        store_rows<Traits>(p, tile, acc, softmax, rows, first_row, lane);
        if (number >= p.num_query_tiles) break;
    }
}

template <typename Traits, bool kHasSoftcap>
__global__ void __launch_bounds__(Traits::kThreads, 1) forward_kernel(const __grid_constant__ KernelParams p) {
    extern __shared__ __align__(1024) char smem[];
    const SharedMemory<Traits> shared{shared_address(smem)};
    if (threadIdx.x == 0) {
#pragma unroll
        for (int stage = 0; stage < Traits::kStages; ++stage) {
            barrier_init(shared.key_full(stage), kWarpgroup + 4);
            barrier_init(shared.key_empty(stage), Traits::kConsumers * 4);
            barrier_init(shared.value_full(stage), kWarpgroup);
            barrier_init(shared.value_empty(stage), Traits::kConsumers * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 0) {
        shrink_registers<Traits::kProducerRegs>();
        produce<Traits, kHasSoftcap>(p, smem);
    } else {
        grow_registers<Traits::kConsumerRegs>();
        consume<Traits, kHasSoftcap>(p, smem, warpgroup - 1);
    }
}

template <typename Element, int kHeadDim>
cudaError_t launch_forward(const ForwardParams& p, cudaStream_t stream) {
    using Traits = ForwardTraits<Element, kHeadDim>;
    const auto kernel = p.softcap > 0 ? forward_kernel<Traits, true> : forward_kernel<Traits, false>;
    int device, num_processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
    if (error != cudaSuccess) return error;
    const int64_t tiles = int64_t(p.batch) * p.num_interval_heads * p.num_epochs * p.tiles_per_epoch;
    if (tiles > INT32_MAX - num_processors) return cudaErrorInvalidValue;
    const int blocks = tiles < num_processors ? int(tiles) : num_processors;
    kernel<<<blocks, Traits::kThreads, Traits::kSharedBytes, stream>>>(KernelParams(p));
    return cudaGetLastError();
}

}  // namespace flash_dmattn
