#include "kernel.cuh"

template cudaError_t flash_dmattn::launch_mma_backward<__nv_bfloat16, 128>(
    const MmaBackwardParams&, EpochRange, cudaStream_t);
