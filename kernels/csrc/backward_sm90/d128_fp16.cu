#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_backward<__half, 128>(const BackwardParams&, cudaStream_t);
