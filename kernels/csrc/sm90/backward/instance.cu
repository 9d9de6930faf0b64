// The sm90 backward for HEAD_DIM and DTYPE, which the build defines.
#include "kernel.cuh"

template cudaError_t flash_dmattn::sm90::launch_backward<DTYPE, HEAD_DIM>(const BackwardParams&, cudaStream_t);
