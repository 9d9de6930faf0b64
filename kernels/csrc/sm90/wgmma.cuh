// The warpgroup matrix product of sm_90a: 64 rows x N columns x 16 deep, 16-bit operands, fp32 accumulators.
//
// Wgmma<N, Element>::score    d = a b^T or d += a b^T, both operands in shared memory, rows along the depth ("K-major")
// Wgmma<N, Element>::weigh    d += a b, a in registers, b in shared memory with rows across the depth ("MN-major")
// Wgmma<N, Element>::multiply like score; an operand that is turned has its rows across the depth
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flash_dmattn::sm90 {

template <int N, typename Element>
struct Wgmma;

#define FD_TEXT0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FD_TEXT1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FD_TEXT2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FD_TEXT3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FD_TEXT4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FD_TEXT5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FD_TEXT6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FD_TEXT7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FD_TEXT8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FD_TEXT9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FD_TEXT10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FD_TEXT11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FD_TEXT12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FD_TEXT13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FD_TEXT14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FD_TEXT15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define FD_REG8(b) \
    "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3]), "+f"(d[b + 4]), "+f"(d[b + 5]), "+f"(d[b + 6]), \
        "+f"(d[b + 7])

#define FD_TEXTS32 FD_TEXT0 ", " FD_TEXT1
#define FD_REGS32 FD_REG8(0), FD_REG8(8)
#define FD_TEXTS64 FD_TEXT0 ", " FD_TEXT1 ", " FD_TEXT2 ", " FD_TEXT3
#define FD_REGS64 FD_REG8(0), FD_REG8(8), FD_REG8(16), FD_REG8(24)
#define FD_TEXTS96 FD_TEXT0 ", " FD_TEXT1 ", " FD_TEXT2 ", " FD_TEXT3 ", " FD_TEXT4 ", " FD_TEXT5
#define FD_REGS96 FD_REG8(0), FD_REG8(8), FD_REG8(16), FD_REG8(24), FD_REG8(32), FD_REG8(40)
#define FD_TEXTS128 \
    FD_TEXT0 ", " FD_TEXT1 ", " FD_TEXT2 ", " FD_TEXT3 ", " FD_TEXT4 ", " FD_TEXT5 ", " FD_TEXT6 ", " FD_TEXT7
#define FD_REGS128 \
    FD_REG8(0), FD_REG8(8), FD_REG8(16), FD_REG8(24), FD_REG8(32), FD_REG8(40), FD_REG8(48), FD_REG8(56)
#define FD_TEXTS192 \
    FD_TEXT0 ", " FD_TEXT1 ", " FD_TEXT2 ", " FD_TEXT3 ", " FD_TEXT4 ", " FD_TEXT5 ", " FD_TEXT6 ", " FD_TEXT7 \
    ", " FD_TEXT8 ", " FD_TEXT9 ", " FD_TEXT10 ", " FD_TEXT11
#define FD_REGS192 \
    FD_REG8(0), FD_REG8(8), FD_REG8(16), FD_REG8(24), FD_REG8(32), FD_REG8(40), FD_REG8(48), FD_REG8(56), \
    FD_REG8(64), FD_REG8(72), FD_REG8(80), FD_REG8(88)
#define FD_TEXTS256 \
    FD_TEXT0 ", " FD_TEXT1 ", " FD_TEXT2 ", " FD_TEXT3 ", " FD_TEXT4 ", " FD_TEXT5 ", " FD_TEXT6 ", " FD_TEXT7 \
    ", " FD_TEXT8 ", " FD_TEXT9 ", " FD_TEXT10 ", " FD_TEXT11 ", " FD_TEXT12 ", " FD_TEXT13 ", " FD_TEXT14 ", " \
    FD_TEXT15
#define FD_REGS256 \
    FD_REG8(0), FD_REG8(8), FD_REG8(16), FD_REG8(24), FD_REG8(32), FD_REG8(40), FD_REG8(48), FD_REG8(56), \
    FD_REG8(64), FD_REG8(72), FD_REG8(80), FD_REG8(88), FD_REG8(96), FD_REG8(104), FD_REG8(112), FD_REG8(120)

// I0 to I4 number the operands that follow the N / 2 accumulators.
#define FD_DEFINE_WGMMA(N, ELEMENT, TYPE, I0, I1, I2, I3, I4)                                                   \
    template <>                                                                                                 \
    struct Wgmma<N, ELEMENT> {                                                                                  \
        template <bool kAccumulate>                                                                             \
        static __device__ __forceinline__ void score(float (&d)[N / 2], uint64_t a, uint64_t b) {               \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I2 ", 0;\n"                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FD_TEXTS##N "}, " \
                         I0 ", " I1 ", p, 1, 1, 0, 0;\n}\n"                                                     \
                         : FD_REGS##N                                                                           \
                         : "l"(a), "l"(b), "n"(kAccumulate));                                                   \
        }                                                                                                       \
        template <bool kAccumulate, bool kTurnA, bool kTurnB>                                                   \
        static __device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b) {            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I2 ", 0;\n"                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FD_TEXTS##N "}, " \
                         I0 ", " I1 ", p, 1, 1, " I3 ", " I4 ";\n}\n"                                          \
                         : FD_REGS##N                                                                           \
                         : "l"(a), "l"(b), "n"(kAccumulate), "n"(kTurnA), "n"(kTurnB));                         \
        }                                                                                                       \
        static __device__ __forceinline__ void weigh(float (&d)[N / 2], const uint32_t* a, uint64_t b) {        \
            asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FD_TEXTS##N "}, " \
                         "{" I0 ", " I1 ", " I2 ", " I3 "}, " I4 ", p, 1, 1, 1;\n}\n"                           \
                         : FD_REGS##N                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
        }                                                                                                       \
    };

#define FD_DEFINE_WGMMAS(N, I0, I1, I2, I3, I4)                          \
    FD_DEFINE_WGMMA(N, __nv_bfloat16, "bf16", I0, I1, I2, I3, I4)        \
    FD_DEFINE_WGMMA(N, __half, "f16", I0, I1, I2, I3, I4)

FD_DEFINE_WGMMAS(32, "%16", "%17", "%18", "%19", "%20")
FD_DEFINE_WGMMAS(64, "%32", "%33", "%34", "%35", "%36")
FD_DEFINE_WGMMAS(96, "%48", "%49", "%50", "%51", "%52")
FD_DEFINE_WGMMAS(128, "%64", "%65", "%66", "%67", "%68")
FD_DEFINE_WGMMAS(192, "%96", "%97", "%98", "%99", "%100")
FD_DEFINE_WGMMAS(256, "%128", "%129", "%130", "%131", "%132")

}  // namespace flash_dmattn::sm90
