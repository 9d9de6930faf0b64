// Block shapes by head dim of the forward for all architectures, and its launch, compiled one head dim and type a file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "forward.h"

namespace flash_dmattn {

using ForwardParams = flash_dmattn_forward_params;

constexpr int kMmaTileRows = 128;

// Keys of a tile, warps, tiles of K and of V in shared memory, blocks that share a processor.
template <int kBlockN_, int kWarps_, int kStages_, int kBlocks_>
struct MmaShape {
    static constexpr int kBlockM = kMmaTileRows;
    static constexpr int kBlockN = kBlockN_, kWarps = kWarps_, kStages = kStages_, kBlocks = kBlocks_;
};

// Small: for the 99 KB of shared memory of sm_86, sm_89 and sm_120. Large: for the 163 KB of sm_80 and more.
template <int kHeadDim>
struct MmaShapes;

template <>
struct MmaShapes<64> {
    using Large = MmaShape<64, 4, 1, 3>;
    using Small = MmaShape<64, 4, 1, 2>;
};
template <>
struct MmaShapes<96> {
    using Large = MmaShape<64, 4, 2, 2>;
    using Small = MmaShape<64, 8, 2, 1>;
};
template <>
struct MmaShapes<128> {
    using Large = MmaShape<64, 4, 1, 2>;
    using Small = MmaShape<64, 8, 2, 1>;
};
template <>
struct MmaShapes<192> {
    using Large = MmaShape<64, 8, 2, 1>;
    using Small = MmaShape<64, 8, 1, 1>;
};
template <>
struct MmaShapes<256> {
    using Large = MmaShape<64, 8, 1, 1>;
    using Small = MmaShape<32, 8, 1, 1>;
};

// Weak, so that a library with some of the head dims and types links: the others are null.
template <typename Element, int kHeadDim>
__attribute__((weak)) cudaError_t launch_mma_forward(const ForwardParams& params, cudaStream_t stream);

}  // namespace flash_dmattn
