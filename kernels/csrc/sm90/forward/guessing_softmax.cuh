// The running softmax of a thread's two rows that guesses its shifts: finding the highest exponent first would make
// every exponential wait until all products are there and compared.
#pragma once

#include "../../common/softmax.cuh"

namespace flash_dmattn::sm90 {

struct GuessingSoftmax : RunningSoftmax {
    // rows: the rows' numbers, -1 for none.
    __device__ explicit GuessingSoftmax(const int (&rows)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) shift[r] = rows[r] < 0 ? 0.f : -INFINITY;
    }

    // Turns exponents into 16-bit weights. Returns whether what was accumulated before is to be multiplied by `rescale`.
    // It is taken for granted that the shifts can stay, and done again where the sums tell that they cannot.
    template <typename Element, int kSize>
    __device__ __forceinline__ bool weigh(uint32_t (&weights)[kSize / 2], const float (&scores)[kSize]) {
        constexpr float kLargestSum = 8192.f;  // of a thread's columns, so that no weight is too large for 16 bits
        float sums[2];
        exponentiate<Element>(weights, sums, scores);
        // A sum of NaN cannot stay. Nor can a shift of -inf, relative to which nothing has a weight.
        const bool can_stay =
            sums[0] <= kLargestSum && sums[1] <= kLargestSum && fminf(shift[0], shift[1]) > -INFINITY;
        const bool must_follow = !__all_sync(~0u, can_stay);
        if (must_follow) {
            follow(scores);
            exponentiate<Element>(weights, sums, scores);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) total[r] += sums[r];
        return must_follow;
    }

    // Raises the shifts to the highest exponents.
    template <int kSize>
    __device__ __forceinline__ void follow(const float (&scores)[kSize]) {
        float highest[2][2] = {{scores[0], scores[1]}, {scores[2], scores[3]}};
#pragma unroll
        for (int i = 4; i < kSize; ++i) highest[i >> 1 & 1][i & 1] = fmaxf(highest[i >> 1 & 1][i & 1], scores[i]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float high = fmaxf(highest[r][0], highest[r][1]);
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            const float next = fmaxf(shift[r], high);
            rescale[r] = next == -INFINITY ? 1.f : exp2_approx(shift[r] - next);
            total[r] *= rescale[r];
            shift[r] = next;
        }
    }

private:
    // In runs, each exponentiated while the one before is added up and packed.
    template <typename Element, int kSize>
    __device__ __forceinline__ void exponentiate(
        uint32_t (&weights)[kSize / 2], float (&sums)[2], const float (&scores)[kSize]) const {
        constexpr int kRun = 16;
        constexpr int kRuns = kSize / kRun;
        static_assert(kSize % kRun == 0);
        const float offset[2] = {shift[0] == -INFINITY ? 0.f : shift[0], shift[1] == -INFINITY ? 0.f : shift[1]};
        float parts[2][2] = {};
        float run[2][kRun];
#pragma unroll
        for (int n = 0; n <= kRuns; ++n) {
#pragma unroll
            for (int i = 0; i < kRun && n < kRuns; ++i) {
                run[n % 2][i] = exp2_approx(scores[n * kRun + i] - offset[i >> 1 & 1]);
            }
#pragma unroll
            for (int i = 0; i < kRun && n > 0; i += 2) {
                const float low = run[(n - 1) % 2][i], high = run[(n - 1) % 2][i + 1];
                parts[i >> 1 & 1][0] += low;
                parts[i >> 1 & 1][1] += high;
                weights[((n - 1) * kRun + i) / 2] = pack<Element>(low, high);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) sums[r] = parts[r][0] + parts[r][1];
    }
};

}  // namespace flash_dmattn::sm90
