// Forward of interval attention for sm_90a.
//
// A persistent block attends one query tile after the other to its stretch of a key list. The rows of a tile are
// tokens x group heads of one interval head. A producer warpgroup gathers the listed rows of K and V into shared
// memory; consumer warpgroups take 64 query rows each and take turns on the tensor cores: while one multiplies, the
// other exponentiates.
#pragma once

#include "consumer.cuh"
#include "producer.cuh"

namespace flash_dmattn::sm90 {

template <typename Traits, bool kHasSoftcap>
__global__ void __launch_bounds__(Traits::kThreads, 1) forward_kernel(const __grid_constant__ Sm90Params p) {
    extern __shared__ __align__(1024) char smem[];
    const SharedMemory<Traits> shared{shared_address(smem)};
    if (threadIdx.x == 0) {
#pragma unroll
        for (int stage = 0; stage < Traits::kStages; ++stage) {
            // Every thread arrives for itself: at key_full when its biases are written, and again when its copies are.
            barrier_init(shared.key_full(stage), 2 * kWarpgroup);
            barrier_init(shared.key_empty(stage), Traits::kConsumers * kWarpgroup);
            barrier_init(shared.value_full(stage), kWarpgroup);
            barrier_init(shared.value_empty(stage), Traits::kConsumers * kWarpgroup);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 0) {
        shrink_registers<Traits::kProducerRegs>();
        produce<Traits>(p, smem);
    } else {
        grow_registers<Traits::kConsumerRegs>();
        consume<Traits, kHasSoftcap>(p, smem, warpgroup - 1);
    }
}

template <typename Element, int kHeadDim>
cudaError_t launch_forward(const flash_dmattn_forward_params& p, cudaStream_t stream) {
    using Traits = ForwardTraits<Element, kHeadDim>;
    const auto kernel = p.softcap > 0 ? forward_kernel<Traits, true> : forward_kernel<Traits, false>;
    int device, num_processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
    if (error != cudaSuccess) return error;
    // Tile numbers are int32, byte strides of rows uint32.
    const int64_t tiles = int64_t(p.batch) * p.num_interval_heads * p.num_epochs * p.tiles_per_epoch;
    const int64_t longest_row = int64_t(UINT32_MAX) / 2;
    if (tiles > INT32_MAX / 16 || p.key_strides[1] > longest_row || p.value_strides[1] > longest_row) {
        return cudaErrorInvalidValue;
    }
    const int blocks = tiles < num_processors ? int(tiles) : num_processors;
    kernel<<<blocks, Traits::kThreads, Traits::kSharedBytes, stream>>>(Sm90Params(p));
    return cudaGetLastError();
}

}  // namespace flash_dmattn::sm90
