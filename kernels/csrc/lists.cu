// Key lists: for every epoch of queries the keys that its queries have to look at, in two launches.
//
// Where keys are born in order of their number, they are cut into chunks between the first rows of epochs, and every
// chunk is sorted by the epoch in which its keys die, the last first. What lives on in an epoch is then the front of
// each older chunk, as long as a table of (chunk, epoch) says; prefix sums over the chunks tell where each key goes.
// Within its list a dying key goes by the query tile in which it dies. Every order follows from the input alone, so
// equal inputs give equal lists. Keys in another order (those of bidirectional blocks) are looked at one by one in every
// epoch.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>
#include <cuda/functional>

#include "api.h"
#include "lists.h"

namespace flash_dmattn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxEpoch = 2048;
constexpr int kFewTiles = 128, kManyTiles = 2048;
constexpr int kWindow = 2048;  // chunks whose prefix sums are in shared memory at once
constexpr int kMinChunk = 512;
constexpr int kIndexBits = 11;      // of a key within its chunk
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLargestBias = 2.3e38f;  // times log2(e) it is still finite

using Scan = cub::BlockScan<int, kThreads>;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rounds up, for numerators of either sign.
__device__ int ceil_div_signed(int64_t a, int b) { return int(a > 0 ? (a + b - 1) / b : -(-a / b)); }

struct Lists {
    flash_dmattn_lists_params p;
    int chunk_size;        // keys
    int num_chunks;        // most chunks there can be
    int* sorted;           // (R, chunks, chunk_size), keys of a chunk, the last epoch of life first
    uint16_t* lengths;     // (R, chunks, epochs + 1), keys of a chunk that live at an epoch's first row
    int* is_out_of_order;  // (R, chunks), whether a listed key's birth is not its own number

    __device__ int start(int lane) const { return p.query_start ? p.query_start[lane / p.num_heads] : 0; }

    // Chunks of keys that no query row precedes; those of chunk c are born after `start + (c - 1 - old) * chunk_size`.
    __device__ int old_chunks(int start) const { return ceil_div_signed(start, chunk_size); }

    __device__ float importance(int lane, int key) const {
        const int64_t batch = lane / p.num_heads, head = lane % p.num_heads;
        const int64_t* stride = p.importance_strides;
        return p.importance[batch * stride[0] + head * stride[1] + key * stride[2]];
    }

    __device__ bool is_listed(int lane, int key, int birth, int death) const {
        return birth < death && (!p.importance || importance(lane, key) > -INFINITY);
    }
};

// A block per chunk of kSize keys. The order of keys that die in the same epoch is that of the threads.
template <int kSize>
__global__ void __launch_bounds__(kThreads) sort_chunks(Lists lists) {
    constexpr int kBlock = kSize < kThreads ? kSize : kThreads, kItems = kSize / kBlock;
    using Sort = cub::BlockRadixSort<uint32_t, kBlock, kItems>;
    __shared__ union {
        typename Sort::TempStorage sort;
        uint32_t keys[kSize];
    } shared;
    const auto& p = lists.p;
    const int chunk = blockIdx.x, lane = blockIdx.y;
    const int start = lists.start(lane);
    const int age = chunk - lists.old_chunks(start);  // in chunks after the first query row
    const int64_t first = int64_t(start) + int64_t(age - 1) * kSize + 1;
    const int64_t offset = int64_t(lane) * p.seqlen_k;
    const int limit = p.num_epochs + 1;
    bool is_out_of_order = false;
    uint32_t order[kItems];  // last epoch of life, counted from the end, then the number in the chunk
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
        const int i = k * kBlock + threadIdx.x;
        const int64_t key = first + i;
        int epochs = 0;  // it lives at the first rows of the epochs before this one
        if (key >= 0 && key < p.seqlen_k) {
            const int birth = p.birth[offset + key], death = p.death[offset + key];
            if (lists.is_listed(lane, int(key), birth, death)) {
                is_out_of_order |= birth != key;
                const int64_t span = int64_t(death) - start;
                epochs = span <= 0 ? 0 : int(min((span + p.epoch_size - 1) / p.epoch_size, int64_t(limit)));
            }
        }
        order[k] = uint32_t(limit - epochs) << kIndexBits | i;
    }
    is_out_of_order = __syncthreads_or(is_out_of_order);
    if (threadIdx.x == 0) lists.is_out_of_order[int64_t(lane) * lists.num_chunks + chunk] = is_out_of_order;
    Sort(shared.sort).SortBlockedToStriped(order, kIndexBits, kIndexBits + 32 - __clz(limit));
    __syncthreads();
    int* sorted = lists.sorted + (int64_t(lane) * lists.num_chunks + chunk) * kSize;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
        shared.keys[k * kBlock + threadIdx.x] = order[k];
        sorted[k * kBlock + threadIdx.x] = int(first + (order[k] & ((1 << kIndexBits) - 1)));
    }
    __syncthreads();
    uint16_t* lengths = lists.lengths + (int64_t(lane) * lists.num_chunks + chunk) * limit;
    for (int epoch = max(age, 0) + threadIdx.x; epoch < limit; epoch += kBlock) {
        const uint32_t bound = uint32_t(limit - epoch) << kIndexBits;  // keys below it live longer
        int low = 0, high = kSize;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (shared.keys[middle] < bound) low = middle + 1;
            else high = middle;
        }
        lengths[epoch] = uint16_t(low);
    }
}

// One epoch of one lane; all its threads call every member together.
template <int kMaxTiles>
struct Epoch {
    enum Kind { kDying, kWhole, kBorn };

    struct Shared {
        typename Scan::TempStorage scan;
        int whole_before[kWindow + 1], dying_before[kWindow + 1];
        int bucket_begin[kMaxTiles + 2];  // dying keys that die at or before a tile's first row
        int last_place[kMaxTiles + 1];    // after the last key born in a tile
        int warp_count[kWarps];
        uint8_t bucket_count[kWarps][kMaxTiles + 2];
        bool has_rows[kMaxTiles];
        int low, high;
    };

    const Lists& lists;
    Shared& shared;
    const int epoch, lane;
    const int64_t key_offset;
    int64_t first, last;  // rows
    int64_t next;         // a key that dies behind this row needs no comparison
    bool in_order;
    int num_chunks;  // those alive at the first row; with keys in order
    int loaded_window = -1;

    __device__ Epoch(const Lists& lists, Shared& shared, int epoch, int lane)
        : lists(lists), shared(shared), epoch(epoch), lane(lane), key_offset(int64_t(lane) * lists.p.seqlen_k) {}

    __device__ int birth(int key) const { return lists.p.birth[key_offset + key]; }
    __device__ int death(int key) const { return lists.p.death[key_offset + key]; }

    // Finds the rows, and which tiles have any. Returns whether there are any.
    __device__ bool find_rows() {
        const auto& p = lists.p;
        const int begin = epoch * p.epoch_size, end = min(begin + p.epoch_size, p.seqlen_q);
        const int start = lists.start(lane);
        first = int64_t(start) + begin;
        last = int64_t(start) + end - 1;
        next = first + p.epoch_size;
        in_order = p.query_start != nullptr;
        for (int i = threadIdx.x; i < p.tiles_per_epoch; i += kThreads)
            shared.has_rows[i] = !p.query_positions && begin + i * p.tile_size < end;
        if (!p.query_positions) return true;
        if (threadIdx.x == 0) {
            shared.low = 0x7fffffff;
            shared.high = -1;
        }
        __syncthreads();
        const int* positions = p.query_positions + int64_t(lane / p.num_heads) * p.seqlen_q;
        for (int query = begin + threadIdx.x; query < end; query += kThreads) {
            const int row = positions[query];
            if (row < 0) continue;
            shared.has_rows[(query - begin) / p.tile_size] = true;
            atomicMin(&shared.low, row);
            atomicMax(&shared.high, row);
        }
        __syncthreads();
        if (!p.query_start) {
            first = shared.low;
            next = last = shared.high;
        }
        return shared.high >= 0;
    }

    __device__ void find_order() {
        if (in_order) {
            bool differs = false;
            const int* flags = lists.is_out_of_order + int64_t(lane) * lists.num_chunks;
            for (int i = threadIdx.x; i < lists.num_chunks; i += kThreads) differs |= flags[i] != 0;
            in_order = !__syncthreads_or(differs);
        }
        if (in_order) {
            const int start = lists.start(lane);
            num_chunks = max(0, min(lists.old_chunks(start) + epoch + 1, lists.num_chunks));
        }
    }

    // Prefix sums over the chunks of one window.
    __device__ void load_window(int window) {
        if (loaded_window == window) return;
        loaded_window = window;
        constexpr int kItems = kWindow / kThreads;
        const int limit = lists.p.num_epochs + 1;
        int whole[kItems], dying[kItems], num_whole = 0, num_dying = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const int chunk = window * kWindow + threadIdx.x * kItems + i;
            int now = 0, later = 0;
            if (chunk < num_chunks) {
                const int64_t place = (int64_t(lane) * lists.num_chunks + chunk) * limit + epoch;
                now = lists.lengths[place];
                later = lists.lengths[place + 1];
            }
            whole[i] = later;
            dying[i] = now - later;
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            num_whole += whole[i];
            num_dying += dying[i];
        }
        int whole_before, dying_before, all;
        __syncthreads();
        Scan(shared.scan).ExclusiveSum(num_whole, whole_before, all);
        if (threadIdx.x == 0) shared.whole_before[kWindow] = all;
        __syncthreads();
        Scan(shared.scan).ExclusiveSum(num_dying, dying_before, all);
        if (threadIdx.x == 0) shared.dying_before[kWindow] = all;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            shared.whole_before[threadIdx.x * kItems + i] = whole_before;
            shared.dying_before[threadIdx.x * kItems + i] = dying_before;
            whole_before += whole[i];
            dying_before += dying[i];
        }
        __syncthreads();
    }

    // The place of the index-th key that the prefix sums of a window count, in the sorted chunks.
    __device__ int64_t find(int window, const int* before, int index, bool is_dying) const {
        const int end = min(kWindow, num_chunks - window * kWindow);
        int low = 0;
        for (int step = 1 << (31 - __clz(end)); step > 0; step /= 2)
            if (low + step < end && before[low + step] <= index) low += step;
        int place = index - before[low];
        if (is_dying) place += shared.whole_before[low + 1] - shared.whole_before[low];
        return (int64_t(lane) * lists.num_chunks + window * kWindow + low) * lists.chunk_size + place;
    }

    // Writes an entry of the epoch's list.
    __device__ void write(int place, int key) {
        const auto& p = lists.p;
        if (place >= p.capacity) return;
        const int64_t index = (int64_t(lane) * p.num_epochs + epoch) * p.capacity + place;
        p.entries[index] = key;
        if (p.biases) p.biases[index] = fminf(lists.importance(lane, key), kLargestBias) * kLog2E;
    }

    // Writes the keys that the whole epoch sees, from place `count` on. Returns the place after the last.
    __device__ int write_whole(int count) {
        if (!in_order) {
            for_each<kWhole>([&](bool is_member, int key) {
                const int place = rank(is_member, count);
                if (is_member) write(place, key);
            });
            return count;
        }
        for (int window = 0; window * kWindow < num_chunks; ++window) {
            load_window(window);
            const int size = shared.whole_before[kWindow];
#pragma unroll 4
            for (int index = threadIdx.x; index < size; index += kThreads)
                write(count + index, lists.sorted[find(window, shared.whole_before, index, false)]);
            count += size;
        }
        return count;
    }

    // Calls body(is_member, key) for the keys of a kind, in an order that is always the same, kThreads at a time.
    template <Kind kKind, typename Body>
    __device__ void for_each(Body body) {
        const auto& p = lists.p;
        if (in_order && kKind != kBorn) {
            for (int window = 0; window * kWindow < num_chunks; ++window) {
                load_window(window);
                const int* before = kKind == kDying ? shared.dying_before : shared.whole_before;
                const int count = before[kWindow];
                for (int offset = 0; offset < count; offset += kThreads) {
                    const int index = offset + threadIdx.x;
                    int key = 0;
                    if (index < count) key = lists.sorted[find(window, before, index, kKind == kDying)];
                    body(index < count, key);
                }
            }
            return;
        }
        int64_t begin = 0, end = p.seqlen_k;
        if (in_order) {
            begin = max(begin, first + 1);
            end = min(end, last + 1);
        }
        for (int64_t offset = begin; offset < end; offset += kThreads) {
            const int64_t key = offset + threadIdx.x;
            bool is_member = false;
            if (key < end) {
                const int born = birth(int(key)), dies = death(int(key));
                is_member = kKind == kBorn ? born > first && born <= last : born <= first && dies > first;
                if (kKind != kBorn) is_member &= (dies > next) == (kKind == kWhole);
                is_member = is_member && lists.is_listed(lane, int(key), born, dies);
            }
            body(is_member, int(key));
        }
    }

    // The number of members among the threads before this one; adds all of them to `count`.
    __device__ int rank(bool is_member, int& count) {
        const unsigned mask = __ballot_sync(0xffffffffu, is_member);
        const int warp = threadIdx.x / 32;
        if (threadIdx.x % 32 == 0) shared.warp_count[warp] = __popc(mask);
        __syncthreads();
        int before = count + __popc(mask & ((1u << threadIdx.x % 32) - 1));
        for (int i = 0; i < kWarps; ++i) {
            if (i < warp) before += shared.warp_count[i];
            count += shared.warp_count[i];
        }
        __syncthreads();
        return before;
    }

    // The tile at whose first row, or before it, a dying key is dead; 1 where rows are in no order.
    __device__ int bucket(int key) const {
        return lists.p.query_start ? int((death(key) - first + lists.p.tile_size - 1) / lists.p.tile_size) : 1;
    }
};

// A block per epoch.
template <int kMaxTiles>
__global__ void __launch_bounds__(kThreads) fill_lists(Lists lists) {
    using Epoch = Epoch<kMaxTiles>;
    extern __shared__ __align__(16) char shared_bytes[];
    auto& shared = *reinterpret_cast<typename Epoch::Shared*>(shared_bytes);
    const auto& p = lists.p;
    const int tiles = p.tiles_per_epoch, warp = threadIdx.x / 32;
    Epoch epoch(lists, shared, blockIdx.x, blockIdx.y);
    const int64_t list = int64_t(blockIdx.y) * p.num_epochs + blockIdx.x;
    int* const sections = p.sections + list * 3;
    int* const stretches = p.stretches + list * tiles * 2;

    if (!epoch.find_rows()) {
        if (threadIdx.x < 3) sections[threadIdx.x] = 0;
        for (int i = threadIdx.x; i < 2 * tiles; i += kThreads) stretches[i] = 0;
        return;
    }
    epoch.find_order();
    for (int i = threadIdx.x; i < tiles + 2; i += kThreads) {
        shared.bucket_begin[i] = 0;
        for (int k = 0; k < kWarps; ++k) shared.bucket_count[k][i] = 0;
    }
    __syncthreads();

    epoch.template for_each<Epoch::kDying>([&](bool is_member, int key) {
        if (is_member) atomicAdd(&shared.bucket_begin[min(epoch.bucket(key), tiles) + 1], 1);
    });
    __syncthreads();
    int num_dying = 0;
    for (int offset = 0; offset < tiles + 2; offset += kThreads) {
        const int i = offset + threadIdx.x;
        int before, all;
        Scan(shared.scan).InclusiveSum(i < tiles + 2 ? shared.bucket_begin[i] : 0, before, all);
        if (i < tiles + 2) shared.bucket_begin[i] = num_dying + before;
        num_dying += all;
        __syncthreads();
    }
    // bucket_begin[t] dying keys have a bucket below t: those of buckets up to t are dead at tile t's first row.
    const bool rows_in_order = p.query_start != nullptr;
    for (int i = threadIdx.x; i < tiles; i += kThreads)
        stretches[2 * i] = rows_in_order && shared.has_rows[i] ? min(shared.bucket_begin[i + 1], p.capacity) : 0;
    __syncthreads();

    epoch.template for_each<Epoch::kDying>([&](bool is_member, int key) {
        const int own = is_member ? min(epoch.bucket(key), tiles) : -1;
        const unsigned equals = __match_any_sync(0xffffffffu, own);
        const int before = __popc(equals & ((1u << threadIdx.x % 32) - 1));
        const bool leads = is_member && before == 0;
        if (leads) shared.bucket_count[warp][own] = uint8_t(__popc(equals));
        __syncthreads();
        if (is_member) {
            int place = shared.bucket_begin[own] + before;
            for (int k = 0; k < warp; ++k) place += shared.bucket_count[k][own];
            epoch.write(place, key);
        }
        __syncthreads();
        if (leads) {
            atomicAdd(&shared.bucket_begin[own], __popc(equals));
            shared.bucket_count[warp][own] = 0;
        }
        __syncthreads();
    });

    const int num_alive = epoch.write_whole(num_dying);
    int count = num_alive;

    for (int i = threadIdx.x; i < tiles; i += kThreads) shared.last_place[i] = num_alive;
    __syncthreads();
    epoch.template for_each<Epoch::kBorn>([&](bool is_member, int key) {
        const int place = epoch.rank(is_member, count);
        if (!is_member) return;
        epoch.write(place, key);
        const int tile = rows_in_order ? int((epoch.birth(key) - epoch.first) / p.tile_size) : 0;
        atomicMax(&shared.last_place[tile], place + 1);
    });
    __syncthreads();
    int highest = 0;
    for (int offset = 0; offset < tiles; offset += kThreads) {
        const int i = offset + threadIdx.x;
        int place = max(highest, i < tiles ? shared.last_place[i] : 0), all;
        Scan(shared.scan).InclusiveScan(place, place, cuda::maximum<int>{}, all);
        if (i < tiles) stretches[2 * i + 1] = shared.has_rows[i] ? min(place, p.capacity) : 0;
        highest = all;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        sections[0] = min(num_dying, p.capacity);
        sections[1] = min(num_alive, p.capacity);
        sections[2] = min(count, p.capacity);
    }
}

template <int kMaxTiles>
cudaError_t launch_fill_lists(const Lists& lists, dim3 grid, cudaStream_t stream) {
    const int bytes = sizeof(typename Epoch<kMaxTiles>::Shared);
    const cudaError_t error =
        cudaFuncSetAttribute(fill_lists<kMaxTiles>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    fill_lists<kMaxTiles><<<grid, kThreads, bytes, stream>>>(lists);
    return cudaGetLastError();
}

template <int kSize>
void launch_sort_chunks(const Lists& lists, int lanes, cudaStream_t stream) {
    constexpr int kBlock = kSize < kThreads ? kSize : kThreads;
    sort_chunks<kSize><<<dim3(lists.num_chunks, lanes), kBlock, 0, stream>>>(lists);
}

// Sizes and addresses of one call.
size_t plan(const flash_dmattn_lists_params& p, Lists* lists) {
    const int64_t lanes = int64_t(p.batch) * p.num_heads;
    // One epoch needs no chunks of its own size.
    const int chunk_size = p.num_epochs > 1 ? p.epoch_size : std::max(p.epoch_size, kMinChunk);
    const int num_chunks = ceil_div(p.seqlen_k, chunk_size) + 2;
    size_t total = 0;
    const auto take = [&total](size_t bytes) {
        const size_t place = total;
        total += (bytes + 255) / 256 * 256;
        return place;
    };
    size_t places[3] = {};
    if (p.query_start) {
        places[0] = take(lanes * num_chunks * chunk_size * sizeof(int));
        places[1] = take(lanes * num_chunks * (p.num_epochs + 1) * sizeof(uint16_t));
        places[2] = take(lanes * num_chunks * sizeof(int));
    }
    if (lists) {
        char* const base = static_cast<char*>(p.workspace);
        *lists = Lists{
            p,
            chunk_size,
            num_chunks,
            reinterpret_cast<int*>(base + places[0]),
            reinterpret_cast<uint16_t*>(base + places[1]),
            reinterpret_cast<int*>(base + places[2])};
    }
    return total;
}

}  // namespace
}  // namespace flash_dmattn

extern "C" int64_t flash_dmattn_lists_workspace(const flash_dmattn_lists_params* params) {
    return int64_t(flash_dmattn::plan(*params, nullptr));
}

extern "C" int flash_dmattn_lists(const flash_dmattn_lists_params* params, void* stream) {
    using namespace flash_dmattn;
    const auto& p = *params;
    Lists lists{};
    if (size_t(p.workspace_bytes) < plan(p, &lists) || p.epoch_size < 1 || p.epoch_size > kMaxEpoch ||
        (p.epoch_size & (p.epoch_size - 1)) || p.tiles_per_epoch < 1 || p.tiles_per_epoch > kManyTiles ||
        !(p.query_start || p.query_positions))
        return cudaErrorInvalidValue;
    const int lanes = p.batch * p.num_heads;
    if (lanes == 0 || p.num_epochs == 0) return cudaSuccess;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (p.query_start) {
        switch (lists.chunk_size) {
            case 128: launch_sort_chunks<128>(lists, lanes, cuda_stream); break;
            case 256: launch_sort_chunks<256>(lists, lanes, cuda_stream); break;
            case 512: launch_sort_chunks<512>(lists, lanes, cuda_stream); break;
            case 1024: launch_sort_chunks<1024>(lists, lanes, cuda_stream); break;
            case 2048: launch_sort_chunks<2048>(lists, lanes, cuda_stream); break;
            default: return cudaErrorInvalidValue;
        }
    }
    const dim3 grid(p.num_epochs, lanes);
    return p.tiles_per_epoch <= kFewTiles ? launch_fill_lists<kFewTiles>(lists, grid, cuda_stream)
                                          : launch_fill_lists<kManyTiles>(lists, grid, cuda_stream);
}
