// What the backward for all architectures is launched with. Plain C: the Python side mirrors the struct.
#pragma once

#include <cstdint>

extern "C" {

// Strides count elements and are those of batch, row and head; the head dim is contiguous, rows are 16-byte aligned.
// A query tile is flash_dmattn_mma_backward_tile_rows() rows, tokens x group heads, of which the last may be unused.
struct flash_dmattn_mma_backward_params {
    const void* query;               // (B, Sq, H, D)
    const void* key;                 // (B, Sk, Hkv, D)
    const void* value;               // (B, Sk, Hkv, D)
    const void* out;                 // (B, Sq, H, D), contiguous
    const void* dout;                // (B, Sq, H, D), contiguous
    const float* dlse;               // (B, H, Sq), contiguous
    const float* stats;              // (2, B, H, Sq), as flash_dmattn_forward writes it
    float* deltas;                   // (B, H, Sq), scratch
    float* dquery_sums;              // (B, Hi, epochs at once, tiles, tile rows, D); scratch
    float* dkey_sums;                // (B, Sk, Hkv, D), zero; scratch
    float* dvalue_sums;              // (B, Sk, Hkv, D), zero; scratch
    float* dimportance;              // (B, Hi, Sk), zero, or null
    void* dquery;                    // (B, Sq, H, D), contiguous
    void* dkey;                      // (B, Sk, Hkv, D), contiguous
    void* dvalue;                    // (B, Sk, Hkv, D), contiguous
    const int32_t* birth;            // (B, Hi, Sk), or null: keys are visible from their own row on
    const int32_t* death;            // (B, Hi, Sk), or null with birth
    const int32_t* query_start;      // (B,), or null when query_positions is given and keys are listed
    const int32_t* query_positions;  // (B, Sq), or null
    const int32_t* entries;          // (B, Hi, epochs, capacity), or null: every epoch lists all keys in order
    const float* biases;             // as entries, or (B, Hi, Sk) without them; null for none
    const int32_t* sections;         // (B, Hi, epochs, 3), or null without entries
    const int32_t* stretches;        // (B, Hi, epochs, tiles, 2), or null without entries
    int64_t query_strides[3];
    int64_t key_strides[3];
    int64_t value_strides[3];
    float softmax_scale;
    float softcap;  // 0 is off
    int32_t batch;
    int32_t seqlen_q;
    int32_t seqlen_k;
    int32_t num_interval_heads;          // Hi
    int32_t interval_heads_per_kv_head;  // Hi / Hkv
    int32_t group_size;                  // H / Hi
    int32_t num_epochs;
    int32_t epoch_size;  // query tokens
    int32_t epochs_at_once;  // of an interval head, that have sums of dquery
    int32_t tiles_per_epoch;
    int32_t tile_size;  // query tokens
    int32_t capacity;   // of a list; without lists Sk
    int32_t head_dim;
    int32_t is_bfloat16;   // otherwise float16
    int32_t shared_bytes;  // of shared memory that a block may have
};

// Query rows (tokens x group heads) of a tile, or 0 when the library has no such kernel or it needs more shared memory.
int flash_dmattn_mma_backward_tile_rows(int head_dim, int is_bfloat16, int shared_bytes);

// Returns 0 or a cudaError_t, cudaErrorNoKernelImageForDevice when the library has no such kernel.
int flash_dmattn_mma_backward(const flash_dmattn_mma_backward_params* params, void* stream);
}
