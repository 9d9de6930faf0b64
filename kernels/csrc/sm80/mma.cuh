// The matrix product of a warp, on every architecture from sm_80 on: 16 rows x 8 columns x 16 deep, 16-bit operands,
// fp32 accumulators. Matrices in shared memory consist of pieces of kRowBytes (64 or 128) wide, swizzled rows.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/shared_memory.cuh"

namespace flash_dmattn::sm80 {

// d += a b. a: rows lane / 4 and 8 below, first for columns lane % 4 * 2 and the next, then for those 8 to their right.
// b: of column lane / 4 the depths lane % 4 * 2 and the next, then those 8 below.
template <typename Element>
__device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], const uint32_t* b) {
    if constexpr (__is_same(Element, __nv_bfloat16)) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// Loads four 8 x 8 matrices of 16-bit values; lane i tells where row i % 8 of matrix i / 8 lies. A lane gets two
// neighbors of row lane / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&values)[4], uint32_t source) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(source));
}

// The same, of the transposed matrices.
__device__ __forceinline__ void load_transposed(uint32_t (&values)[4], uint32_t source) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(source));
}

// Where a lane's row of the first 16 columns begins, `half` of 8 columns further on.
template <int kRowBytes>
__device__ __forceinline__ uint32_t row_address(uint32_t matrix, int row, int half) {
    return matrix + row * kRowBytes + swizzled_piece<kRowBytes>(row, half) * 16;
}

// The same row's place `columns` times 16 columns further on, in a matrix of kRows rows that begins at a multiple of
// kRowBytes.
template <int kRowBytes, int kRows>
__device__ __forceinline__ uint32_t advance_columns(uint32_t row_address, int columns) {
    constexpr int kColumnsOfPiece = kRowBytes / 32;
    return (row_address ^ columns % kColumnsOfPiece * 32) + columns / kColumnsOfPiece * kRows * kRowBytes;
}

}  // namespace flash_dmattn::sm80
