// What forward and backward of interval attention are launched with. Plain C: the Python side mirrors the structs in
// backends/cuda/parameters.py.
//
// The structs are flat and keep the order of their fields, because both decide how ptxas allocates registers. With the
// shared fields in a common base, more than half of the attention kernels compiled to other machine code for sm_90a, and
// the sm90 forward for head dim 128 spilled where it had not.
#pragma once

#include <cstdint>

extern "C" {

// Fields of all three structs:
//
//   query                   (B, Sq, H, D)
//   key, value              (B, Sk, Hkv, D)
//   birth, death            (B, Hi, Sk), or both null: keys are visible from their own row on
//   query_start             (B,), or null when query_positions is given and keys are listed
//   query_positions         (B, Sq), or null
//   entries                 (B, Hi, epochs, capacity), or null: every epoch lists all keys in order
//   biases                  as entries, or (B, Hi, Sk) without them: importance times log2(e); null for none
//   sections                (B, Hi, epochs, 3), or null without entries
//   stretches               (B, Hi, epochs, tiles, 2), or null without entries
//   *_strides               of batch, row and head, in elements; the head dim is contiguous, rows are 16-byte aligned
//   softcap                 0 is off
//   num_interval_heads      Hi
//   interval_heads_per_kv_head, group_size: Hi / Hkv and H / Hi
//   epoch_size, tile_size   query tokens; a tile is as many rows (tokens x group heads) as the kernel's tile_rows
//                           function says, of which the last may be unused
//   capacity                of a list; without lists Sk
//   is_bfloat16             otherwise float16
//
// Fields of two of them:
//
//   out, dout               (B, Sq, H, D), contiguous
//   lse, dlse               (B, H, Sq), contiguous; lse may be null
//   stats                   (2, B, H, Sq): stats[0] is near a row's highest (logit + bias) log2(e), or +inf for a row
//                           that sees nothing; stats[1] is the log2 of the sum of 2 to the power of their differences
//                           from it, or 0
//   dkey_sums, dvalue_sums  (B, Sk, Hkv, D), zero; scratch
//   dimportance             (B, Hi, Sk), zero, or null
//   dquery                  (B, Sq, H, D), contiguous
//   dkey, dvalue            (B, Sk, Hkv, D), contiguous
//   shared_bytes            of shared memory that a block may have; the sm80 kernels have shapes for 99 KB and more

// is_for_sm90a asks for the sm90 kernels, otherwise for the sm80 kernels. Without entries all queries are one epoch, and
// the sm90 kernels take a null query_start for queries that are the last rows, and the importance itself as biases, of
// which NaN counts as -inf.
struct flash_dmattn_forward_params {
    const void *query, *key, *value;
    void* out;
    float *lse, *stats;
    const int32_t *birth, *death, *query_start, *query_positions, *entries;
    const float* biases;
    const int32_t *sections, *stretches;
    int64_t query_strides[3], key_strides[3], value_strides[3];
    float softmax_scale, softcap;
    int32_t batch, seqlen_q, seqlen_k, num_interval_heads, interval_heads_per_kv_head, group_size;
    int32_t num_epochs, epoch_size, tiles_per_epoch, tile_size, capacity;
    int32_t head_dim, is_bfloat16, is_for_sm90a, shared_bytes;
};

// row_facts: (B, Hi, Sq, H / Hi, 4), scratch. counters: 1 + B Hi epochs numbers, deterministic 2 B Hi epochs tiles more,
// zero; scratch. dquery_sums: (num_slots, tiles, tile rows, D), zero; scratch. num_slots: epochs whose dquery is summed
// up at a time. deterministic: sums are added up in a fixed order; needs query_start or entries == null.
struct flash_dmattn_sm90_backward_params {
    const void *query, *key, *value, *out, *dout;
    const float *dlse, *stats;
    float* row_facts;
    int32_t* counters;
    float *dquery_sums, *dkey_sums, *dvalue_sums, *dimportance;
    void *dquery, *dkey, *dvalue;
    const int32_t *birth, *death, *query_start, *query_positions, *entries;
    const float* biases;
    const int32_t *sections, *stretches;
    int64_t query_strides[3], key_strides[3], value_strides[3];
    float softmax_scale, softcap;
    int32_t batch, seqlen_q, seqlen_k, num_interval_heads, interval_heads_per_kv_head, group_size;
    int32_t num_epochs, epoch_size, tiles_per_epoch, tile_size, capacity, num_slots;
    int32_t head_dim, is_bfloat16, deterministic;
};

// deltas: (B, H, Sq), scratch. dquery_sums: (B, Hi, epochs_at_once, tiles, tile rows, D), scratch. epochs_at_once: of an
// interval head, that have sums of dquery.
struct flash_dmattn_sm80_backward_params {
    const void *query, *key, *value, *out, *dout;
    const float *dlse, *stats;
    float *deltas, *dquery_sums, *dkey_sums, *dvalue_sums, *dimportance;
    void *dquery, *dkey, *dvalue;
    const int32_t *birth, *death, *query_start, *query_positions, *entries;
    const float* biases;
    const int32_t *sections, *stretches;
    int64_t query_strides[3], key_strides[3], value_strides[3];
    float softmax_scale, softcap;
    int32_t batch, seqlen_q, seqlen_k, num_interval_heads, interval_heads_per_kv_head, group_size;
    int32_t num_epochs, epoch_size, epochs_at_once, tiles_per_epoch, tile_size, capacity;
    int32_t head_dim, is_bfloat16, shared_bytes;
};

// Each tile_rows function returns the query rows (tokens x group heads) of a tile, or 0 when the library has no such
// kernel or it needs more shared memory. Each launch returns 0 or a cudaError_t: cudaErrorNoKernelImageForDevice when
// the library has no such kernel, cudaErrorInvalidValue for sizes beyond those of the kernel's counters.
int flash_dmattn_forward_tile_rows(int head_dim, int is_bfloat16, int is_for_sm90a);
int flash_dmattn_forward(const flash_dmattn_forward_params* params, void* stream);

int flash_dmattn_sm90_backward_tile_rows(int head_dim);
int flash_dmattn_sm90_backward(const flash_dmattn_sm90_backward_params* params, void* stream);

int flash_dmattn_sm80_backward_tile_rows(int head_dim, int is_bfloat16, int shared_bytes);
int flash_dmattn_sm80_backward(const flash_dmattn_sm80_backward_params* params, void* stream);
}
