// Entries of the backward: a pass over the rows, the kernel for head dim and type, results in the inputs' type.
#include <algorithm>

#include "common/variants.h"
#include "sm80/backward/passes.cuh"
#include "sm90/backward/passes.cuh"

using namespace flash_dmattn;

namespace {

constexpr int64_t kMaxLanes = 65535;  // blocks of a grid in its second dimension

// Null when the library was built without it.
using Sm90Launch = cudaError_t (*)(const sm90::BackwardParams&, cudaStream_t);
using Sm80Launch = cudaError_t (*)(const sm80::BackwardParams&, sm80::EpochRange, cudaStream_t);

template <typename Params>
int64_t count_key_rows(const Params& p) {
    return int64_t(p.batch) * p.seqlen_k * (p.num_interval_heads / p.interval_heads_per_kv_head);
}

template <typename Element>
cudaError_t run(const sm90::BackwardParams& p, Sm90Launch launch, cudaStream_t stream) {
    using namespace sm90;
    const int64_t num_rows = int64_t(p.seqlen_q) * p.group_size;  // of an interval head
    const int64_t num_lanes = int64_t(p.batch) * p.num_interval_heads;
    const int64_t num_key_rows = count_key_rows(p);
    const int64_t key_size = num_key_rows * p.head_dim;
    constexpr int kSizeOfBlock = kPassThreads * 8;
    const int64_t key_blocks = (key_size + kSizeOfBlock - 1) / kSizeOfBlock;
    if (num_rows > INT32_MAX - kRowsOfPass || num_lanes > kMaxLanes || key_blocks > INT32_MAX) {
        return cudaErrorInvalidValue;
    }
    if (num_rows == 0 || num_lanes == 0 || num_key_rows == 0) return cudaErrorInvalidValue;

    const dim3 row_blocks(unsigned((num_rows + kRowsOfPass - 1) / kRowsOfPass), unsigned(num_lanes));
    gather_row_facts<Element><<<row_blocks, kPassThreads, 0, stream>>>(p);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) error = launch(p, stream);
    if (error != cudaSuccess) return error;
    finish_dkey_dvalue<Element><<<dim3(unsigned(key_blocks), 2), kPassThreads, 0, stream>>>(p, key_size);
    return cudaGetLastError();
}

// The kernel and the pass that writes dquery run for some epochs at a time.
template <typename Element>
cudaError_t run(const sm80::BackwardParams& p, Sm80Launch launch, cudaStream_t stream) {
    using namespace sm80;
    constexpr int kRowsOfBlock = kPassThreads / kLanesOfDelta;
    const int64_t rows = int64_t(p.seqlen_q) * p.num_interval_heads * p.group_size;
    const int64_t row_blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
    const int64_t tiles = int64_t(p.epochs_at_once) * p.tiles_per_epoch, lanes = int64_t(p.batch) * p.num_interval_heads;
    if (row_blocks > INT32_MAX || tiles > INT32_MAX || lanes > kMaxLanes) return cudaErrorInvalidValue;
    if (rows == 0 || lanes == 0 || p.seqlen_k == 0) return cudaErrorInvalidValue;
    const int64_t key_blocks = (count_key_rows(p) * (p.head_dim / 8) + kPassThreads - 1) / kPassThreads;
    if (key_blocks > INT32_MAX) return cudaErrorInvalidValue;
    const size_t sums_bytes = lanes * tiles * kBackwardTileRows * p.head_dim * sizeof(float);

    compute_deltas<Element><<<dim3(unsigned(row_blocks), p.batch), kPassThreads, 0, stream>>>(p);
    cudaError_t error = cudaGetLastError();
    for (int first = 0; first < p.num_epochs && error == cudaSuccess; first += p.epochs_at_once) {
        const EpochRange epochs = {first, std::min(p.epochs_at_once, p.num_epochs - first)};
        error = cudaMemsetAsync(p.dquery_sums, 0, sums_bytes, stream);
        if (error == cudaSuccess) error = launch(p, epochs, stream);
        if (error != cudaSuccess) break;
        const dim3 grid(epochs.count * p.tiles_per_epoch, unsigned(lanes));
        finish_dquery_sums<Element><<<grid, kPassThreads, 0, stream>>>(p, first);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess) return error;
    finish_key_sums<Element><<<unsigned(key_blocks), kPassThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace

extern "C" int flash_dmattn_sm90_backward_tile_rows(int head_dim) {
    int rows = 0;
    with_variant(head_dim, true, [&](auto) { rows = sm90::kBackwardTileRows; });
    return rows;
}

extern "C" int flash_dmattn_sm90_backward(const flash_dmattn_sm90_backward_params* params, void* stream) {
    cudaError_t error = cudaErrorNoKernelImageForDevice;
    with_variant(params->head_dim, params->is_bfloat16, [&](auto variant) {
        using Element = typename decltype(variant)::Element;
        const Sm90Launch launch = if_linked(sm90::launch_backward<Element, decltype(variant)::kHeadDim>);
        if (launch != nullptr) error = run<Element>(*params, launch, static_cast<cudaStream_t>(stream));
    });
    return error;
}

extern "C" int flash_dmattn_sm80_backward_tile_rows(int head_dim, int is_bfloat16, int shared_bytes) {
    int rows = 0;
    with_variant(head_dim, is_bfloat16, [&](auto variant) {
        constexpr int kHeadDim = decltype(variant)::kHeadDim;
        using Shapes = sm80::BackwardShapes<kHeadDim>;
        const Sm80Launch launch = if_linked(sm80::launch_backward<typename decltype(variant)::Element, kHeadDim>);
        const int small = Shapes::Small::shared_bytes(kHeadDim);
        const int needed = small > 0 ? small : Shapes::Large::shared_bytes(kHeadDim);
        if (launch != nullptr && needed <= shared_bytes) rows = sm80::kBackwardTileRows;
    });
    return rows;
}

extern "C" int flash_dmattn_sm80_backward(const flash_dmattn_sm80_backward_params* params, void* stream) {
    cudaError_t error = cudaErrorNoKernelImageForDevice;
    with_variant(params->head_dim, params->is_bfloat16, [&](auto variant) {
        using Element = typename decltype(variant)::Element;
        const Sm80Launch launch = if_linked(sm80::launch_backward<Element, decltype(variant)::kHeadDim>);
        if (launch != nullptr) error = run<Element>(*params, launch, static_cast<cudaStream_t>(stream));
    });
    return error;
}
