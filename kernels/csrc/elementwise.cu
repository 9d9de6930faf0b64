// The small steps of a pass: a thread per number.
#include "elementwise.h"

namespace flash_dmattn {
namespace {

constexpr int kThreads = 256;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLargestBias = 2.3e38f;  // times log2(e) it is still finite

template <typename Step>
__global__ void for_each(int64_t count, Step step) {
    const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (index < count) step(index);
}

template <typename Step>
cudaError_t launch(int64_t count, Step step, cudaStream_t stream) {
    const int64_t blocks = (count + kThreads - 1) / kThreads;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    if (blocks > 0) for_each<<<unsigned(blocks), kThreads, 0, stream>>>(count, step);
    return cudaGetLastError();
}

struct Fill {
    int32_t* numbers;
    int32_t value;

    __device__ void operator()(int64_t i) const { numbers[i] = value; }
};

struct Scale {
    const float* importance;
    float* biases;

    __device__ void operator()(int64_t i) const {
        const float number = importance[i];
        biases[i] = isnan(number) ? -INFINITY : fminf(number, kLargestBias) * kLog2E;
    }
};

struct Finish {
    const float *sums, *importance;
    float* dimportance;

    __device__ void operator()(int64_t i) const { dimportance[i] = importance[i] < INFINITY ? sums[i] : 0.f; }
};

}  // namespace

cudaError_t fill(int32_t* numbers, int count, int32_t value, cudaStream_t stream) {
    return launch(count, Fill{numbers, value}, stream);
}

cudaError_t scale_importance(const float* importance, float* biases, int64_t count, cudaStream_t stream) {
    return launch(count, Scale{importance, biases}, stream);
}

cudaError_t finish_dimportance(
    const float* sums, const float* importance, float* dimportance, int64_t count, cudaStream_t stream) {
    return launch(count, Finish{sums, importance, dimportance}, stream);
}

}  // namespace flash_dmattn
