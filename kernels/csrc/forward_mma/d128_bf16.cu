#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_mma_forward<__nv_bfloat16, 128>(const ForwardParams&, cudaStream_t);
