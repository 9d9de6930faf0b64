#include "../forward_sm90.cuh"

template cudaError_t flash_dmattn::launch_forward<__half, 128>(const ForwardParams&, cudaStream_t);
