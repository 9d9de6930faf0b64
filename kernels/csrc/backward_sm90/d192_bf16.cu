#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_backward<__nv_bfloat16, 192>(const BackwardParams&, cudaStream_t);
