// Backward of interval attention for every architecture from sm_80 on.
//
// A block takes one tile of an epoch's keys, gathers its rows of K and V once and walks the query tiles that see some of
// it. A query tile is kBlockM rows, tokens x group heads. Products are transposed, keys by queries, so that dkey, dvalue
// and dimportance stay in registers; weights and their gradients pass through shared memory, because each of the five
// products is shared out among the warps in its own way. dquery is added to fp32 sums in memory.
#pragma once

#include <algorithm>

#include "gradients.cuh"

namespace flash_dmattn::sm80 {

template <typename Traits, bool kHasSoftcap>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    backward_kernel(const __grid_constant__ BackwardKernelParams p) {
    extern __shared__ __align__(1024) char smem[];
    const WorkItem item(p, blockIdx.x, Traits::kBlockN, threadIdx.x % 32);
    if (item.num_tiles > 0) differentiate_item<Traits, kHasSoftcap>(p, item, smem);
}

template <typename Traits>
cudaError_t launch_backward_shape(const BackwardParams& p, EpochRange epochs, cudaStream_t stream) {
    const auto kernel = p.softcap > 0 ? backward_kernel<Traits, true> : backward_kernel<Traits, false>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
    if (error != cudaSuccess) return error;
    const int64_t key_tiles = (p.capacity + Traits::kBlockN - 1) / Traits::kBlockN;
    const int64_t items = int64_t(p.batch) * p.num_interval_heads * epochs.count * key_tiles;
    // Strides in bytes and places within the rows of an interval head are int32.
    const int64_t longest = std::max({p.query_strides[1], p.query_strides[2], int64_t(p.group_size) * p.seqlen_q});
    if (items > INT32_MAX || longest > INT32_MAX / 2) return cudaErrorInvalidValue;
    if (items == 0) return cudaSuccess;
    kernel<<<int(items), Traits::kThreads, Traits::kSharedBytes, stream>>>(
        BackwardKernelParams(p, epochs, Traits::kBlockN));
    return cudaGetLastError();
}

template <typename Element, int kHeadDim>
cudaError_t launch_backward(const BackwardParams& p, EpochRange epochs, cudaStream_t stream) {
    using Large = typename BackwardShapes<kHeadDim>::Large;
    using Small = typename BackwardShapes<kHeadDim>::Small;
    constexpr int kReserved = 1024;  // of every block, by the driver
    if (Large::kBlocks * (Large::shared_bytes(kHeadDim) + kReserved) <= p.shared_bytes + kReserved) {
        return launch_backward_shape<BackwardTraits<Element, kHeadDim, Large>>(p, epochs, stream);
    }
    if constexpr (!std::is_same_v<Small, NoShape>) {
        return launch_backward_shape<BackwardTraits<Element, kHeadDim, Small>>(p, epochs, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace flash_dmattn::sm80
