// The key axis of a selection: documents, positions among real tokens, and the row at which a key dies.
#pragma once

#include "selection.h"

namespace flash_dmattn {

constexpr int kNever = 0x7fffffff;

// Documents longer than num_kept are cut into segments of segment_size rows, numbered through; in shorter ones nothing
// is ever evicted and they have none.
struct SelectionAxis {
    const uint8_t* padding_mask;  // (B, Sk), or null
    const int* cu_seqlens;        // (num_docs + 1,), or null
    const int* real_before;       // (B, Sk + 1), real tokens before a row; with padding_mask
    const int* real_rows;         // (B, Sk), rows of the real tokens; with padding_mask
    const int* first_segment;     // (num_docs + 1,), with cu_seqlens
    int seqlen;
    int num_docs;
    int num_segments;  // the most there can be
    int segment_size;
    int num_kept;
    int num_sink_tokens;
    int local_window_size;
    int sliding_window;  // -1 for none

    __device__ int bound(int index) const {
        return cu_seqlens ? min(max(cu_seqlens[index], 0), seqlen) : index * seqlen;
    }

    __device__ int first_segment_of(int document) const {
        return cu_seqlens ? first_segment[document] : document * num_segments;
    }

    __device__ int segment_count() const { return first_segment_of(num_docs); }

    // The document of a row: as many as end at or before it, but the last one has all rows behind it.
    __device__ int document_of(int row) const {
        int low = 0, high = num_docs - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (bound(middle + 1) <= row) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    // The document that a segment lies in.
    __device__ int document_of_segment(int segment) const {
        int low = 0, high = num_docs - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (first_segment_of(middle + 1) <= segment) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    __device__ bool is_real(int batch, int row) const {
        return !padding_mask || padding_mask[int64_t(batch) * seqlen + row];
    }

    // Real tokens of the document that starts at `start`, before `row`.
    __device__ int position(int batch, int row, int start) const {
        if (!padding_mask) return row - start;
        const int* before = real_before + int64_t(batch) * (seqlen + 1);
        return before[row] - before[start];
    }

    // The row at which a key dies that num_kept keys have beaten at row `evicted_at` (kNever: never).
    __device__ int death(int batch, int row, int start, int end, int evicted_at) const {
        if (!is_real(batch, row)) return row;
        const int own = position(batch, row, start);
        int64_t age_limit = kNever;
        if (own >= num_sink_tokens && evicted_at != kNever)
            age_limit = int64_t(position(batch, evicted_at, start)) + local_window_size;
        if (sliding_window >= 0) age_limit = min(age_limit, int64_t(own) + sliding_window);
        const int num_real = position(batch, end, start);
        if (age_limit < num_real) {
            if (!padding_mask) return start + int(age_limit);
            const int first = real_before[int64_t(batch) * (seqlen + 1) + start];
            return real_rows[int64_t(batch) * seqlen + first + age_limit];
        }
        if (cu_seqlens) return end;
        return age_limit >= kNever ? kNever : int(min(int64_t(kNever), seqlen + age_limit - num_real));
    }
};

}  // namespace flash_dmattn
