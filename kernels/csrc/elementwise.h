// The small steps of a pass.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace flash_dmattn {

// Sets every number to `value`.
cudaError_t fill(int32_t* numbers, int count, int32_t value, cudaStream_t stream);

// Writes what importances add to exponents of 2: times log2(e), NaN as -inf.
cudaError_t scale_importance(const float* importance, float* biases, int64_t count, cudaStream_t stream);

// Writes sums of gradients, 0 where the importance is +inf or NaN.
cudaError_t finish_dimportance(
    const float* sums, const float* importance, float* dimportance, int64_t count, cudaStream_t stream);

}  // namespace flash_dmattn
