#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_mma_backward<__half, 192>(
    const MmaBackwardParams&, EpochRange, cudaStream_t);
