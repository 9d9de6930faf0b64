// Block shapes of the sm90 forward by head dim, and its launch. One instance is compiled for each head dim and type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../params.h"

namespace flash_dmattn::sm90 {

template <int kHeadDim>
struct ForwardShape;  // kBlockM query rows, kBlockN keys, kStages tiles of K and of V, registers per thread

template <>
struct ForwardShape<64> {
    static constexpr int kBlockM = 128, kBlockN = 128, kStages = 3, kProducerRegs = 56, kConsumerRegs = 224;
};
template <>
struct ForwardShape<96> {
    static constexpr int kBlockM = 128, kBlockN = 128, kStages = 3, kProducerRegs = 56, kConsumerRegs = 224;
};
template <>
struct ForwardShape<128> {
    static constexpr int kBlockM = 128, kBlockN = 128, kStages = 2, kProducerRegs = 56, kConsumerRegs = 224;
};
template <>
struct ForwardShape<192> {
    static constexpr int kBlockM = 128, kBlockN = 96, kStages = 2, kProducerRegs = 56, kConsumerRegs = 224;
};
template <>
struct ForwardShape<256> {
    static constexpr int kBlockM = 128, kBlockN = 64, kStages = 2, kProducerRegs = 56, kConsumerRegs = 224;
};

// Weak, so that a library without sm_90a links: then it is null.
template <typename Element, int kHeadDim>
__attribute__((weak)) cudaError_t launch_forward(const flash_dmattn_forward_params& params, cudaStream_t stream);

}  // namespace flash_dmattn::sm90
