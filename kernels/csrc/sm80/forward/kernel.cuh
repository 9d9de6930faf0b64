// Forward of interval attention for every architecture from sm_80 on.
//
// A block attends one query tile to its stretch of a key list. The rows of a tile are tokens x group heads of one
// interval head. All warps gather the listed rows of K and V into shared memory and multiply them by mma.sync, each
// for query rows of its own; while the warps of one block exponentiate, those of another on the same processor multiply.
#pragma once

#include "attend.cuh"

namespace flash_dmattn::sm80 {

template <typename Traits, bool kHasSoftcap>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    forward_kernel(const __grid_constant__ KernelParams p) {
    extern __shared__ __align__(1024) char smem[];
    const QueryTile queries(p, blockIdx.x);
    if (queries.num_tokens > 0) attend<Traits, kHasSoftcap>(p, queries, smem);
}

template <typename Traits>
cudaError_t launch_shape(const flash_dmattn_forward_params& p, cudaStream_t stream) {
    const auto kernel = p.softcap > 0 ? forward_kernel<Traits, true> : forward_kernel<Traits, false>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
    if (error != cudaSuccess) return error;
    // Tile numbers are int32, byte strides of rows uint32.
    const int64_t tiles = int64_t(p.batch) * p.num_interval_heads * p.num_epochs * p.tiles_per_epoch;
    const int64_t longest_row = int64_t(UINT32_MAX) / 2;
    if (tiles > INT32_MAX / 16 || p.key_strides[1] > longest_row || p.value_strides[1] > longest_row) {
        return cudaErrorInvalidValue;
    }
    kernel<<<int(tiles), Traits::kThreads, Traits::kSharedBytes, stream>>>(KernelParams(p));
    return cudaGetLastError();
}

template <typename Element, int kHeadDim>
cudaError_t launch_forward(const flash_dmattn_forward_params& p, cudaStream_t stream) {
    using Large = ForwardTraits<Element, kHeadDim, typename ForwardShapes<kHeadDim>::Large>;
    using Small = ForwardTraits<Element, kHeadDim, typename ForwardShapes<kHeadDim>::Small>;
    constexpr int kReserved = 1024;  // of every block, by the driver
    const bool has_room = Large::kBlocks * (Large::kSharedBytes + kReserved) <= p.shared_bytes + kReserved;
    if (has_room) return launch_shape<Large>(p, stream);
    return launch_shape<Small>(p, stream);
}

}  // namespace flash_dmattn::sm80
