// Backward of interval attention for sm_90a.
//
// A persistent block takes one tile of an epoch's keys after the other, gathers its rows of K and V once and walks the
// query tiles that see some of it. A query tile is kBlockM rows, tokens x group heads. Products are transposed, keys by
// queries, so that dkey, dvalue and dimportance stay in the registers of the two consumer warpgroups; dquery is added
// to fp32 sums in memory, which no two query tiles share. At the end of an item dkey and dvalue are added to theirs, and
// whoever ends the last item of an epoch's list turns its sums of dquery into dquery, and leaves them to a later list.
#pragma once

#include "consumer.cuh"
#include "order.cuh"
#include "producer.cuh"
#include "wide_consumer.cuh"

namespace flash_dmattn::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward_kernel(const __grid_constant__ BackwardKernelParams p) {
    extern __shared__ __align__(1024) char smem[];
    const BackwardMemory<Traits> shared{shared_address(smem)};
    if (threadIdx.x == 0) {
#pragma unroll
        for (int stage = 0; stage < Traits::kStages; ++stage) {
            // Every thread arrives for itself.
            barrier_init(shared.rows_full(stage), kWarpgroup);
            barrier_init(shared.rows_empty(stage), kWarpgroups * kWarpgroup);
        }
        barrier_init(shared.item_full(), 1);
        barrier_init(shared.keys_empty(), kWarpgroups * (kWarpgroup + Traits::kIsDeterministic));
        if constexpr (Traits::kIsDeterministic) {
#pragma unroll
            for (int i = 0; i < kWarpgroups; ++i) {
                barrier_init(shared.sums_full(i), kWarpgroup);
                barrier_init(shared.sums_empty(i), 1);
                barrier_init(shared.sums_added(i), kWarpgroup + 1);
            }
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 0) {
        shrink_registers<Traits::kProducerRegs>();
        produce_gradients<Traits>(p, smem);
    } else if (Traits::kIsDeterministic && warpgroup == 3) {
        shrink_registers<Traits::kProducerRegs>();
        const int warp = threadIdx.x / 32 % 4;
        if (warp < kWarpgroups && threadIdx.x % 32 == 0) keep_order<Traits>(p, smem, warp);
    } else {
        grow_registers<Traits::kConsumerRegs>();
        if constexpr (Traits::kSplitsHeadDim) {
            consume_wide<Traits>(p, smem, warpgroup - 1);
        } else {
            consume_rows<Traits>(p, smem, warpgroup - 1);
        }
    }
}

template <typename Element, int kHeadDim>
cudaError_t launch_backward(const BackwardParams& p, cudaStream_t stream) {
    using Traits = BackwardTraits<Element, kHeadDim, false, false>;
    auto kernel = backward_kernel<Traits>;
    if (p.softcap > 0 && p.deterministic) {
        kernel = backward_kernel<BackwardTraits<Element, kHeadDim, true, true>>;
    } else if (p.softcap > 0) {
        kernel = backward_kernel<BackwardTraits<Element, kHeadDim, true, false>>;
    } else if (p.deterministic) {
        kernel = backward_kernel<BackwardTraits<Element, kHeadDim, false, true>>;
    }
    int device, num_processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
    if (error != cudaSuccess) return error;
    // Item numbers are int32; byte offsets of rows within a query tile are uint32.
    const int64_t key_tiles = (p.capacity + Traits::kBlockN - 1) / Traits::kBlockN;
    const int64_t lists = int64_t(p.batch) * p.num_interval_heads * p.num_epochs;
    const int64_t items = (lists + 8) * key_tiles;
    const int64_t longest_tile = p.tile_size * (p.query_strides[1] + p.group_size * p.query_strides[2]);
    if (lists > INT32_MAX / 2 || items > INT32_MAX - 65536 || longest_tile > INT32_MAX / 2) return cudaErrorInvalidValue;
    const int blocks = lists * key_tiles < num_processors ? int(lists * key_tiles) : num_processors;
    using Ordered = BackwardTraits<Element, kHeadDim, false, true>;
    const int threads = p.deterministic ? Ordered::kThreads : Traits::kThreads;
    kernel<<<blocks, threads, Traits::kSharedBytes, stream>>>(BackwardKernelParams(p, Traits::kBlockN));
    return cudaGetLastError();
}

}  // namespace flash_dmattn::sm90
