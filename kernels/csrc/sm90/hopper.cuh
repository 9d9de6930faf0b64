// Thin wrappers of the sm_90a instructions that the kernels use: barriers, copies that arrive at them, matrix descriptors.
#pragma once

#include <cstdint>

#include "../common/fragments.cuh"
#include "../common/shared_memory.cuh"

namespace flash_dmattn::sm90 {

constexpr int kWarpgroup = 128;

// Barriers in shared memory. A wait for phase 0 returns once the barrier has completed for the first time.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers known to all threads that synchronize with this one.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// Barriers of the hardware among whole warps, by number.

__device__ __forceinline__ void named_sync(int number, int threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int number, int threads) {
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Whether the predicate holds in any of the threads that meet.
__device__ __forceinline__ bool named_any(int number, int threads, bool predicate) {
    int result;
    asm volatile(
        "{\n.reg .pred mine, any;\n"
        "setp.ne.b32 mine, %3, 0;\n"
        "barrier.cta.red.or.pred any, %1, %2, mine;\n"
        "selp.b32 %0, 1, 0, any;\n}\n"
        : "=r"(result)
        : "r"(number), "r"(threads), "r"(int(predicate))
        : "memory");
    return result;
}

// Counters in memory, by which blocks tell each other what they have written.

__device__ __forceinline__ int count_up(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

__device__ __forceinline__ void set_counter(int* counter, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

__device__ __forceinline__ void wait_for_counter(const int* counter, int value) {
    int seen;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < value);
}

// Position in a ring of stages.
template <int kStages>
struct Ring {
    int stage = 0;
    int phase = 0;

    __device__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// Arrives at `barrier` once all copies that this thread has issued so far have landed.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Adds fp32 numbers in shared memory to those at `target`, `bytes` of them, a multiple of 16; both 16-byte aligned.
__device__ __forceinline__ void reduce_bulk(float* target, uint32_t source, int bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
        "cp.async.bulk.commit_group;" ::"l"(target),
        "r"(source), "r"(bytes)
        : "memory");
}

// Waits until the shared memory that this thread's reductions read may be written again.
__device__ __forceinline__ void reduce_bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void reduce_bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void reduce(float* target, float value) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(target), "f"(value) : "memory");
}

__device__ __forceinline__ void reduce(float* target, float4 values) {
    asm volatile(
        "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(values.x), "f"(values.y),
        "f"(values.z), "f"(values.w)
        : "memory");
}

// Writes four 8 x 8 matrices of 16-bit values; lane i tells where row i % 8 of matrix i / 8 goes.
__device__ __forceinline__ void store_matrices(uint32_t target, const uint32_t* values) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(values[0]),
        "r"(values[1]), "r"(values[2]), "r"(values[3])
        : "memory");
}

// Orders earlier ordinary writes of shared memory before later reads by the tensor cores.
__device__ __forceinline__ void fence_shared_for_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders ordinary accesses of global memory and bulk reductions to it.
__device__ __forceinline__ void fence_global_for_reductions() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Warpgroup matrix products run asynchronously: fence after touching their registers, commit, wait.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators across this place.
template <int kSize>
__device__ __forceinline__ void pin(float (&registers)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Keep the compiler from computing a value anew wherever it is used: it does not see through a shuffle.

__device__ __forceinline__ int keep(int value) { return __shfl_sync(~0u, value, threadIdx.x % 32); }

// For a value that is the same in the whole warp.
__device__ __forceinline__ int keep_of_warp(int value) { return __shfl_sync(~0u, value, 0); }

// Describes a matrix in shared memory whose rows of kRowBytes (64 or 128) bytes are swizzled by 16-byte pieces.
// `leading`: bytes between pieces of kRowBytes along the contiguous dimension (for operands across the depth).
template <int kRowBytes>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int leading) {
    static_assert(kRowBytes == 128 || kRowBytes == 64);
    constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(8 * kRowBytes >> 4) << 32 | kSwizzle << 62;
}

}  // namespace flash_dmattn::sm90
