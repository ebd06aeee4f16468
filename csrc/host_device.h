// What code for host and device alike is written with. Compile with -ffp-contract=off (nvcc: -fmad=false), so that
// nothing is fused but what says so.
#pragma once

#if defined(__CUDACC__)
#define CTS_HD __host__ __device__ __forceinline__
#define CTS_UNROLL _Pragma("unroll")
#else
#define CTS_HD inline __attribute__((always_inline))
#define CTS_UNROLL _Pragma("GCC unroll 16")
#endif

// Code compiled once for each instruction set lives in a namespace of its own, or the linker would keep one of the
// copies for all.
#ifndef CTS_ISA
#define CTS_ISA common
#endif

namespace cts {
inline namespace CTS_ISA {

// a * b + c, rounded once where the machine can.
CTS_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

CTS_HD double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace CTS_ISA
}  // namespace cts
