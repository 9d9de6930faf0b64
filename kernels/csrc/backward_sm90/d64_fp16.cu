#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_backward<__half, 64>(const BackwardParams&, cudaStream_t);
