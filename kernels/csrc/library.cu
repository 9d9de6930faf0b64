// The library about itself.
#include "api.h"

extern "C" int flash_dmattn_abi_version() { return FLASH_DMATTN_ABI_VERSION; }

// The architectures it was compiled for, such as "80 90".
extern "C" const char* flash_dmattn_architectures() { return FLASH_DMATTN_ARCHITECTURES; }

// The head dims it was compiled for, such as "64 128".
extern "C" const char* flash_dmattn_head_dims() { return FLASH_DMATTN_HEAD_DIMS; }

extern "C" const char* flash_dmattn_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
