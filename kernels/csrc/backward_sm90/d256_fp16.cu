#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_backward<__half, 256>(const BackwardParams&, cudaStream_t);
