// Block shapes by head dim of the backward for all architectures, and its launch, compiled one head dim and type a file.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "backward_mma.h"

namespace flash_dmattn {

using MmaBackwardParams = flash_dmattn_mma_backward_params;

constexpr int kMmaBackwardTileRows = 64;

// Keys of a tile, tiles of queries in shared memory, warps of a block, blocks that are to share a processor.
template <int kBlockN_, int kStages_, int kWarps_ = 8, int kBlocks_ = 1>
struct MmaBackwardShape {
    static constexpr int kBlockM = kMmaBackwardTileRows, kBlockN = kBlockN_, kStages = kStages_;
    static constexpr int kWarps = kWarps_, kBlocks = kBlocks_;

    static constexpr int shared_bytes(int head_dim) {
        const int keys = 2 * kBlockN * head_dim * 2, queries = 2 * kBlockM * head_dim * 2;
        const int weights = 2 * kBlockN * kBlockM * 2, facts = 4 * kBlockM * 4;
        return keys + weights + kStages * (queries + facts);
    }
};

struct NoShape {
    static constexpr int shared_bytes(int) { return 0; }
};

// Small: for the 99 KB of shared memory of sm_86, sm_89 and sm_120. Large: for the 163 KB of sm_80 and more.
template <int kHeadDim>
struct MmaBackwardShapes;

template <>
struct MmaBackwardShapes<64> {
    using Large = MmaBackwardShape<64, 1, 4, 3>;
    using Small = MmaBackwardShape<128, 2>;
};
template <>
struct MmaBackwardShapes<96> {
    using Large = MmaBackwardShape<128, 2>;
    using Small = MmaBackwardShape<64, 2>;
};
template <>
struct MmaBackwardShapes<128> {
    using Large = MmaBackwardShape<64, 1, 4, 2>;
    using Small = MmaBackwardShape<64, 1>;
};
template <>
struct MmaBackwardShapes<192> {
    using Large = MmaBackwardShape<64, 2>;
    using Small = MmaBackwardShape<32, 1>;
};
template <>
struct MmaBackwardShapes<256> {
    using Large = MmaBackwardShape<64, 1>;
    using Small = NoShape;
};

// Epochs of every interval head that one launch is about.
struct EpochRange {
    int first, count;
};

// Weak, so that a library with some of the head dims and types links: the others are null.
template <typename Element, int kHeadDim>
__attribute__((weak)) cudaError_t launch_mma_backward(
    const MmaBackwardParams& params, EpochRange epochs, cudaStream_t stream);

}  // namespace flash_dmattn
