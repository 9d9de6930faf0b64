// Entry of the backward for all architectures: a pass over the rows, then for some epochs at a time the kernel for head
// dim and type and the pass that writes their dquery, at last the one that writes dkey and dvalue.
#include <algorithm>

#include "backward_mma/passes.cuh"

using namespace flash_dmattn;

namespace {

struct Kernel {
    cudaError_t (*launch)(const MmaBackwardParams&, EpochRange, cudaStream_t);  // null when built without it
    int shared_bytes;                                                           // that it needs
};

template <typename Element, int kHeadDim>
Kernel kernel_of() {
    using Shapes = MmaBackwardShapes<kHeadDim>;
    const int small = Shapes::Small::shared_bytes(kHeadDim);
    return {launch_mma_backward<Element, kHeadDim>, small > 0 ? small : Shapes::Large::shared_bytes(kHeadDim)};
}

template <typename Element>
Kernel find_kernel(int head_dim) {
    switch (head_dim) {
        case 64: return kernel_of<Element, 64>();
        case 96: return kernel_of<Element, 96>();
        case 128: return kernel_of<Element, 128>();
        case 192: return kernel_of<Element, 192>();
        case 256: return kernel_of<Element, 256>();
        default: return {nullptr, 0};
    }
}

template <typename Element>
cudaError_t launch(const MmaBackwardParams& p, cudaStream_t stream) {
    const Kernel kernel = find_kernel<Element>(p.head_dim);
    if (kernel.launch == nullptr) return cudaErrorNoKernelImageForDevice;
    constexpr int kRowsOfBlock = kMmaPassThreads / kLanesOfDelta;
    const int64_t rows = int64_t(p.seqlen_q) * p.num_interval_heads * p.group_size;
    const int64_t row_blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
    const int64_t tiles = int64_t(p.epochs_at_once) * p.tiles_per_epoch, lanes = int64_t(p.batch) * p.num_interval_heads;
    if (row_blocks > INT32_MAX || tiles > INT32_MAX || lanes > 65535) return cudaErrorInvalidValue;
    if (rows == 0 || lanes == 0 || p.seqlen_k == 0) return cudaErrorInvalidValue;
    const int64_t kv_rows = int64_t(p.batch) * p.seqlen_k * (p.num_interval_heads / p.interval_heads_per_kv_head);
    const int64_t kv_blocks = (kv_rows * (p.head_dim / 8) + kMmaPassThreads - 1) / kMmaPassThreads;
    if (kv_blocks > INT32_MAX) return cudaErrorInvalidValue;
    const size_t sums_bytes = lanes * tiles * kMmaBackwardTileRows * p.head_dim * sizeof(float);

    compute_deltas<Element><<<dim3(unsigned(row_blocks), p.batch), kMmaPassThreads, 0, stream>>>(p);
    cudaError_t error = cudaGetLastError();
    for (int first = 0; first < p.num_epochs && error == cudaSuccess; first += p.epochs_at_once) {
        const EpochRange epochs = {first, std::min(p.epochs_at_once, p.num_epochs - first)};
        error = cudaMemsetAsync(p.dquery_sums, 0, sums_bytes, stream);
        if (error == cudaSuccess) error = kernel.launch(p, epochs, stream);
        if (error != cudaSuccess) break;
        const dim3 grid(epochs.count * p.tiles_per_epoch, unsigned(lanes));
        finish_dquery_sums<Element><<<grid, kMmaPassThreads, 0, stream>>>(p, first);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess) return error;
    finish_key_sums<Element><<<unsigned(kv_blocks), kMmaPassThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace

extern "C" int flash_dmattn_mma_backward_tile_rows(int head_dim, int is_bfloat16, int shared_bytes) {
    const Kernel kernel = is_bfloat16 ? find_kernel<__nv_bfloat16>(head_dim) : find_kernel<__half>(head_dim);
    return kernel.launch == nullptr || kernel.shared_bytes > shared_bytes ? 0 : kMmaBackwardTileRows;
}

extern "C" int flash_dmattn_mma_backward(const flash_dmattn_mma_backward_params* params, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    return params->is_bfloat16 ? launch<__nv_bfloat16>(*params, cuda_stream) : launch<__half>(*params, cuda_stream);
}
