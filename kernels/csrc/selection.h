// What the selection is launched with. Plain C: backends/cuda/selection.py mirrors the struct.
#pragma once

#include <cstdint>

extern "C" {

struct flash_dmattn_select_params {
    const void* importance;       // (B, Hi, Sk) of importance_type, strides below
    const uint8_t* padding_mask;  // (B, Sk), 1 for real tokens, contiguous, or null
    const int32_t* cu_seqlens;    // (num_docs + 1,), or null for one document
    int32_t* birth;               // (B, Hi, Sk)
    int32_t* death;               // (B, Hi, Sk)
    void* workspace;              // 256-byte aligned
    int64_t workspace_bytes;      // at least what flash_dmattn_select_workspace says
    int64_t importance_strides[3];
    int32_t importance_type;  // 0 float32, 1 bfloat16, 2 float16
    int32_t batch;
    int32_t num_heads;          // Hi
    int32_t seqlen;             // Sk
    int32_t num_docs;           // 1 without cu_seqlens
    int32_t num_kept;           // keep_window_size - local_window_size: sinks and top keys
    int32_t num_sink_tokens;
    int32_t local_window_size;
    int32_t sliding_window;  // -1 for none
    int32_t is_causal;
    int32_t segment_size;  // rows solved by one block, a power of two up to 1024
};

// Returns the bytes of workspace that the call needs.
int64_t flash_dmattn_select_workspace(const flash_dmattn_select_params* params);

// Writes birth and death. Returns 0 or a cudaError_t.
int flash_dmattn_select(const flash_dmattn_select_params* params, void* stream);
}
