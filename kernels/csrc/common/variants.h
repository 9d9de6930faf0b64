// The head dims and types that there are kernels for, found at run time. The build compiles an instance of each kernel
// for each of them: instance.cu with -D HEAD_DIM and DTYPE.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flash_dmattn {

template <typename Element_, int kHeadDim_>
struct Variant {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
};

// Calls use(Variant<Element, kHeadDim>()); does nothing for a head dim without kernels.
template <typename Element, typename Use>
void with_head_dim(int head_dim, Use use) {
    switch (head_dim) {
        case 64: return use(Variant<Element, 64>());
        case 96: return use(Variant<Element, 96>());
        case 128: return use(Variant<Element, 128>());
        case 192: return use(Variant<Element, 192>());
        case 256: return use(Variant<Element, 256>());
    }
}

template <typename Use>
void with_variant(int head_dim, bool is_bfloat16, Use use) {
    if (is_bfloat16) {
        with_head_dim<__nv_bfloat16>(head_dim, use);
    } else {
        with_head_dim<__half>(head_dim, use);
    }
}

// Returns a function that is declared weak, or null when it was not linked. GCC takes the address of a template's
// instance for non-null, weak or not, so it must not see where the pointer comes from.
template <typename Function>
Function* if_linked(Function* function) {
    Function* volatile hidden = function;
    return hidden;
}

}  // namespace flash_dmattn
