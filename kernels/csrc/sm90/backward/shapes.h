// Block shapes of the sm90 backward by head dim, and its launch. One instance is compiled for each head dim and type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../params.h"

namespace flash_dmattn::sm90 {

using BackwardParams = flash_dmattn_sm90_backward_params;

constexpr int kBackwardTileRows = 64;

// kBlockN keys; kStages tiles of query and dout; kSplitsHeadDim: the warpgroups share keys and split the head dim
// instead of the keys; registers per thread, of which in a fixed order another warpgroup takes some.
template <int kHeadDim>
struct BackwardShape;

template <>
struct BackwardShape<64> {
    static constexpr int kBlockN = 128, kStages = 4, kProducerRegs = 56, kConsumerRegs = 224;
    static constexpr int kOrderedConsumerRegs = 200;
    static constexpr bool kSplitsHeadDim = false;
};
template <>
struct BackwardShape<96> {
    static constexpr int kBlockN = 128, kStages = 3, kProducerRegs = 56, kConsumerRegs = 224;
    static constexpr int kOrderedConsumerRegs = 216;
    static constexpr bool kSplitsHeadDim = false;
};
template <>
struct BackwardShape<128> {
    static constexpr int kBlockN = 128, kStages = 2, kProducerRegs = 24, kConsumerRegs = 240;
    static constexpr int kOrderedConsumerRegs = 232;
    static constexpr bool kSplitsHeadDim = false;
};
template <>
struct BackwardShape<192> {
    static constexpr int kBlockN = 64, kStages = 2, kProducerRegs = 40, kConsumerRegs = 232;
    static constexpr int kOrderedConsumerRegs = 224;
    static constexpr bool kSplitsHeadDim = true;
};
template <>
struct BackwardShape<256> {
    static constexpr int kBlockN = 64, kStages = 2, kProducerRegs = 40, kConsumerRegs = 232;
    static constexpr int kOrderedConsumerRegs = 224;
    static constexpr bool kSplitsHeadDim = true;
};

// Weak, so that a library without sm_90a links: then it is null.
template <typename Element, int kHeadDim>
__attribute__((weak)) cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace flash_dmattn::sm90
