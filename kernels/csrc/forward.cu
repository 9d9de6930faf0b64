// Entry of the forward: finds the kernel for architecture, head dim and type.
#include "forward_mma.h"
#include "forward_sm90.h"

using namespace flash_dmattn;

namespace {

struct Kernel {
    cudaError_t (*launch)(const ForwardParams&, cudaStream_t);  // null when the library was built without it
    int tile_rows;
};

template <typename Element, int kHeadDim>
Kernel kernel_of(bool is_for_sm90a) {
    if (is_for_sm90a) return {launch_forward<Element, kHeadDim>, ForwardShape<kHeadDim>::kBlockM};
    return {launch_mma_forward<Element, kHeadDim>, kMmaTileRows};
}

template <typename Element>
Kernel find_kernel(int head_dim, bool is_for_sm90a) {
    switch (head_dim) {
        case 64: return kernel_of<Element, 64>(is_for_sm90a);
        case 96: return kernel_of<Element, 96>(is_for_sm90a);
        case 128: return kernel_of<Element, 128>(is_for_sm90a);
        case 192: return kernel_of<Element, 192>(is_for_sm90a);
        case 256: return kernel_of<Element, 256>(is_for_sm90a);
        default: return {nullptr, 0};
    }
}

Kernel find_kernel(int head_dim, bool is_bfloat16, bool is_for_sm90a) {
    return is_bfloat16 ? find_kernel<__nv_bfloat16>(head_dim, is_for_sm90a)
                       : find_kernel<__half>(head_dim, is_for_sm90a);
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
