#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_backward<__half, 192>(const BackwardParams&, cudaStream_t);
