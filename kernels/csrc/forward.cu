// Entry of the forward: finds the kernel for architecture, head dim and type.
#include "common/variants.h"
#include "sm80/forward/shapes.h"
#include "sm90/forward/shapes.h"

using namespace flash_dmattn;

namespace {

struct Kernel {
    cudaError_t (*launch)(const flash_dmattn_forward_params&, cudaStream_t);  // null when built without it
    int tile_rows;
};

Kernel find_kernel(int head_dim, bool is_bfloat16, bool is_for_sm90a) {
    Kernel kernel = {nullptr, 0};
    with_variant(head_dim, is_bfloat16, [&](auto variant) {
        using Element = typename decltype(variant)::Element;
        constexpr int kHeadDim = decltype(variant)::kHeadDim;
        if (is_for_sm90a) {
            kernel = {if_linked(sm90::launch_forward<Element, kHeadDim>), sm90::ForwardShape<kHeadDim>::kBlockM};
        } else {
            kernel = {if_linked(sm80::launch_forward<Element, kHeadDim>), sm80::kForwardTileRows};
        }
    });
    return kernel;
}

}  // namespace

extern "C" int flash_dmattn_forward_tile_rows(int head_dim, int is_bfloat16, int is_for_sm90a) {
    const Kernel kernel = find_kernel(head_dim, is_bfloat16, is_for_sm90a);
    return kernel.launch == nullptr ? 0 : kernel.tile_rows;
}

extern "C" int flash_dmattn_forward(const flash_dmattn_forward_params* params, void* stream) {
    const Kernel kernel = find_kernel(params->head_dim, params->is_bfloat16, params->is_for_sm90a);
    if (kernel.launch == nullptr) return cudaErrorNoKernelImageForDevice;
    return kernel.launch(*params, static_cast<cudaStream_t>(stream));
}
