// What a whole pass is launched with: selection, key lists and attention, or key lists and gradients, by one call of the
// host. Plain C: backends/cuda/plans.py mirrors the structs.
//
// A plan is what calls of the same shapes and options share: the structs of the parts without addresses and without
// sizes of workspaces. It is made once and read by every call. The tensors of a call are addresses alone.
#pragma once

#include "lists.h"
#include "params.h"
#include "selection.h"

extern "C" {

// Fields of both plans:
//
//   lists        batch, heads and lengths are always set, the rest with is_listed
//   is_listed    otherwise every key is visible from its own row on
//   is_ordered   the rows of a sequence's queries follow each other
//   has_bias     the importance is added to the logits
//
// Fields of both tensors, shapes and layouts as in params.h:
//
//   importance       (B, Hi, Sk), contiguous; null without has_bias, unless the pass selects
//   birth, death     null without is_listed; the forward writes them if it selects
//   query_start      null when is_ordered is false, or when the queries are the last rows
//   query_positions  or null
//   scratch          of the size that the scratch function of the pass returns
//
// scratch, and stats of a forward, which are workspace before they are written, are aligned to 256 bytes.

// selects: otherwise birth and death are given.
struct flash_dmattn_forward_plan {
    flash_dmattn_select_params select;
    flash_dmattn_lists_params lists;
    flash_dmattn_forward_params forward;
    int32_t selects, is_listed, is_ordered, has_bias;
};

struct flash_dmattn_forward_tensors {
    const void *query, *key, *value;
    const float* importance;
    int32_t *birth, *death;
    const int32_t *query_start, *query_positions;
    void* out;
    float *lse, *stats;
    void* scratch;
};

// is_for_sm90a: sm90 is set, otherwise sm80.
struct flash_dmattn_backward_plan {
    flash_dmattn_lists_params lists;
    flash_dmattn_sm90_backward_params sm90;
    flash_dmattn_sm80_backward_params sm80;
    int32_t is_for_sm90a, is_listed, is_ordered, has_bias;
};

// dlse: null for zeros. dimportance: (B, Hi, Sk), 0 where the importance is +inf or NaN; null without has_bias.
struct flash_dmattn_backward_tensors {
    const void *query, *key, *value;
    const float* importance;
    const int32_t *birth, *death, *query_start, *query_positions;
    const void *out, *dout;
    const float *dlse, *stats;
    void *dquery, *dkey, *dvalue;
    float* dimportance;
    void* scratch;
};

// Each scratch function completes a new plan with the sizes of its workspaces and returns the bytes of scratch. Each pass
// returns 0 or a cudaError_t.
int64_t flash_dmattn_forward_scratch(flash_dmattn_forward_plan* plan);
int flash_dmattn_forward_pass(
    const flash_dmattn_forward_plan* plan, const flash_dmattn_forward_tensors* tensors, void* stream);

int64_t flash_dmattn_backward_scratch(flash_dmattn_backward_plan* plan);
int flash_dmattn_backward_pass(
    const flash_dmattn_backward_plan* plan, const flash_dmattn_backward_tensors* tensors, void* stream);
}
