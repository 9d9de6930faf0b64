// Entry of the forward: finds the kernel for the head dim and the type.
#include "forward_sm90.h"

using namespace flash_dmattn;

namespace {

template <int kHeadDim>
cudaError_t launch(const ForwardParams& params, cudaStream_t stream) {
    const auto launch_forward_of_type =
        params.is_bfloat16 ? launch_forward<__nv_bfloat16, kHeadDim> : launch_forward<__half, kHeadDim>;
    if (launch_forward_of_type == nullptr) return cudaErrorNoKernelImageForDevice;
    return launch_forward_of_type(params, stream);
}

}  // namespace

extern "C" int flash_dmattn_forward_tile_rows(int head_dim) {
    switch (head_dim) {
        case 64: return ForwardShape<64>::kBlockM;
        case 96: return ForwardShape<96>::kBlockM;
        case 128: return ForwardShape<128>::kBlockM;
        case 192: return ForwardShape<192>::kBlockM;
        case 256: return ForwardShape<256>::kBlockM;
        default: return 0;
    }
}

extern "C" int flash_dmattn_forward(const flash_dmattn_forward_params* params, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (params->head_dim) {
        case 64: return launch<64>(*params, cuda_stream);
        case 96: return launch<96>(*params, cuda_stream);
        case 128: return launch<128>(*params, cuda_stream);
        case 192: return launch<192>(*params, cuda_stream);
        case 256: return launch<256>(*params, cuda_stream);
        default: return cudaErrorInvalidValue;
    }
}
