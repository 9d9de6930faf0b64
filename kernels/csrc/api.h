// What every source exports and returns: plain C functions, 0 for success or an error code.
#pragma once

#include <cuda_runtime.h>

// Rises whenever an exported function or a parameter struct changes; backends/cuda/library.py expects this number.
#define FLASH_DMATTN_ABI_VERSION 7
