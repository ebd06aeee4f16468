// Runs csrc/cuda/shifting_step.cu on the CPU, for sanitizers: g++ -x c++ -include host_shim.h -DCTS_HOST_SHIM
// -fno-strict-aliasing.
//
// The blocks run one after the other; a block's threads are fibers of one thread of the system, which take turns at its
// barriers.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __global__ inline
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) char* name = shim::dynamic_shared

struct dim3 {
  unsigned x, y, z = 1;
  explicit dim3(unsigned x = 0, unsigned y = 1) : x(x), y(y) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace shim {
inline char* dynamic_shared = nullptr;

// One thread of a block. A sanitizer is told of every change of stacks.
struct Fiber {
  static constexpr size_t STACK_BYTES = 256 << 10;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  ucontext_t context;
  void* fake_stack = nullptr;
  bool done = true;
};

inline std::vector<Fiber> fibers;  // made once, used for every block
inline ucontext_t scheduler;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_bytes = 0;
inline Fiber* current = nullptr;
inline void (*call)(void*);  // the kernel with its parameters
inline void* parameters;

inline void leave(bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &current->fake_stack, scheduler_stack, scheduler_bytes);
  swapcontext(&current->context, &scheduler);
  __sanitizer_finish_switch_fiber(current->fake_stack, &scheduler_stack, &scheduler_bytes);
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
  call(parameters);
  current->done = true;
  leave(true);
}

// All threads of a block, each as far as its next barrier, until all are done.
inline void run_block() {
  const unsigned count = blockDim.x * blockDim.y;
  if (fibers.size() < count) fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::STACK_BYTES};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.done = false;
  }
  for (unsigned running = count; running > 0;) {
    const unsigned before = running;
    for (unsigned i = 0; i < count; ++i) {
      if (fibers[i].done) continue;
      threadIdx.x = i % blockDim.x, threadIdx.y = i / blockDim.x;
      current = &fibers[i];
      void* fake_stack = nullptr;
      __sanitizer_start_switch_fiber(&fake_stack, current->stack.get(), Fiber::STACK_BYTES);
      swapcontext(&scheduler, &current->context);
      __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
      if (current->done) --running;
    }
    if (running > 0 && running != before)
      abort();  // some threads of the block have ended, others wait for them at a barrier
  }
}

// x rounded to a float of `fraction` fraction bits and the given exponent range, ties to even, as the bits of the
// smaller type.
inline uint16_t narrow(float x, int fraction, int bias) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
  const int drop = 23 - fraction;
  const uint32_t infinity = uint32_t(2 * bias + 1) << fraction;
  if (magnitude > 0x7f800000) return sign | infinity | 1 << (fraction - 1);  // NaN
  int exponent = int(magnitude >> 23) - 127 + bias;
  uint32_t significand = (magnitude & 0x7fffff) | (magnitude >> 23 ? 0x800000 : 0);
  int shift = drop;
  if (exponent < 1)
    shift += std::min(1 - exponent - (magnitude >> 23 ? 0 : 1), 25), exponent = 0;  // a subnormal result
  if (shift > 25) return sign;
  const uint32_t half = 1u << (shift - 1), rest = significand & ((1u << shift) - 1);
  significand >>= shift;
  if (rest > half || (rest == half && (significand & 1))) ++significand;
  const uint32_t result = exponent > 0 ? (uint32_t(exponent - 1) << fraction) + significand : significand;
  return sign | std::min(result, infinity);
}

inline float widen(uint16_t bits, int fraction, int bias) {
  const int exponent = (bits & 0x7fff) >> fraction, significand = bits & ((1 << fraction) - 1);
  float value;
  if (exponent == 2 * bias + 1) value = significand ? __builtin_nanf("") : __builtin_inff();
  else if (exponent == 0) value = __builtin_ldexpf(float(significand), 1 - bias - fraction);
  else value = __builtin_ldexpf(float(significand | 1 << fraction), exponent - bias - fraction);
  return bits >> 15 ? -value : value;
}
}  // namespace shim

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return shim::widen(x.bits, 7, 127); }
inline float __half2float(__half x) { return shim::widen(x.bits, 10, 15); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {shim::narrow(x, 7, 127)}; }
inline __half __float2half_rn(float x) { return {shim::narrow(x, 10, 15)}; }

template <class T> T __ldcs(const T* from) { return *from; }
template <class T> void store_raw(T* to, T value, bool) { *to = value; }

inline unsigned add_after_reads(unsigned* at, unsigned more) { return (*at += more) - more; }
inline void __syncthreads() { shim::leave(false); }
using std::min;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 99000, cudaSuccess; }

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 blocks, dim3 threads, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  gridDim = blocks, blockDim = threads;
  static void (*launched)(Params);
  launched = kernel;
  shim::call = [](void* params) { launched(*static_cast<std::remove_const_t<Params>*>(params)); };
  shim::parameters = arguments[0];
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    void* shared = shared_bytes ? aligned_alloc(16, shared_bytes)
                                : nullptr;  // of its exact size, so that a sanitizer sees its end
    shim::dynamic_shared = static_cast<char*>(shared);
    shim::run_block();
    free(shared);
  }
  return cudaSuccess;
}
