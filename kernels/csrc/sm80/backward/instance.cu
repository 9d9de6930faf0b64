// The sm80 backward for HEAD_DIM and DTYPE, which the build defines.
#include "kernel.cuh"

template cudaError_t flash_dmattn::sm80::launch_backward<DTYPE, HEAD_DIM>(
    const BackwardParams&, EpochRange, cudaStream_t);
