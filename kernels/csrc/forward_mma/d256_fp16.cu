#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_mma_forward<__half, 256>(const ForwardParams&, cudaStream_t);
