// The end of an item in the sm90 backward: dkey, dvalue and the gradient of the biases are added to the sums of their
// keys. Whoever ends the last item of a list writes the dquery of its epoch.
#pragma once

#include <cmath>

#include "gradients.cuh"

namespace flash_dmattn::sm90 {

// What remains to be known of an item when the next one takes its place.
struct EndedItem {
    int position;
    int slot;
    int list_head;
    int epoch;
    int num_parts;

    __device__ explicit EndedItem(const WorkItem& item)
        : position(item.position),
          slot(item.slot),
          list_head(item.list_head),
          epoch(item.epoch),
          num_parts(item.num_parts) {}
};

// Adds the thread's parts of rows of accumulators to rows in memory, null for none, and clears them.
template <int kSize>
__device__ __forceinline__ void flush_rows(float (&acc)[kSize], float* const (&rows)[2], int lane) {
    const bool is_odd = lane & 1;
#pragma unroll
    for (int i = 0; i < kSize / 8; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // Of two neighbors one takes four columns of the even 8, the other the same of the odd 8.
            float* even = acc + i * 8 + r * 2;
            float* odd = even + 4;
            const float2 sent = is_odd ? make_float2(even[0], even[1]) : make_float2(odd[0], odd[1]);
            const float2 own = is_odd ? make_float2(odd[0], odd[1]) : make_float2(even[0], even[1]);
            const float2 received = make_float2(__shfl_xor_sync(~0u, sent.x, 1), __shfl_xor_sync(~0u, sent.y, 1));
            const float4 four = is_odd ? make_float4(received.x, received.y, own.x, own.y)
                                       : make_float4(own.x, own.y, received.x, received.y);
            if (rows[r] != nullptr) reduce(rows[r] + i * 16 + (is_odd ? 8 : 0) + lane % 4 / 2 * 4, four);
            even[0] = even[1] = odd[0] = odd[1] = 0.f;
        }
    }
}

// Adds what a warpgroup has summed up over an item to the sums of its keys, and clears it.
template <typename Traits>
__device__ __forceinline__ void flush_item(
    const BackwardKernelParams& p, const ThreadKeys& keys, int list_head, int first_column,
    float (&dkey)[Traits::kColumns / 2], float (&dvalue)[Traits::kColumns / 2], float (&dbias)[2], int lane) {
    const int batch = list_head / p.num_interval_heads;
    const int head = (list_head - batch * p.num_interval_heads) / p.interval_heads_per_kv_head;
    const int num_kv_heads = p.num_interval_heads / p.interval_heads_per_kv_head;
    float *dkey_rows[2], *dvalue_rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool exists = keys.key[r] >= 0;
        const int64_t row = (int64_t(batch) * p.seqlen_k + keys.key[r]) * num_kv_heads + head;
        dkey_rows[r] = exists ? p.dkey_sums + row * Traits::kHeadDim + first_column : nullptr;
        dvalue_rows[r] = exists ? p.dvalue_sums + row * Traits::kHeadDim + first_column : nullptr;
        float sum = dbias[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (p.dimportance != nullptr && exists && lane % 4 == 0) {
            reduce(p.dimportance + int64_t(list_head) * p.seqlen_k + keys.key[r], sum);
        }
        dbias[r] = 0.f;
    }
    flush_rows(dvalue, dvalue_rows, lane);
    flush_rows(dkey, dkey_rows, lane);
}

// Writes dquery of a list's epoch from its sums and clears those where a later list needs the slot. The sums lie tile by
// tile in the order of accumulators: the float4 of thread t and columns 8 i on stands for rows t / 32 * 16 + t % 32 / 4
// and that + 8, columns 8 i + t % 4 * 2 and the next. A warpgroup works together.
template <typename Traits>
__device__ __forceinline__ void write_dquery(const BackwardKernelParams& p, const EndedItem& item) {
    constexpr int kFours = Traits::kHeadDim / 8;  // of a thread in a tile
    const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
    const int batch = item.list_head / p.num_interval_heads, head = item.list_head - batch * p.num_interval_heads;
    const int num_heads = p.num_interval_heads * p.group_size;
    const int end = min((item.epoch + 1) * p.epoch_size, p.seqlen_q);
    const bool clears = item.position + p.num_slots < p.num_lists;
    float4* sums = reinterpret_cast<float4*>(p.dquery_sums) +
                   int64_t(item.slot) * p.tiles_per_epoch * (Traits::kBlockM * Traits::kHeadDim / 4) + thread;
    float4 fours[kFours];
    const auto load = [&](const float4* source) {
#pragma unroll
        for (int i = 0; i < kFours; ++i) fours[i] = __ldcg(source + i * kWarpgroup);
    };
    // The next tile is on its way while one is written, where there are registers for both.
    constexpr bool kLoadsAhead = !Traits::kSplitsHeadDim;
    if (kLoadsAhead) load(sums);
    for (int first = item.epoch * p.epoch_size; first < end; first += p.tile_size) {
        if (!kLoadsAhead) load(sums);
        uint32_t words[2][kFours];
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const float4 sum = fours[i];
            words[0][i] = pack<typename Traits::Element>(sum.x * p.softmax_scale, sum.y * p.softmax_scale);
            words[1][i] = pack<typename Traits::Element>(sum.z * p.softmax_scale, sum.w * p.softmax_scale);
        }
        if (kLoadsAhead && first + p.tile_size < end) load(sums + kFours * kWarpgroup);
        if (clears) {
#pragma unroll
            for (int i = 0; i < kFours; ++i) __stcg(sums + i * kWarpgroup, make_float4(0.f, 0.f, 0.f, 0.f));
        }
        sums += kFours * kWarpgroup;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = thread / 32 * 16 + r * 8 + lane / 4;
            const int token = row / p.group_size, query = first + token;
            const int64_t place =
                (int64_t(batch) * p.seqlen_q + query) * num_heads + head * p.group_size + row - token * p.group_size;
            const bool exists = token < p.tile_size && query < end;
            char* target = static_cast<char*>(p.dquery) + place * Traits::kHeadDim * 2 + lane % 4 * 16;
#pragma unroll
            for (int i = 0; i < kFours; i += 4) {
                uint32_t(&four)[4] = *reinterpret_cast<uint32_t(*)[4]>(words[r] + i);
                transpose_in_quad(four, lane);
                if (exists) *reinterpret_cast<uint4*>(target + i * 16) = make_uint4(four[0], four[1], four[2], four[3]);
            }
        }
    }
}

// Counts a warpgroup's part of an item, of which it has added all; the last of the list finishes it. `meeting` is a
// named barrier of the warpgroup.
template <typename Traits>
__device__ __forceinline__ void finish_item(const BackwardKernelParams& p, const EndedItem& item, int meeting) {
    // Other threads have added to dquery.
    if (Traits::kSplitsHeadDim && !Traits::kIsDeterministic) named_sync(meeting, kWarpgroup);
    bool is_last = false;
    int* const counter = p.list_counter(item.position);
    if (threadIdx.x % kWarpgroup == 0) {
        reduce_bulk_wait_all();
        fence_global_for_reductions();
        is_last = count_up(counter) + 1 == item.num_parts * kWarpgroups;
        if (Traits::kIsDeterministic && is_last) set_counter(counter, BackwardKernelParams::kSummedUp);
        fence_global_for_reductions();
    }
    if (named_any(meeting, kWarpgroup, is_last)) {
        write_dquery<Traits>(p, item);
        fence_global_for_reductions();
        named_sync(meeting, kWarpgroup);
        if (threadIdx.x % kWarpgroup == 0) set_counter(counter, BackwardKernelParams::kFinished);
    }
}

// Waits for an earlier list whose keys may be those of this one. `meeting` is a named barrier of the warpgroup.
__device__ __forceinline__ void wait_for_earlier_list(const BackwardKernelParams& p, int position, int meeting) {
    const int earlier = position - BackwardKernelParams::independent_lists(p);
    if (earlier >= 0 && threadIdx.x % kWarpgroup == 0) {
        wait_for_counter(p.list_counter(earlier), BackwardKernelParams::kSummedUp);
    }
    named_sync(meeting, kWarpgroup);
}

}  // namespace flash_dmattn::sm90
