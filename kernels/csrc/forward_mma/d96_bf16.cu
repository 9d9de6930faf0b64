#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_mma_forward<__nv_bfloat16, 96>(const ForwardParams&, cudaStream_t);
