// What the building of key lists is launched with. Plain C: backends/cuda/lists.py mirrors the struct.
#pragma once

#include <cstdint>

extern "C" {

struct flash_dmattn_lists_params {
    const int32_t* birth;            // (B, Hi, Sk)
    const int32_t* death;            // (B, Hi, Sk)
    const float* importance;         // (B, Hi, Sk), strides below, or null
    const int32_t* query_start;      // (B,), or null: then query_positions tells the rows
    const int32_t* query_positions;  // (B, Sq), -1 for rows that see nothing, or null
    int32_t* entries;                // (B, Hi, epochs, capacity)
    float* biases;                   // (B, Hi, epochs, capacity), with importance: its product with log2(e), or null
    int32_t* sections;               // (B, Hi, epochs, 3)
    int32_t* stretches;              // (B, Hi, epochs, tiles, 2)
    void* workspace;                 // 256-byte aligned
    int64_t workspace_bytes;         // at least what flash_dmattn_lists_workspace says
    int64_t importance_strides[3];
    int32_t batch;
    int32_t num_heads;  // Hi
    int32_t seqlen_q;
    int32_t seqlen_k;
    int32_t num_epochs;
    int32_t epoch_size;  // a power of two up to 2048, of several epochs at least 128
    int32_t capacity;
    int32_t tiles_per_epoch;
    int32_t tile_size;
};

// Returns the bytes of workspace that the call needs.
int64_t flash_dmattn_lists_workspace(const flash_dmattn_lists_params* params);

// Writes entries, sections and stretches. Returns 0 or a cudaError_t.
int flash_dmattn_lists(const flash_dmattn_lists_params* params, void* stream);
}
