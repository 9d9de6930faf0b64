// The producer warpgroup of the sm90 backward: picks the work, gathers K and V of a key tile once, then brings query
// tile after query tile with the rows' facts.
#pragma once

#include <cmath>

#include "schedule.cuh"

namespace flash_dmattn::sm90 {

// Copies the rows of the warp's keys to their places in a tile of shared memory; rows of no key become zero.
template <typename Traits>
__device__ __forceinline__ void gather_keys(
    uint32_t target, const void* matrix, const int64_t (&strides)[3], const BackwardKernelParams& p,
    const WorkItem& item, int key_of_lane, int warp, int lane) {
    const int batch = item.list_head / p.num_interval_heads;
    const int head = (item.list_head - batch * p.num_interval_heads) / p.interval_heads_per_kv_head;
    const int piece = lane % Traits::kLanesPerRow;
    const char* base = static_cast<const char*>(matrix) + (batch * strides[0] + head * strides[2]) * 2 + piece * 16;
    const int64_t row_bytes = strides[1] * 2;
#pragma unroll
    for (int first = 0; first < Traits::kKeysPerWarp; first += Traits::kRowsPerCopy) {
        const int key = __shfl_sync(~0u, key_of_lane, first + lane / Traits::kLanesPerRow);
        const char* source = base + max(key, 0) * row_bytes;
        const int row = warp * Traits::kKeysPerWarp + first + lane / Traits::kLanesPerRow;
        const uint32_t place = target + row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(row, piece) * 16;
#pragma unroll
        for (int i = 0; i < Traits::kPieces; ++i) {
            copy_async(
                place + i * Traits::kBlockN * Traits::kRowBytes, source + i * Traits::kRowBytes, key >= 0 ? 16 : 0);
        }
    }
}

// The rows of query and dout that a lane copies of every tile. Byte offsets of rows from the tile's first lie in shared
// memory, because the producers have few registers.
template <typename Traits>
struct RowCopies {
    static constexpr int kCopies = Traits::kRowsPerWarp / Traits::kRowsPerCopy;
    const uint2* offsets;  // of query and dout, from the lane's first row on
    uint32_t place;

    __device__ RowCopies(const BackwardKernelParams& p, char* smem, int warp, int lane) {
        uint2* const table = reinterpret_cast<uint2*>(smem + Traits::kOffsetsOffset);
        if (lane < Traits::kRowsPerWarp) {
            const int row = warp * Traits::kRowsPerWarp + lane;
            const int token = row / p.group_size, head = row - token * p.group_size;
            table[row] = make_uint2(
                uint32_t(token * p.query_strides[1] + head * p.query_strides[2]) * 2,
                uint32_t(token * p.num_interval_heads * p.group_size + head) * Traits::kHeadDim * 2);
        }
        __syncwarp();
        const int piece = lane % Traits::kLanesPerRow;
        const int first_row = warp * Traits::kRowsPerWarp + lane / Traits::kLanesPerRow;
        offsets = table + first_row;
        place = first_row * Traits::kRowBytes + swizzled_piece<Traits::kRowBytes>(first_row, piece) * 16;
    }

    // Copies rows from `query` and `dout`, the lane's pieces of the tile's first row. Bit i of `seen` tells whether row i
    // of the warp's is to be copied; the others become zero.
    __device__ __forceinline__ void start(
        uint32_t query_target, const char* query, uint32_t dout_target, const char* dout, unsigned seen,
        int lane) const {
        const int first_row = compute_here(lane) / Traits::kLanesPerRow;
        const uint32_t first_place = compute_here(place);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const int rows_apart = i * Traits::kRowsPerCopy;
            const bool copies = seen >> (rows_apart + first_row) & 1;
            const uint2 offset = copies ? offsets[rows_apart] : make_uint2(0, 0);
            // Rows that are kRowsPerCopy apart differ in their swizzle where that is less than its period.
            const uint32_t swizzle = (Traits::kRowBytes == 128 ? rows_apart & 7 : rows_apart >> 1 & 3) << 4;
            const uint32_t lane_place = (first_place ^ swizzle) + rows_apart * Traits::kRowBytes;
            copy_row(query_target + lane_place, query + offset.x, copies);
            copy_row(dout_target + lane_place, dout + offset.y, copies);
        }
    }

private:
    __device__ __forceinline__ static void copy_row(uint32_t target, const char* source, bool copies) {
#pragma unroll
        for (int k = 0; k < Traits::kPieces; ++k) {
            copy_async(
                target + k * Traits::kBlockM * Traits::kRowBytes, source + k * Traits::kRowBytes, copies ? 16 : 0);
        }
    }
};

template <typename Traits>
__device__ __forceinline__ void produce_gradients(const BackwardKernelParams& p, char* smem) {
    const BackwardMemory<Traits> shared{shared_address(smem)};
    const int warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    const RowCopies<Traits> copies(p, smem, warp, lane);
    const int dout_token_bytes = p.num_interval_heads * p.group_size * Traits::kHeadDim * 2;
    ItemWalk<Traits> walk(p, reinterpret_cast<int*>(smem + Traits::kNumbersOffset));
    Ring<Traits::kStages> ring;
    int landing = 0;  // the stage that lands next

    // Copies are ordinary writes: before the tensor cores read them, their writer orders them.
    const auto hand_over = [&] {
        fence_shared_for_tensor_cores();
        barrier_arrive(shared.rows_full(landing));
        landing = landing + 1 == Traits::kStages ? 0 : landing + 1;
    };
    for (int keys_phase = 1;; keys_phase ^= 1) {
        const WorkItem item = walk.next(lane);
        int key = -1;
        if (item.position >= 0 && lane < Traits::kKeysPerWarp) {
            float bias;
            key = item.key(p, warp * Traits::kKeysPerWarp + lane, bias);
        }
        barrier_wait(shared.keys_empty(), keys_phase);
        if (threadIdx.x % kWarpgroup == 0) {
            *reinterpret_cast<WorkItem*>(smem + Traits::kItemOffset) = item;
            // The slot was that of an earlier list.
            if (item.position >= p.num_slots) {
                wait_for_counter(p.list_counter(item.position - p.num_slots), BackwardKernelParams::kFinished);
            }
            barrier_arrive(shared.item_full());
        }
        if (item.position < 0) break;
        if (item.num_tiles == 0) continue;
        gather_keys<Traits>(shared.key(), p.key, p.key_strides, p, item, key, warp, lane);
        gather_keys<Traits>(shared.value(), p.value, p.value_strides, p, item, key, warp, lane);

        const int batch = item.list_head / p.num_interval_heads;
        const int first_head = (item.list_head - batch * p.num_interval_heads) * p.group_size;
        const int first_query = item.epoch * p.epoch_size;
        const int epoch_end = min(first_query + p.epoch_size, p.seqlen_q);
        int query = first_query + item.first_tile * p.tile_size;
        const int query_end = query + item.num_tiles * p.tile_size;
        const int piece_bytes = lane % Traits::kLanesPerRow * 16;
        const char* query_row =
            static_cast<const char*>(p.query) + piece_bytes +
            (batch * p.query_strides[0] + query * p.query_strides[1] + first_head * p.query_strides[2]) * 2;
        const char* dout_row = static_cast<const char*>(p.dout) + piece_bytes +
                               (int64_t(batch) * p.seqlen_q + query) * dout_token_bytes +
                               first_head * Traits::kHeadDim * 2;
        const int row_of_lane = warp * Traits::kRowsPerWarp + lane;
        const float4* facts = reinterpret_cast<const float4*>(p.row_facts) + row_of_lane +
                              (int64_t(item.list_head) * p.seqlen_q + query) * p.group_size;
        const auto load_facts = [&] {
            const int num_rows = lane < Traits::kRowsPerWarp ? min(p.tile_size, epoch_end - query) * p.group_size : 0;
            return row_of_lane < num_rows ? __ldg(facts) : make_float4(INFINITY, 0.f, 0.f, __int_as_float(-1));
        };
        float4 fact = load_facts();
        for (bool is_first = true; query < query_end; is_first = false) {
            const unsigned seen = __ballot_sync(~0u, fact.x < INFINITY);
            barrier_wait(shared.rows_empty(ring.stage), ring.phase ^ 1);
            copies.start(shared.query(ring.stage), query_row, shared.dout(ring.stage), dout_row, seen, lane);
            copy_async_commit();
            if (lane < Traits::kRowsPerWarp) {
                float* stage = reinterpret_cast<float*>(smem + Traits::kFactsOffset + ring.stage * Traits::kFactBytes);
                stage[row_of_lane] = fact.x;
                stage[Traits::kBlockM + row_of_lane] = fact.y;
                stage[2 * Traits::kBlockM + row_of_lane] = fact.z;
                stage[3 * Traits::kBlockM + row_of_lane] = fact.w;
            }
            ring.advance();
            query += p.tile_size;
            query_row += p.tile_size * p.query_strides[1] * 2;
            dout_row += int64_t(p.tile_size) * dout_token_bytes;
            facts += p.tile_size * p.group_size;
            if (query < query_end) fact = load_facts();
            // The keys land with the first rows.
            copy_async_wait<Traits::kLag>();
            if (Traits::kLag == 0 || !is_first) hand_over();
        }
        if constexpr (Traits::kLag > 0) {
            copy_async_wait<0>();
            hand_over();
        }
    }
}

}  // namespace flash_dmattn::sm90
