// What a block of the sm80 backward does with a tile of keys: products, weights and their gradients.
#pragma once

#include "../mma.cuh"
#include "work.cuh"

namespace flash_dmattn::sm80 {

__device__ __forceinline__ void add_to(float* target, float value) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(target), "f"(value) : "memory");
}

// acc += a b^T over kDepths times 16 columns. a, b: addresses of the lane's rows for the first 16 columns, of matrices
// of kRowsA and kRowsB rows.
template <typename Element, int kRowBytes, int kRowsA, int kRowsB, int kDepths, int kM, int kN>
__device__ __forceinline__ void multiply_rows(float (&acc)[kM][kN], uint32_t a, uint32_t b) {
    a = compute_here(a), b = compute_here(b);
#pragma unroll
    for (int depth = 0; depth < kDepths; ++depth) {
        uint32_t left[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            load_matrices(left[m], advance_columns<kRowBytes, kRowsA>(a, depth) + m * 16 * kRowBytes);
        }
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) {
            uint32_t right[4];
            load_matrices(right, advance_columns<kRowBytes, kRowsB>(b, depth) + n * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                multiply<Element>(acc[m] + n * 8, left[m], right);
                multiply<Element>(acc[m] + n * 8 + 4, left[m], right + 2);
            }
        }
    }
}

// acc += a b, a of rows by kDepths times 16 queries. b: address of the lane's row for the first 16 columns of a matrix of
// kRowsB rows, of which columns from first_column times 16 on are meant.
template <typename Element, int kRowBytes, int kRowsB, int kDepths, int kM, int kN>
__device__ __forceinline__ void multiply_columns(float (&acc)[kM][kN], uint32_t a, uint32_t b, int first_column) {
    a = compute_here(a), b = compute_here(b);
#pragma unroll
    for (int depth = 0; depth < kDepths; ++depth) {
        uint32_t left[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) load_matrices(left[m], advance_columns<128, 0>(a, depth) + m * 16 * 128);
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) {
            uint32_t right[4];
            load_transposed(
                right, advance_columns<kRowBytes, kRowsB>(b, first_column + n) + depth * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                multiply<Element>(acc[m] + n * 8, left[m], right);
                multiply<Element>(acc[m] + n * 8 + 4, left[m], right + 2);
            }
        }
    }
}

// acc += a^T b over kDepths times 16 rows. a: address of the lane's row of keys for the first of its 16 queries.
template <typename Element, int kRowBytes, int kRowsB, int kDepths, int kM, int kN>
__device__ __forceinline__ void multiply_turned(
    float (&acc)[kM][kN], uint32_t a, int first_query, uint32_t b, int first_column) {
    a = compute_here(a), b = compute_here(b);
#pragma unroll
    for (int depth = 0; depth < kDepths; ++depth) {
        uint32_t left[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            load_transposed(left[m], advance_columns<128, 0>(a, first_query + m) + depth * 16 * 128);
        }
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) {
            uint32_t right[4];
            load_transposed(
                right, advance_columns<kRowBytes, kRowsB>(b, first_column + n) + depth * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                multiply<Element>(acc[m] + n * 8, left[m], right);
                multiply<Element>(acc[m] + n * 8 + 4, left[m], right + 2);
            }
        }
    }
}

// The keys whose rows of the products a lane holds.
template <typename Traits>
struct LaneKeys {
    int key[Traits::kKeyTiles][2];  // -1 for none
    float bias[Traits::kKeyTiles][2];

    __device__ LaneKeys(const BackwardKernelParams& p, const WorkItem& item, int first_key, int lane) {
#pragma unroll
        for (int m = 0; m < Traits::kKeyTiles; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                key[m][r] = item.key(p, first_key + m * 16 + r * 8 + lane / 4, bias[m][r]);
            }
        }
    }
};

// The rows that see a key; read where they are needed, because they would occupy registers.
struct Interval {
    int birth, death;

    __device__ Interval(const BackwardKernelParams& p, const WorkItem& item, int key)
        : birth(key), death(INT32_MAX) {
        if (key < 0 || p.birth == nullptr) return;
        const int64_t place = int64_t(item.list_head) * p.seqlen_k + key;
        birth = __ldg(p.birth + place);
        death = __ldg(p.death + place);
    }
};

// Turns products of keys and queries into weights; `facts` are those of the lane's first query. With softcap `slopes`
// becomes the derivative of the capped product by the product, over the scale.
template <bool kHasSoftcap, int kSize>
__device__ __forceinline__ void weigh_products(
    float (&scores)[kSize], __half2 (&slopes)[kHasSoftcap ? kSize / 2 : 1], const BackwardKernelParams& p,
    const float (&bias)[2], const float* facts, int num_rows) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const float2 shift = *reinterpret_cast<const float2*>(facts + i * 8);
        const float2 log_total = *reinterpret_cast<const float2*>(facts + num_rows + i * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float& score = scores[i * 4 + k];
            if constexpr (kHasSoftcap) {
                const float tanh = __fdividef(2.f, 1.f + exp2_approx(score * p.tanh_factor)) - 1.f;
                const __half slope = __float2half_rn(fmaf(-tanh, tanh, 1.f));
                (k % 2 == 0 ? slopes[i * 2 + k / 2].x : slopes[i * 2 + k / 2].y) = slope;
                score = fmaf(tanh, p.exponent_cap, bias[k / 2]);
            } else {
                score = fmaf(score, p.exponent_factor, bias[k / 2]);
            }
            // Apart from each other: beside a huge bias their sum has no room for the log of the total.
            score = exp2_approx(score - (k % 2 ? shift.y : shift.x) - (k % 2 ? log_total.y : log_total.x));
        }
    }
}

// Clears the weights of rows that do not see the keys; `rows` are numbers of rows from the lane's first query on.
template <int kSize>
__device__ __forceinline__ void hide_weights(
    float (&weights)[kSize], const Interval& upper, const Interval& lower, const float* rows) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const int2 pair = *reinterpret_cast<const int2*>(rows + i * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const Interval& interval = k / 2 ? lower : upper;
            const int row = k % 2 ? pair.y : pair.x;
            if (!(interval.birth <= row && row < interval.death)) weights[i * 4 + k] = 0.f;
        }
    }
}

// Turns the gradients of the weights into those of the products, over the scale, and adds those of the keys' biases.
template <bool kHasSoftcap, int kSize>
__device__ __forceinline__ void differentiate(
    float (&dweights)[kSize], float (&dbias)[2], const float (&weights)[kSize],
    const __half2 (&slopes)[kHasSoftcap ? kSize / 2 : 1], const float* deltas) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
        const float2 delta = *reinterpret_cast<const float2*>(deltas + i * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float& dscore = dweights[i * 4 + k];
            dscore = weights[i * 4 + k] * (dscore - (k % 2 ? delta.y : delta.x));
            dbias[k / 2] += dscore;
            if constexpr (kHasSoftcap) {
                const float2 pair = __half22float2(slopes[i * 2 + k / 2]);
                dscore *= k % 2 ? pair.y : pair.x;
            }
        }
    }
}

// Writes values of keys by queries as 16 bits to a swizzled matrix of 64 queries.
template <typename Element, int kSize>
__device__ __forceinline__ void store_weights(
    char* matrix, const float (&values)[kSize], int first_key, int first_query, int lane) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_key + r * 8 + lane / 4;
            const int piece = swizzled_piece<128>(row, first_query / 8 + i);
            *reinterpret_cast<uint32_t*>(matrix + row * 128 + piece * 16 + lane % 4 * 4) =
                pack<Element>(values[i * 4 + r * 2], values[i * 4 + r * 2 + 1]);
        }
    }
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&acc)[kM][kN]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < kN; ++i) acc[m][i] = 0.f;
    }
}

// Adds the lane's part of accumulators to rows of dkey or dvalue.
template <typename Traits, int kN>
__device__ __forceinline__ void add_key_rows(
    float* sums, const float (&acc)[Traits::kKeyTiles][kN], const LaneKeys<Traits>& keys, int64_t first_row,
    int num_heads, int column) {
#pragma unroll
    for (int m = 0; m < Traits::kKeyTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (keys.key[m][r] < 0) continue;
            float* row = sums + (first_row + int64_t(keys.key[m][r]) * num_heads) * Traits::kHeadDim + column;
#pragma unroll
            for (int i = 0; i < kN / 4; ++i) {
                add_to(row + i * 8, acc[m][i * 4 + r * 2]);
                add_to(row + i * 8 + 1, acc[m][i * 4 + r * 2 + 1]);
            }
        }
    }
}

template <typename Traits, bool kHasSoftcap>
__device__ __forceinline__ void differentiate_item(
    const BackwardKernelParams& p, const WorkItem& item, char* smem) {
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kRowBytes = Traits::kRowBytes;
    constexpr int kKeyTiles = Traits::kKeyTiles, kScores = Traits::kQueriesOfWarp / 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t base = shared_address(smem);
    start_key_rows<Traits>(base + Traits::kKeyOffset, p.key, p.key_strides, p, item);
    start_key_rows<Traits>(base + Traits::kValueOffset, p.value, p.value_strides, p, item);
    QueryTiles<Traits> tiles(p, item, smem);
    tiles.start(0, 0);
    copy_async_commit();

    // Of keys by queries and of keys by columns.
    const int first_key = warp % Traits::kKeyGroups * Traits::kKeysOfWarp;
    const int other = warp / Traits::kKeyGroups;
    const int first_query = other * Traits::kQueriesOfWarp;
    const int key_column = other * Traits::kColumnsOfWarp;
    // Of queries by columns.
    const int first_row = warp % Traits::kRowGroups * Traits::kRowsOfWarp;
    const int row_column = warp / Traits::kRowGroups * Traits::kRowColumns;

    // A lane's rows as the left operand, as the right one along the depth, and as the right one across it.
    const int left_row = lane % 16, left_half = lane / 16;
    const int right_row = lane / 16 * 8 + lane % 8, right_half = lane / 8 % 2;
    const uint32_t keys_left = row_address<kRowBytes>(base + Traits::kKeyOffset, first_key + left_row, left_half);
    const uint32_t queries_right =
        row_address<kRowBytes>(base + Traits::kQueryOffset, first_query + right_row, right_half);
    const uint32_t queries_across = row_address<kRowBytes>(base + Traits::kQueryOffset, left_row, left_half);
    const uint32_t keys_across = row_address<kRowBytes>(base + Traits::kKeyOffset, left_row, left_half);
    const uint32_t weights_left = row_address<128>(base + Traits::kWeightsOffset, first_key + left_row, left_half);
    const uint32_t dscores_turned = row_address<128>(base + Traits::kDscoresOffset, right_row, right_half);
    constexpr int kToValues = Traits::kValueOffset - Traits::kKeyOffset;
    constexpr int kToDouts = Traits::kDoutOffset - Traits::kQueryOffset;
    constexpr int kToDscores = Traits::kDscoresOffset - Traits::kWeightsOffset;

    const LaneKeys<Traits> keys(p, item, first_key, lane);
    float dkey[kKeyTiles][Traits::kColumnsOfWarp / 2], dvalue[kKeyTiles][Traits::kColumnsOfWarp / 2];
    float dbias[kKeyTiles][2] = {};
    clear(dkey);
    clear(dvalue);

    for (int n = 0; n < item.num_tiles; ++n) {
        const int stage = n % Traits::kStages;
        const uint32_t stage_bytes = stage * Traits::kQueryBytes;
        copy_async_wait_all();
        __syncthreads();  // the tile is there; nobody reads weights, dscores and queries of the tile before any more
        if (Traits::kStages > 1 && n + 1 < item.num_tiles) tiles.start(n + 1, (n + 1) % Traits::kStages);

        const float* facts = tiles.facts(stage) + first_query + lane % 4 * 2;
        float weights[kKeyTiles][kScores], dscores[kKeyTiles][kScores];
        clear(weights);
        clear(dscores);
        multiply_rows<Element, kRowBytes, kBlockN, kBlockM, Traits::kHeadDim / 16>(
            weights, keys_left, queries_right + stage_bytes);
        multiply_rows<Element, kRowBytes, kBlockN, kBlockM, Traits::kHeadDim / 16>(
            dscores, keys_left + kToValues, queries_right + kToDouts + stage_bytes);
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) {
            __half2 slopes[kHasSoftcap ? kScores / 2 : 1];
            weigh_products<kHasSoftcap>(weights[m], slopes, p, keys.bias[m], facts, kBlockM);
            if (item.is_partial) {
                const Interval upper(p, item, keys.key[m][0]), lower(p, item, keys.key[m][1]);
                hide_weights(weights[m], upper, lower, facts + 3 * kBlockM);
            }
            store_weights<Element>(
                smem + Traits::kWeightsOffset, weights[m], first_key + m * 16, first_query, lane);
            differentiate<kHasSoftcap>(dscores[m], dbias[m], weights[m], slopes, facts + 2 * kBlockM);
            store_weights<Element>(
                smem + Traits::kDscoresOffset, dscores[m], first_key + m * 16, first_query, lane);
        }
        __syncthreads();

        multiply_columns<Element, kRowBytes, kBlockM, kBlockM / 16>(
            dvalue, weights_left, queries_across + kToDouts + stage_bytes, key_column / 16);
        multiply_columns<Element, kRowBytes, kBlockM, kBlockM / 16>(
            dkey, weights_left + kToDscores, queries_across + stage_bytes, key_column / 16);
        if (Traits::kStages == 1) {
            __syncthreads();  // nobody reads the tile any more; dquery's product needs keys and dscores alone
            if (n + 1 < item.num_tiles) tiles.start(n + 1, 0);
        }
        float dquery[Traits::kRowTiles][Traits::kRowColumns / 2];
        clear(dquery);
        multiply_turned<Element, kRowBytes, kBlockN, kBlockN / 16>(
            dquery, dscores_turned, first_row / 16, keys_across, row_column / 16);
        // Whole lines of 128 bytes: 16 rows by 8 columns after each other, of them the lanes' first numbers first.
        float* sums = p.dquery_sums +
                      (item.sums(p) * p.tiles_per_epoch + item.first_tile + n) * (kBlockM * Traits::kHeadDim) +
                      (first_row / 16 * (Traits::kHeadDim / 8) + row_column / 8) * 128 + lane;
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
            for (int i = 0; i < Traits::kRowColumns / 2; ++i) {
                add_to(sums + m * (Traits::kHeadDim / 8) * 128 + i * 32, dquery[m][i]);
            }
        }
    }

    const int num_kv_heads = p.num_interval_heads / p.interval_heads_per_kv_head;
    const int head = (item.list_head - item.batch * p.num_interval_heads) / p.interval_heads_per_kv_head;
    const int64_t sums_row = int64_t(item.batch) * p.seqlen_k * num_kv_heads + head;
    const int column = key_column + lane % 4 * 2;
    add_key_rows<Traits>(p.dkey_sums, dkey, keys, sums_row, num_kv_heads, column);
    add_key_rows<Traits>(p.dvalue_sums, dvalue, keys, sums_row, num_kv_heads, column);
    if (p.dimportance == nullptr) return;
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = dbias[m][r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (keys.key[m][r] >= 0 && lane % 4 == 0) {
                add_to(p.dimportance + int64_t(item.list_head) * p.seqlen_k + keys.key[m][r], sum);
            }
        }
    }
}

}  // namespace flash_dmattn::sm80
