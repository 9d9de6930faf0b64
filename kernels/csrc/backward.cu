// Entry of the backward: facts of the rows, the kernel for the head dim and the type, results in the inputs' type.
#include "backward_passes.cuh"
#include "backward_sm90.h"

using namespace flash_dmattn;

namespace {

template <typename Element>
cudaError_t launch_main(const BackwardParams& params, cudaStream_t stream) {
    decltype(&launch_backward<Element, 64>) launch_for_head_dim;
    switch (params.head_dim) {
        case 64: launch_for_head_dim = launch_backward<Element, 64>; break;
        case 96: launch_for_head_dim = launch_backward<Element, 96>; break;
        case 128: launch_for_head_dim = launch_backward<Element, 128>; break;
        case 192: launch_for_head_dim = launch_backward<Element, 192>; break;
        case 256: launch_for_head_dim = launch_backward<Element, 256>; break;
        default: return cudaErrorInvalidValue;
    }
    if (launch_for_head_dim == nullptr) return cudaErrorNoKernelImageForDevice;
    return launch_for_head_dim(params, stream);
}

template <typename Element>
cudaError_t launch(const BackwardParams& p, cudaStream_t stream) {
    const int64_t num_rows = int64_t(p.seqlen_q) * p.group_size;  // of an interval head
    const int64_t num_lanes = int64_t(p.batch) * p.num_interval_heads;
    const int64_t num_key_rows = int64_t(p.batch) * p.seqlen_k * (p.num_interval_heads / p.interval_heads_per_kv_head);
    const int64_t key_size = num_key_rows * p.head_dim;
    constexpr int kSizeOfBlock = kPassThreads * 8;
    const int64_t key_blocks = (key_size + kSizeOfBlock - 1) / kSizeOfBlock;
    if (num_rows > INT32_MAX - kRowsOfPass || num_lanes > 65535 || key_blocks > INT32_MAX) {
        return cudaErrorInvalidValue;
    }
    if (num_rows == 0 || num_lanes == 0 || num_key_rows == 0) return cudaErrorInvalidValue;

    const dim3 row_blocks(unsigned((num_rows + kRowsOfPass - 1) / kRowsOfPass), unsigned(num_lanes));
    gather_row_facts<Element><<<row_blocks, kPassThreads, 0, stream>>>(p);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) error = launch_main<Element>(p, stream);
    if (error != cudaSuccess) return error;
    finish_dkey_dvalue<Element><<<dim3(unsigned(key_blocks), 2), kPassThreads, 0, stream>>>(p, key_size);
    return cudaGetLastError();
}

}  // namespace

extern "C" int flash_dmattn_backward_tile_rows(int head_dim) {
    switch (head_dim) {
        case 64:
        case 96:
        case 128:
        case 192:
        case 256: return kBackwardTileRows;
        default: return 0;
    }
}

extern "C" int flash_dmattn_backward(const flash_dmattn_backward_params* params, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    return params->is_bfloat16 ? launch<__nv_bfloat16>(*params, cuda_stream) : launch<__half>(*params, cuda_stream);
}
