// Which queries see which key: the row at which every key has been beaten by num_kept others.
//
// The keys are sorted by (document, importance, newest first); a key's place is its rank. Let the threshold at row t be
// the num_kept-th best rank of the document's keys before t: it only rises, and a key survives t if it is at least as
// good. So a key dies in the one segment of rows between whose thresholds its rank lies. Within a segment only keys
// that arrive in it (at most segment_size) evict and only as many older ones are evicted, so that a block solves it by
// comparing them all: the key with m - 1 candidates below it goes when the m-th better key arrives.
//
// Sinks rank before everything and padding behind everything in its document, which makes them ordinary keys: a
// document's ranks and rows are the same range, and the threshold of a document that starts at row b is the
// (b + num_kept)-th best rank of all keys before t.
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"
#include "selection_axis.cuh"

namespace flash_dmattn {
namespace {

constexpr int kThreads = 256;
constexpr int kFewBins = 1024, kManyBins = 4096;
constexpr int kMaxSegment = 1024;
constexpr int kScanItems = 16;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ float as_float(float x) { return x; }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float as_float(__half x) { return __half2float(x); }

// A number that rises from the best importance to the worst. 0 and 2^32 - 1 belong to no importance.
__device__ uint32_t descending(float importance) {
    if (isnan(importance)) importance = -INFINITY;
    importance = fminf(importance, 3.402823466e+38f) + 0.0f;  // -0 becomes +0
    const uint32_t bits = __float_as_uint(importance);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

// Newest first, because the sort is stable and the newer key wins a tie.
template <typename Element>
__global__ void make_sort_keys(
    SelectionAxis axis,
    const Element* importance,  // (B, Hi, Sk)
    int64_t batch_stride,
    int64_t head_stride,
    int64_t row_stride,
    int num_heads,
    uint64_t* keys,    // (R, Sk): document, then importance
    int* rows,         // (R, Sk)
    int* num_evicted,  // (R, segments), cleared for what follows; or null
    int num_counters) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= axis.seqlen) return;
    const int lane = blockIdx.y, batch = lane / num_heads, head = lane % num_heads;
    const int document = axis.document_of(row);
    uint32_t order;
    if (!axis.is_real(batch, row)) {
        order = 0xffffffffu;
    } else if (axis.position(batch, row, axis.bound(document)) < axis.num_sink_tokens) {
        order = 0;
    } else {
        order = descending(as_float(importance[batch * batch_stride + head * head_stride + row * row_stride]));
    }
    const int64_t place = int64_t(lane) * axis.seqlen + axis.seqlen - 1 - row;
    keys[place] = uint64_t(uint32_t(lane * axis.num_docs + document)) << 32 | order;
    rows[place] = row;
    if (row < num_counters) num_evicted[int64_t(lane) * num_counters + row] = 0;
}

// One block per batch row.
__global__ void __launch_bounds__(1024) count_real_tokens(const uint8_t* mask, int seqlen, int* real_before, int* real_rows) {
    using Scan = cub::BlockScan<int, 1024>;
    __shared__ typename Scan::TempStorage storage;
    const int64_t batch = blockIdx.x;
    mask += batch * seqlen;
    real_before += batch * (seqlen + 1);
    real_rows += batch * seqlen;
    int total = 0;
    for (int offset = 0; offset < seqlen; offset += 1024 * kScanItems) {
        const int first = offset + threadIdx.x * kScanItems;
        int count = 0;
        bool is_real[kScanItems];
        for (int i = 0; i < kScanItems; ++i) {
            is_real[i] = first + i < seqlen && mask[first + i];
            count += is_real[i];
        }
        int before, all;
        Scan(storage).ExclusiveSum(count, before, all);
        __syncthreads();
        before += total;
        total += all;
        for (int i = 0; i < kScanItems; ++i) {
            if (first + i < seqlen) real_before[first + i] = before;
            if (is_real[i]) real_rows[before++] = first + i;
        }
    }
    if (threadIdx.x == 0) real_before[seqlen] = total;
}

// One block.
__global__ void __launch_bounds__(1024) number_segments(SelectionAxis axis, int* first_segment) {
    using Scan = cub::BlockScan<int, 1024>;
    __shared__ typename Scan::TempStorage storage;
    int total = 0;
    for (int offset = 0; offset < axis.num_docs; offset += 1024) {
        const int document = offset + threadIdx.x;
        int count = 0, before, all;
        if (document < axis.num_docs) {
            const int length = axis.bound(document + 1) - axis.bound(document);
            count = length > axis.num_kept ? ceil_div(length, axis.segment_size) : 0;
        }
        Scan(storage).ExclusiveSum(count, before, all);
        __syncthreads();
        if (document < axis.num_docs) first_segment[document] = total + before;
        total += all;
    }
    if (threadIdx.x == 0) first_segment[axis.num_docs] = total;
}

// A block per rank_block_size ranks: inverts the order, and counts for every segment the keys that come before its end.
template <int kBins>
__global__ void rank_keys(
    SelectionAxis axis,
    const int* rows,  // (R, Sk), by rank
    int rank_block_size,
    int* ranks,    // (R, Sk), by row
    int* counts) {  // (R, rank blocks, segments)
    using Scan = cub::BlockScan<int, kThreads>;
    __shared__ typename Scan::TempStorage storage;
    __shared__ int bins[kBins];
    rows += int64_t(blockIdx.y) * axis.seqlen;
    ranks += int64_t(blockIdx.y) * axis.seqlen;
    counts += (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * axis.num_segments;
    const int low = blockIdx.x * rank_block_size, high = min(low + rank_block_size, axis.seqlen);
    for (int place = low + threadIdx.x; place < high; place += kThreads) ranks[rows[place]] = place;

    int total = 0;
    for (int first_bin = 0; first_bin < axis.num_segments; first_bin += kBins) {
        for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
        __syncthreads();
        for (int place = low + threadIdx.x; place < high; place += kThreads) {
            const int row = rows[place];
            int segment;
            if (axis.cu_seqlens) {
                const int document = axis.document_of(row);
                segment = axis.first_segment[document];
                if (axis.first_segment[document + 1] > segment) segment += (row - axis.bound(document)) / axis.segment_size;
            } else {
                segment = row / axis.segment_size;
            }
            if (unsigned(segment - first_bin) < unsigned(kBins)) atomicAdd(&bins[segment - first_bin], 1);
        }
        __syncthreads();
        int own[kBins / kThreads], sum = 0, before, all;
        for (int i = 0; i < kBins / kThreads; ++i) own[i] = sum += bins[threadIdx.x * (kBins / kThreads) + i];
        Scan(storage).ExclusiveSum(sum, before, all);
        for (int i = 0; i < kBins / kThreads; ++i) bins[threadIdx.x * (kBins / kThreads) + i] = total + before + own[i];
        __syncthreads();
        const int end = min(kBins, axis.num_segments - first_bin);
        for (int i = threadIdx.x; i < end; i += kThreads) counts[first_bin + i] = bins[i];
        total += all;
        __syncthreads();
    }
}

// The rows of a segment and the rank that is num_kept-th in its document, counted from the best of all.
struct Segment {
    int document, begin, end, place;
    bool is_first;

    __device__ Segment(const SelectionAxis& axis, int segment) {
        document = axis.document_of_segment(segment);
        const int start = axis.bound(document), inside = segment - axis.first_segment_of(document);
        is_first = inside == 0;
        begin = start + inside * axis.segment_size;
        end = min(begin + axis.segment_size, axis.bound(document + 1));
        place = start + axis.num_kept;
    }
};

// The worst surviving rank at the end of every segment, kNever while all survive. 32 segments a block: the counts
// tell which rank block holds it, the rows of that block which rank it is.
__global__ void find_thresholds(
    SelectionAxis axis,
    const int* rows,    // (R, Sk), by rank
    const int* counts,  // (R, rank blocks, segments)
    int rank_block_size,
    int num_rank_blocks,
    int* thresholds) {  // (R, segments)
    constexpr int kWarps = kThreads / 32;
    __shared__ int sums[kWarps][32];
    __shared__ int found_block[32], found_place[32], ends[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int segment = blockIdx.x * 32 + lane;
    const bool exists = segment < axis.segment_count();
    rows += int64_t(blockIdx.y) * axis.seqlen;
    counts += int64_t(blockIdx.y) * num_rank_blocks * axis.num_segments + segment;
    thresholds += int64_t(blockIdx.y) * axis.num_segments + blockIdx.x * 32;

    int wanted = 0, first_block = 0, end = 0;
    if (exists) {
        const Segment here(axis, segment);
        end = here.end;
        wanted = here.place <= here.end ? here.place : 0;
        first_block = (here.place - axis.num_kept) / rank_block_size;
    }
    if (warp == 0) {
        found_block[lane] = -1;
        ends[lane] = end;
    }
    const int per_warp = ceil_div(num_rank_blocks, kWarps);
    const int low = max(warp * per_warp, first_block), high = min((warp + 1) * per_warp, num_rank_blocks);
    int sum = 0;
    if (wanted > 0) {
#pragma unroll 8
        for (int block = low; block < high; ++block) sum += counts[int64_t(block) * axis.num_segments];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    int before = first_block * rank_block_size;
    for (int i = 0; i < warp; ++i) before += sums[i][lane];
    if (wanted > before && wanted <= before + sum) {
        int block = low;
        for (int next; (next = before + counts[int64_t(block) * axis.num_segments]) < wanted; ++block) before = next;
        found_block[lane] = block;
        found_place[lane] = wanted - before;
    }
    __syncthreads();

    for (int i = warp; i < 32 && blockIdx.x * 32 + i < axis.num_segments; i += kWarps) {
        if (found_block[i] < 0) {
            if (lane == 0) thresholds[i] = kNever;
            continue;
        }
        const int begin = found_block[i] * rank_block_size, before_row = ends[i];
        int missing = found_place[i];
        for (int offset = 0; offset < rank_block_size && missing > 0; offset += 128) {
            int row[4];
            for (int k = 0; k < 4; ++k) {
                const int place = begin + offset + k * 32 + lane;
                row[k] = place < axis.seqlen ? rows[place] : kNever;
            }
            for (int k = 0; k < 4; ++k) {
                const bool is_before = row[k] < before_row;
                const unsigned mask = __ballot_sync(0xffffffffu, is_before);
                if (is_before && __popc(mask & (0xffffffffu >> (31 - lane))) == missing)
                    thresholds[i] = begin + offset + k * 32 + lane;
                missing -= __popc(mask);
            }
        }
    }
}

// Every key: dead on arrival, evicted in a later segment (noted there), in its own one (left to be solved), or never.
__global__ void place_keys(
    SelectionAxis axis,
    const int* ranks,       // (R, Sk), by row
    const int* thresholds,  // (R, segments)
    int num_heads,
    int* num_evicted,  // (R, segments)
    int* evicted,      // (R, Sk), rows evicted in a segment, from the segment's first row on
    int* birth,
    int* death) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= axis.seqlen) return;
    const int lane = blockIdx.y, batch = lane / num_heads;
    const int64_t offset = int64_t(lane) * axis.seqlen;
    const int document = axis.document_of(row);
    const int start = axis.bound(document), end = axis.bound(document + 1);
    int evicted_at = kNever;
    if (axis.num_kept == 0) {
        evicted_at = row;
    } else if (end - start > axis.num_kept) {
        thresholds += int64_t(lane) * axis.num_segments;
        const int rank = ranks[offset + row];
        const int first = axis.first_segment_of(document), last = axis.first_segment_of(document + 1);
        const int own = first + (row - start) / axis.segment_size;
        if (own > first && rank > thresholds[own - 1]) {
            evicted_at = row;
        } else {
            int low = own, high = last;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (rank > thresholds[middle]) high = middle;
                else low = middle + 1;
            }
            if (low > own && low < last) {
                // One addition for all threads of the warp with the same segment.
                const unsigned same = __match_any_sync(__activemask(), low);
                const int leader = __ffs(same) - 1, self = threadIdx.x % 32;
                int index = 0;
                if (self == leader)
                    index = atomicAdd(&num_evicted[int64_t(lane) * axis.num_segments + low], __popc(same));
                index = __shfl_sync(same, index, leader) + __popc(same & ((1u << self) - 1));
                // Never more than the segment has rows.
                if (index < axis.segment_size) {
                    evicted[offset + min(start + (low - first) * axis.segment_size + index, axis.seqlen - 1)] = row;
                }
            }
        }
    }
    birth[offset + row] = row;
    death[offset + row] = axis.death(batch, row, start, end, evicted_at);
}

// A block per segment.
__global__ void __launch_bounds__(kThreads) evict_keys(
    SelectionAxis axis,
    const int* ranks,        // (R, Sk), by row
    const int* thresholds,   // (R, segments)
    const int* num_evicted,  // (R, segments)
    const int* evicted,      // (R, Sk)
    int num_heads,
    int* death) {
    using Scan = cub::BlockScan<int, kThreads>;
    __shared__ typename Scan::TempStorage storage;
    __shared__ int4 candidate_ranks[kMaxSegment / 4 + 1], arrival_ranks[kMaxSegment / 4 + 1];
    __shared__ int candidate_rows[kMaxSegment], arrival_rows[kMaxSegment];
    if (int(blockIdx.x) >= axis.segment_count()) return;
    const int lane = blockIdx.y, batch = lane / num_heads;
    const int64_t offset = int64_t(lane) * axis.seqlen;
    const Segment here(axis, blockIdx.x);
    const int start = axis.bound(here.document), document_end = axis.bound(here.document + 1);
    ranks += offset;
    thresholds += int64_t(lane) * axis.num_segments + blockIdx.x;
    const int before = here.is_first ? kNever : thresholds[-1], after = thresholds[0];
    if (after == kNever) return;

    int* const candidates = reinterpret_cast<int*>(candidate_ranks);
    int* const arrivals = reinterpret_cast<int*>(arrival_ranks);
    const int length = here.end - here.begin;
    const int num_candidates = min(num_evicted[int64_t(lane) * axis.num_segments + blockIdx.x], length);
    for (int i = threadIdx.x; i < num_candidates; i += kThreads) {
        const int row = evicted[offset + here.begin + i];
        candidate_rows[i] = row;
        candidates[i] = ranks[row];
    }
    if (threadIdx.x < 3) candidates[num_candidates + threadIdx.x] = -1;  // completes a group of four
    int num_arrivals = 0;
    for (int first = 0; first < length; first += kThreads) {
        const int row = here.begin + first + threadIdx.x;
        const int rank = row < here.end ? ranks[row] : kNever;
        const bool arrives = row < here.end && rank <= before;
        int index, all;
        Scan(storage).ExclusiveSum(int(arrives), index, all);
        if (arrives) {
            arrival_rows[num_arrivals + index] = row;
            arrivals[num_arrivals + index] = rank;
        }
        num_arrivals += all;
        __syncthreads();
    }
    if (threadIdx.x < 4) arrivals[num_arrivals + threadIdx.x] = kNever;
    __syncthreads();

    const int unfilled = before == kNever ? here.place - here.begin : 0;
    for (int i = threadIdx.x; i < num_candidates + num_arrivals; i += kThreads) {
        const bool is_candidate = i < num_candidates;
        const int rank = is_candidate ? candidates[i] : arrivals[i - num_candidates];
        if (rank <= after) continue;
        const int row = is_candidate ? candidate_rows[i] : arrival_rows[i - num_candidates];
        // Better keys that have to arrive before num_kept beat it.
        int missing = unfilled;
        for (int k = 0; k < ceil_div(num_candidates, 4); ++k) {
            const int4 other = candidate_ranks[k];
            missing += (other.x >= rank) + (other.y >= rank) + (other.z >= rank) + (other.w >= rank);
        }
        int evicted_at = row;
        if (missing > 0) {
            int k = 0;
            for (; k < num_arrivals; k += 4) {
                const int4 other = arrival_ranks[k / 4];
                const int better = (other.x < rank) + (other.y < rank) + (other.z < rank) + (other.w < rank);
                if (better >= missing) break;
                missing -= better;
            }
            for (; k < num_arrivals; ++k) {
                missing -= arrivals[k] < rank;
                if (missing == 0) break;
            }
            evicted_at = max(row, arrival_rows[min(k, num_arrivals - 1)]);
        }
        death[offset + row] = axis.death(batch, row, start, document_end, evicted_at);
    }
}

// Not causal: the best of a document are seen by all of it, the others by nobody.
__global__ void keep_best(
    SelectionAxis axis,
    const int* rows,  // (R, Sk), by rank
    int num_heads,
    int* birth,
    int* death) {
    const int place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= axis.seqlen) return;
    const int64_t offset = int64_t(blockIdx.y) * axis.seqlen;
    const int row = rows[offset + place];
    const int document = axis.document_of(row);
    const int start = axis.bound(document);
    const bool is_seen = place - start < axis.num_kept && axis.is_real(blockIdx.y / num_heads, row);
    birth[offset + row] = is_seen ? start : row;
    death[offset + row] = !is_seen ? row : axis.cu_seqlens ? axis.bound(document + 1) : kNever;
}

// Sizes and addresses of one call. Ranks and counts overwrite the sort keys, noted evictions the spare order.
struct Plan {
    int num_lanes, num_segments, rank_block_size, num_rank_blocks, key_bits;
    bool has_evictions, has_order;
    int64_t num_keys;
    size_t sort_bytes = 0, total = 0;
    size_t keys[2], rows[2], sort, thresholds, num_evicted, real_before, real_rows, first_segment;

    explicit Plan(const flash_dmattn_select_params& p) {
        num_lanes = p.batch * p.num_heads;
        num_keys = int64_t(num_lanes) * p.seqlen;
        has_evictions = p.is_causal && p.num_kept > 0 && p.num_kept < p.seqlen;
        has_order = has_evictions || !p.is_causal;
        num_segments = ceil_div(p.seqlen, p.segment_size);
        if (p.cu_seqlens) num_segments += min(int64_t(p.num_docs), int64_t(p.seqlen) / (int64_t(p.num_kept) + 1));
        rank_block_size = 1024;
        while (int64_t(ceil_div(p.seqlen, rank_block_size)) * num_segments > 2 * int64_t(p.seqlen)) rank_block_size *= 2;
        num_rank_blocks = ceil_div(p.seqlen, rank_block_size);
        key_bits = 32;
        while ((int64_t(num_lanes) * p.num_docs - 1) >> (key_bits - 32)) ++key_bits;
        if (has_order) {
            for (size_t& place : keys) place = take(num_keys * sizeof(uint64_t));
            for (size_t& place : rows) place = take(num_keys * sizeof(int));
            cub::DoubleBuffer<uint64_t> key_buffers(nullptr, nullptr);
            cub::DoubleBuffer<int> row_buffers(nullptr, nullptr);
            cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, key_buffers, row_buffers, int(num_keys), 0, key_bits);
            sort = take(sort_bytes);
        }
        if (has_evictions) {
            thresholds = take(int64_t(num_lanes) * num_segments * sizeof(int));
            num_evicted = take(int64_t(num_lanes) * num_segments * sizeof(int));
        }
        if (p.padding_mask) {
            real_before = take(int64_t(p.batch) * (p.seqlen + 1) * sizeof(int));
            real_rows = take(int64_t(p.batch) * p.seqlen * sizeof(int));
        }
        if (p.cu_seqlens) first_segment = take((int64_t(p.num_docs) + 1) * sizeof(int));
    }

    size_t take(size_t bytes) {
        const size_t place = total;
        total += (bytes + 255) / 256 * 256;
        return place;
    }
};

template <typename Element>
void launch_make_sort_keys(
    const flash_dmattn_select_params& p,
    const SelectionAxis& axis,
    dim3 grid,
    uint64_t* keys,
    int* rows,
    int* num_evicted,
    int num_counters,
    cudaStream_t stream) {
    make_sort_keys<<<grid, kThreads, 0, stream>>>(
        axis,
        static_cast<const Element*>(p.importance),
        p.importance_strides[0],
        p.importance_strides[1],
        p.importance_strides[2],
        p.num_heads,
        keys,
        rows,
        num_evicted,
        num_counters);
}

cudaError_t select(const flash_dmattn_select_params& p, cudaStream_t stream) {
    const Plan plan(p);
    if (plan.num_keys == 0) return cudaSuccess;
    if (size_t(p.workspace_bytes) < plan.total || p.segment_size < 1 || p.segment_size > kMaxSegment)
        return cudaErrorInvalidValue;
    char* const base = static_cast<char*>(p.workspace);
    const auto ints = [base](size_t place) { return reinterpret_cast<int*>(base + place); };

    SelectionAxis axis{};
    axis.padding_mask = p.padding_mask;
    axis.cu_seqlens = p.cu_seqlens;
    axis.seqlen = p.seqlen;
    axis.num_docs = p.num_docs;
    axis.num_segments = plan.num_segments;
    axis.segment_size = p.segment_size;
    axis.num_kept = p.num_kept;
    axis.num_sink_tokens = p.num_sink_tokens;
    axis.local_window_size = p.local_window_size;
    axis.sliding_window = p.sliding_window;
    if (p.padding_mask) {
        axis.real_before = ints(plan.real_before);
        axis.real_rows = ints(plan.real_rows);
        count_real_tokens<<<p.batch, 1024, 0, stream>>>(
            p.padding_mask, p.seqlen, ints(plan.real_before), ints(plan.real_rows));
    }
    if (p.cu_seqlens) {
        axis.first_segment = ints(plan.first_segment);
        number_segments<<<1, 1024, 0, stream>>>(axis, ints(plan.first_segment));
    }
    const dim3 per_row(ceil_div(p.seqlen, kThreads), plan.num_lanes);
    int* num_evicted = plan.has_evictions ? ints(plan.num_evicted) : nullptr;
    if (!plan.has_order) {
        axis.num_kept = p.num_kept == 0 ? 0 : kNever;
        place_keys<<<per_row, kThreads, 0, stream>>>(
            axis, nullptr, nullptr, p.num_heads, nullptr, nullptr, p.birth, p.death);
        return cudaGetLastError();
    }

    cub::DoubleBuffer<uint64_t> keys(
        reinterpret_cast<uint64_t*>(base + plan.keys[0]), reinterpret_cast<uint64_t*>(base + plan.keys[1]));
    cub::DoubleBuffer<int> rows(ints(plan.rows[0]), ints(plan.rows[1]));
    const auto make_keys = p.importance_type == 0   ? launch_make_sort_keys<float>
                           : p.importance_type == 1 ? launch_make_sort_keys<__nv_bfloat16>
                                                    : launch_make_sort_keys<__half>;
    make_keys(
        p, axis, per_row, keys.Current(), rows.Current(), num_evicted, num_evicted ? plan.num_segments : 0, stream);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    size_t sort_bytes = plan.sort_bytes;
    error = cub::DeviceRadixSort::SortPairs(
        base + plan.sort, sort_bytes, keys, rows, int(plan.num_keys), 0, plan.key_bits, stream);
    if (error != cudaSuccess) return error;
    if (!p.is_causal) {
        keep_best<<<per_row, kThreads, 0, stream>>>(axis, rows.Current(), p.num_heads, p.birth, p.death);
        return cudaGetLastError();
    }

    int* const ranks = reinterpret_cast<int*>(keys.Current());
    int* const counts = reinterpret_cast<int*>(keys.Alternate());
    int* const evicted = rows.Alternate();
    int* const thresholds = ints(plan.thresholds);
    const auto rank = plan.num_segments <= kFewBins ? rank_keys<kFewBins> : rank_keys<kManyBins>;
    rank<<<dim3(plan.num_rank_blocks, plan.num_lanes), kThreads, 0, stream>>>(
        axis, rows.Current(), plan.rank_block_size, ranks, counts);
    find_thresholds<<<dim3(ceil_div(plan.num_segments, 32), plan.num_lanes), kThreads, 0, stream>>>(
        axis, rows.Current(), counts, plan.rank_block_size, plan.num_rank_blocks, thresholds);
    place_keys<<<per_row, kThreads, 0, stream>>>(
        axis, ranks, thresholds, p.num_heads, num_evicted, evicted, p.birth, p.death);
    evict_keys<<<dim3(plan.num_segments, plan.num_lanes), kThreads, 0, stream>>>(
        axis, ranks, thresholds, num_evicted, evicted, p.num_heads, p.death);
    return cudaGetLastError();
}

}  // namespace
}  // namespace flash_dmattn

extern "C" int64_t flash_dmattn_select_workspace(const flash_dmattn_select_params* params) {
    return int64_t(flash_dmattn::Plan(*params).total);
}

extern "C" int flash_dmattn_select(const flash_dmattn_select_params* params, void* stream) {
    return flash_dmattn::select(*params, static_cast<cudaStream_t>(stream));
}
