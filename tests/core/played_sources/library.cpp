// What csrc/passes.cu calls, on a CPU: small steps as loops, everything else played by functions that a test gives.
#include <cmath>

#include "elementwise.h"
#include "lists.h"
#include "params.h"
#include "selection.h"

namespace {

constexpr int kPlayers = 5;
int (*players[kPlayers])(const void* params);

}  // namespace

extern "C" {

void play(int number, int (*player)(const void* params)) { players[number] = player; }

int64_t flash_dmattn_select_workspace(const flash_dmattn_select_params*) { return 1000; }
int64_t flash_dmattn_lists_workspace(const flash_dmattn_lists_params* p) { return p->query_start ? 3000 : 256; }
int flash_dmattn_select(const flash_dmattn_select_params* params, void*) { return players[0](params); }
int flash_dmattn_lists(const flash_dmattn_lists_params* params, void*) { return players[1](params); }
int flash_dmattn_forward(const flash_dmattn_forward_params* params, void*) { return players[2](params); }
int flash_dmattn_sm90_backward(const flash_dmattn_sm90_backward_params* params, void*) { return players[3](params); }
int flash_dmattn_sm80_backward(const flash_dmattn_sm80_backward_params* params, void*) { return players[4](params); }
int flash_dmattn_forward_tile_rows(int, int, int) { return 128; }
int flash_dmattn_sm90_backward_tile_rows(int) { return 64; }
int flash_dmattn_sm80_backward_tile_rows(int, int, int) { return 32; }
const char* flash_dmattn_error_string(int) { return "a played error"; }
}

namespace flash_dmattn {

cudaError_t fill(int32_t* numbers, int count, int32_t value, cudaStream_t) {
    for (int i = 0; i < count; ++i) numbers[i] = value;
    return cudaSuccess;
}

cudaError_t scale_importance(const float* importance, float* biases, int64_t count, cudaStream_t) {
    for (int64_t i = 0; i < count; ++i)
        biases[i] = std::isnan(importance[i]) ? -INFINITY : std::fmin(importance[i], 2.3e38f) * 1.4426950408889634f;
    return cudaSuccess;
}

cudaError_t finish_dimportance(const float* sums, const float* importance, float* dimportance, int64_t count, cudaStream_t) {
    for (int64_t i = 0; i < count; ++i) dimportance[i] = importance[i] < INFINITY ? sums[i] : 0.f;
    return cudaSuccess;
}

}  // namespace flash_dmattn
