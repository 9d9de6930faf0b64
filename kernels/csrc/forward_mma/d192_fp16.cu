#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_mma_forward<__half, 192>(const ForwardParams&, cudaStream_t);
