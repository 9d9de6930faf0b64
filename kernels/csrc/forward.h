// What the forward of interval attention is launched with. Plain C: the Python side mirrors the struct.
#pragma once

#include <cstdint>

extern "C" {

// Strides count elements and are those of batch, row and head; the head dim is contiguous, rows are 16-byte aligned.
// stats[0] is near a row's highest (logit + bias) log2(e), or +inf for a row that sees nothing; stats[1] is the log2 of
// the sum of 2 to the power of their differences from it, or 0.
// query_start is null when query_positions is given or, for the kernels for sm_90a, when the queries are the last rows.
// biases are the entries' importance times log2(e); without entries the kernels for sm_90a take the importance itself,
// of which NaN counts as -inf.
struct flash_dmattn_forward_params {
    const void* query;               // (B, Sq, H, D)
    const void* key;                 // (B, Sk, Hkv, D)
    const void* value;               // (B, Sk, Hkv, D)
    void* out;                       // (B, Sq, H, D), contiguous
    float* lse;                      // (B, H, Sq)
    float* stats;                    // (2, B, H, Sq)
    const int32_t* birth;            // (B, Hi, Sk), or null: keys are visible from their own row on
    const int32_t* death;            // (B, Hi, Sk), or null with birth
    const int32_t* query_start;      // (B,), or null: see above
    const int32_t* query_positions;  // (B, Sq), or null
    const int32_t* entries;          // (B, Hi, epochs, capacity), or null: all keys in order, in one epoch
    const float* biases;             // (B, Hi, epochs, capacity), or null for none
    const int32_t* sections;         // (B, Hi, epochs, 3), or null without entries
    const int32_t* stretches;        // (B, Hi, epochs, tiles, 2), or null without entries
    int64_t query_strides[3];
    int64_t key_strides[3];
    int64_t value_strides[3];
    float softmax_scale;
    float softcap;        // 0 is off
    int32_t batch;
    int32_t seqlen_q;
    int32_t seqlen_k;
    int32_t num_interval_heads;            // Hi
    int32_t interval_heads_per_kv_head;    // Hi / Hkv
    int32_t group_size;                    // H / Hi
    int32_t num_epochs;
    int32_t epoch_size;      // query tokens
    int32_t tiles_per_epoch;
    int32_t tile_size;       // query tokens
    int32_t capacity;
    int32_t head_dim;
    int32_t is_bfloat16;     // otherwise float16
    int32_t is_for_sm90a;    // the kernels for it, otherwise those for all architectures
    int32_t shared_bytes;    // of shared memory that a block may have; the kernels for all have shapes for 99 KB and more
};

// Query rows (tokens x group heads) of a tile, or 0 when the library has no such kernel.
int flash_dmattn_forward_tile_rows(int head_dim, int is_bfloat16, int is_for_sm90a);

// Returns 0 or a cudaError_t, cudaErrorNoKernelImageForDevice when the library has no such kernel.
int flash_dmattn_forward(const flash_dmattn_forward_params* params, void* stream);
}
