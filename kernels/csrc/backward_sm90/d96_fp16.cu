#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_backward<__half, 96>(const BackwardParams&, cudaStream_t);
