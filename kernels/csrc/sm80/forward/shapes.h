// Block shapes of the sm80 forward by head dim, and its launch. One instance is compiled for each head dim and type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../params.h"

namespace flash_dmattn::sm80 {

constexpr int kForwardTileRows = 128;

// Keys of a tile, warps, tiles of K and of V in shared memory, blocks that share a processor.
template <int kBlockN_, int kWarps_, int kStages_, int kBlocks_>
struct ForwardShape {
    static constexpr int kBlockM = kForwardTileRows;
    static constexpr int kBlockN = kBlockN_, kWarps = kWarps_, kStages = kStages_, kBlocks = kBlocks_;
};

// Small: for the 99 KB of shared memory of sm_86, sm_89 and sm_120. Large: for the 163 KB of sm_80 and more.
template <int kHeadDim>
struct ForwardShapes;

template <>
struct ForwardShapes<64> {
    using Large = ForwardShape<64, 4, 1, 3>;
    using Small = ForwardShape<64, 4, 1, 2>;
};
template <>
struct ForwardShapes<96> {
    using Large = ForwardShape<64, 4, 2, 2>;
    using Small = ForwardShape<64, 8, 2, 1>;
};
template <>
struct ForwardShapes<128> {
    using Large = ForwardShape<64, 4, 1, 2>;
    using Small = ForwardShape<64, 8, 2, 1>;
};
template <>
struct ForwardShapes<192> {
    using Large = ForwardShape<64, 8, 2, 1>;
    using Small = ForwardShape<64, 8, 1, 1>;
};
template <>
struct ForwardShapes<256> {
    using Large = ForwardShape<64, 8, 1, 1>;
    using Small = ForwardShape<32, 8, 1, 1>;
};

// Weak, so that a library with some of the head dims and types links: the others are null.
template <typename Element, int kHeadDim>
__attribute__((weak)) cudaError_t launch_forward(const flash_dmattn_forward_params& params, cudaStream_t stream);

}  // namespace flash_dmattn::sm80
