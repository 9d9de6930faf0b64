// The sm80 forward for HEAD_DIM and DTYPE, which the build defines.
#include "kernel.cuh"

template cudaError_t flash_dmattn::sm80::launch_forward<DTYPE, HEAD_DIM>(
    const flash_dmattn_forward_params&, cudaStream_t);
