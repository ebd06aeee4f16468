// Numbers in a GPU's memory: the four dtypes, loads and stores of several at a time, and what PTX says itself.
#pragma once

#ifndef CTS_HOST_SHIM
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

// Stores in assembly, because the compiler would split some of them. streams: what is stored leaves the caches first.
__device__ __forceinline__ void store_raw(uint4* to, uint4 x, bool streams) {
  asm volatile(
      "{\n .reg .pred s;\n setp.ne.s32 s, %5, 0;\n @s st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};\n"
      " @!s st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(__cvta_generic_to_global(to)),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(int(streams))
      : "memory");
}
__device__ __forceinline__ void store_raw(uint2* to, uint2 x, bool streams) {
  asm volatile(
      "{\n .reg .pred s;\n setp.ne.s32 s, %3, 0;\n @s st.global.cs.v2.u32 [%0], {%1, %2};\n @!s st.global.v2.u32 [%0], "
      "{%1, %2};\n}" ::"l"(__cvta_generic_to_global(to)),
      "r"(x.x), "r"(x.y), "r"(int(streams))
      : "memory");
}
template <class T> __device__ __forceinline__ void store_raw(T* to, T x, bool) { *to = x; }

// atomicAdd that comes after all that this thread, and those it has met at a barrier, have read.
__device__ __forceinline__ unsigned add_after_reads(unsigned* at, unsigned more) {
  unsigned before;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(at)), "r"(more)
               : "memory");
  return before;
}
#endif

#include <cstring>

#include "host_device.h"

namespace cts {

template <class C, class P> __device__ __forceinline__ C widen(P x) { return x; }
template <> __device__ __forceinline__ float widen<float>(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ float widen<float>(__half x) { return __half2float(x); }

template <class P> struct Narrow;  // ties to even
template <> struct Narrow<float> {
  static __device__ __forceinline__ float of(float x) { return x; }
};
template <> struct Narrow<double> {
  static __device__ __forceinline__ double of(double x) { return x; }
};
template <> struct Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); }
};
template <> struct Narrow<__half> {
  static __device__ __forceinline__ __half of(float x) { return __float2half_rn(x); }
};

template <class P> struct Work {
  using type = float;
};
template <> struct Work<double> {
  using type = double;
};

template <int BYTES> struct Raw;
template <> struct Raw<16> {
  using type = uint4;
};
template <> struct Raw<8> {
  using type = uint2;
};
template <> struct Raw<4> {
  using type = unsigned;
};
template <> struct Raw<2> {
  using type = unsigned short;
};

// W numbers in one access; `from` and `to` are aligned to all of them.
template <int W, class P> __device__ __forceinline__ void load(P (&out)[W], const P* from) {
  auto raw = *reinterpret_cast<const typename Raw<W * sizeof(P)>::type*>(from);
  memcpy(out, &raw, sizeof raw);
}

template <int W, class P> __device__ __forceinline__ void store(P* to, const P (&in)[W], bool streams) {
  typename Raw<W * sizeof(P)>::type raw;
  memcpy(&raw, in, sizeof raw);
  store_raw(reinterpret_cast<decltype(raw)*>(to), raw, streams);
}

// A gradient: read once, so it may leave the caches first.
template <int W, class P> __device__ __forceinline__ void load_once(P (&out)[W], const P* from) {
  auto raw = __ldcs(reinterpret_cast<const typename Raw<W * sizeof(P)>::type*>(from));
  memcpy(out, &raw, sizeof raw);
}

template <int W, class P, class C>
__device__ __forceinline__ void narrow_and_store(P* to, const C (&in)[W], bool streams) {
  P out[W];
  CTS_UNROLL
  for (int i = 0; i < W; ++i) out[i] = Narrow<P>::of(in[i]);
  store(to, out, streams);
}

}  // namespace cts
