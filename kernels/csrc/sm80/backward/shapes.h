// Block shapes of the sm80 backward by head dim, and its launch. One instance is compiled for each head dim and type.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../params.h"

namespace flash_dmattn::sm80 {

using BackwardParams = flash_dmattn_sm80_backward_params;

constexpr int kBackwardTileRows = 64;

// Keys of a tile, tiles of queries in shared memory, warps of a block, blocks that are to share a processor.
template <int kBlockN_, int kStages_, int kWarps_ = 8, int kBlocks_ = 1>
struct BackwardShape {
    static constexpr int kBlockM = kBackwardTileRows, kBlockN = kBlockN_, kStages = kStages_;
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
struct BackwardShapes;

template <>
struct BackwardShapes<64> {
    using Large = BackwardShape<64, 1, 4, 3>;
    using Small = BackwardShape<128, 2>;
};
template <>
struct BackwardShapes<96> {
    using Large = BackwardShape<128, 2>;
    using Small = BackwardShape<64, 2>;
};
template <>
struct BackwardShapes<128> {
    using Large = BackwardShape<64, 1, 4, 2>;
    using Small = BackwardShape<64, 1>;
};
template <>
struct BackwardShapes<192> {
    using Large = BackwardShape<64, 2>;
    using Small = BackwardShape<32, 1>;
};
template <>
struct BackwardShapes<256> {
    using Large = BackwardShape<64, 1>;
    using Small = NoShape;
};

// Epochs of every interval head that one launch is about.
struct EpochRange {
    int first, count;
};

// Weak, so that a library with some of the head dims and types links: the others are null.
template <typename Element, int kHeadDim>
__attribute__((weak)) cudaError_t launch_backward(
    const BackwardParams& params, EpochRange epochs, cudaStream_t stream);

}  // namespace flash_dmattn::sm80
