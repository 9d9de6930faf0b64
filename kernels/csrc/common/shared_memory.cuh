// Shared memory as all kernels use it: addresses, swizzled rows, asynchronous copies into it (from sm_80 on).
#pragma once

#include <cstdint>

namespace flash_dmattn {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The place of a row's 16-byte piece among the pieces of its kRowBytes.
template <int kRowBytes>
__device__ __forceinline__ int swizzled_piece(int row, int piece) {
    return kRowBytes == 128 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3);
}

// Copies 16 bytes to shared memory; of them `bytes` (0 or 16) are read and the rest is zero.
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes)
                 : "memory");
}

// Copies 4 bytes to shared memory.
__device__ __forceinline__ void copy_word_async(uint32_t target, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}

// The copies that a thread has issued since its last group are one group.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last kPending groups of this thread have not landed.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Keeps the compiler from computing what depends on the value ahead of a loop, where it would occupy registers.
__device__ __forceinline__ int compute_here(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

}  // namespace flash_dmattn
