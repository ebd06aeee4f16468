// The step on a GPU: one launch for all tasks, one pass over memory. The rule itself is csrc/shifting_step.h.
//
// A block owns one tile, columns of one tensor; a thread owns 16 bytes of them (of phi), loads theta, momentum and gradient of all tasks
// before it uses the first, and holds theta in registers: up to 16 tasks. More tasks go through in chunks of 8, their theta kept in shared
// memory until the shift, or in global memory where that is too small. Heads are tiles of one task that take the inner step alone.
//
// Compiled once for each dtype, -DCTS_DTYPE=float32 and so on.
#ifndef CTS_HOST_SHIM
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EACH_THREAD  // csrc/host_shim.h makes it a loop over the threads of a block
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

// Plain stores, in assembly because the compiler would split some of them.
__device__ __forceinline__ void store_raw(uint4* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_raw(uint2* to, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y) : "memory");
}
template <class T> __device__ __forceinline__ void store_raw(T* to, T x) { *to = x; }
#endif

#include "launch.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace cts {

template <class C, class P> __device__ __forceinline__ C widen(P x) { return x; }
template <> __device__ __forceinline__ float widen<float>(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ float widen<float>(__half x) { return __half2float(x); }

template <class P> struct Narrow;  // ties to even
template <> struct Narrow<float> { static __device__ __forceinline__ float of(float x) { return x; } };
template <> struct Narrow<double> { static __device__ __forceinline__ double of(double x) { return x; } };
template <> struct Narrow<__nv_bfloat16> { static __device__ __forceinline__ __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); } };
template <> struct Narrow<__half> { static __device__ __forceinline__ __half of(float x) { return __float2half_rn(x); } };

namespace {

constexpr int THREADS = 128, CHUNK = 8;
template <int N> constexpr int MIN_BLOCKS = N == 0 ? 2 : N <= 2 ? 8 : N <= 4 ? 5 : N <= 8 ? 3 : 2;  // on a multiprocessor: bounds the registers

template <class P> struct Work { using type = float; };
template <> struct Work<double> { using type = double; };

template <int BYTES> struct Raw;
template <> struct Raw<16> { using type = uint4; };
template <> struct Raw<8> { using type = uint2; };
template <> struct Raw<4> { using type = unsigned; };
template <> struct Raw<2> { using type = unsigned short; };

// W numbers in one access; `from` and `to` are aligned to all of them.
template <int W, class P>
__device__ __forceinline__ void load(P (&out)[W], const P* from) {
  auto raw = *reinterpret_cast<const typename Raw<W * sizeof(P)>::type*>(from);
  memcpy(out, &raw, sizeof raw);
}

template <int W, class P>
__device__ __forceinline__ void store(P* to, const P (&in)[W]) {
  typename Raw<W * sizeof(P)>::type raw;
  memcpy(&raw, in, sizeof raw);
  store_raw(reinterpret_cast<decltype(raw)*>(to), raw);
}

// A gradient: read once, so it may leave the caches first.
template <int W, class P>
__device__ __forceinline__ void load_once(P (&out)[W], const P* from) {
  auto raw = __ldcs(reinterpret_cast<const typename Raw<W * sizeof(P)>::type*>(from));
  memcpy(out, &raw, sizeof raw);
}

template <int W, class P, class C>
__device__ __forceinline__ void narrow_and_store(P* to, const C (&in)[W]) {
  P out[W];
  CTS_UNROLL
  for (int i = 0; i < W; ++i) out[i] = Narrow<P>::of(in[i]);
  store(to, out);
}

template <class P>
struct Buffers {
  typename Work<P>::type* phi;  // null: heads
  P *theta, *momentum;
  float* master;
  int64_t stride;
};

// What a launch is given. `table` is the device's copy of the gradients' addresses, or null: `gradients` holds them.
template <class P, int POINTERS, int GROUPS>
struct Params {
  Buffers<P> shared, heads;
  const Tile* tiles;
  const P* const* table;
  uint8_t *started, *nonfinite;
  Counting counting;
  int32_t tasks, count, shared_count;
  bool reset_momentum, keeps_in_shared;
  Rule<typename Work<P>::type> rules[GROUPS];
  uintptr_t lr[GROUPS], meta_lr[GROUPS];  // where a tensor's value is: a float's address, or a double's plus one; 0: it is in the rule
  const P* gradients[POINTERS];

  __device__ __forceinline__ const P* gradient(int i) const { return table != nullptr ? table[i] : gradients[i]; }
};

__device__ __forceinline__ double value_at(uintptr_t address) {
  return address & 1 ? *reinterpret_cast<const double*>(address - 1) : *reinterpret_cast<const float*>(address);
}

// The inner step of tasks first ... first + tasks (at most N) at W columns: theta [N][W] holds the result, momentum is stored.
template <int N, int W, class P, class C, class Launch>
__device__ __forceinline__ void inner_steps(C (&theta)[N][W], const Launch& p, const Buffers<P>& b, const Rule<C>& rule, int first, int tasks,
                                            int64_t spot, int64_t at) {
  P x[N][W], v[N][W], g[N][W];
  const P* from[N];
  CTS_UNROLL
  for (int t = 0; t < N; ++t) from[t] = t < tasks ? p.gradient(first + t) : nullptr;
  CTS_UNROLL
  for (int t = 0; t < N; ++t) {
    if (t >= tasks) continue;
    const int64_t place = t * b.stride + spot;
    load(x[t], b.theta + place);
    if (sizeof(P) < sizeof(C)) load(theta[t], reinterpret_cast<const C*>(b.master) + place);
    if (from[t] != nullptr) {
      load_once(g[t], from[t] + at);
      if (rule.has_momentum) load(v[t], b.momentum + place);
    }
  }
  CTS_UNROLL
  for (int t = 0; t < N; ++t) {
    if (t >= tasks) continue;
    C momentum[W];
    bool bad = false;
    const bool started = p.started == nullptr || rule.gain == 1 || p.started[first + t] != 0;
    CTS_UNROLL
    for (int i = 0; i < W; ++i) {  // low precision: the parameter counts where it is not its rounded master: the user wrote it
      if (sizeof(P) == sizeof(C) || widen<C>(Narrow<P>::of(theta[t][i])) != widen<C>(x[t][i])) theta[t][i] = widen<C>(x[t][i]);
      momentum[i] = 0;
      if (from[t] == nullptr) continue;
      C gradient = unscaled(widen<C>(g[t][i]), rule);
      if (p.nonfinite != nullptr) bad = bad || !(gradient - gradient == 0);
      if (rule.has_momentum) momentum[i] = widen<C>(v[t][i]);
      inner_step(theta[t][i], momentum[i], gradient, started, rule);
    }
    if (bad) p.nonfinite[first + t] = 1;
    if (rule.reset_momentum) {
      CTS_UNROLL
      for (int i = 0; i < W; ++i) momentum[i] = 0;
    }
    if (rule.reset_momentum || (from[t] != nullptr && rule.has_momentum)) narrow_and_store(b.momentum + t * b.stride + spot, momentum);
  }
}

template <int W, class P, class C>
__device__ __forceinline__ void store_theta(const Buffers<P>& b, int64_t place, const C (&theta)[W]) {
  narrow_and_store(b.theta + place, theta);
  if (sizeof(P) < sizeof(C)) store(reinterpret_cast<C*>(b.master) + place, theta);
}

// One step of W columns of at most N tasks, theta in registers.
template <int N, int W, class P, class C, class Launch>
__device__ __forceinline__ void step_in_registers(const Launch& p, const Buffers<P>& b, const Rule<C>& rule, int first, int tasks, int64_t spot,
                                                  int64_t at) {
  C theta[N][W], phi[W];
  if (b.phi != nullptr) load(phi, b.phi + spot);
  inner_steps<N, W>(theta, p, b, rule, first, tasks, spot, at);
  if (rule.meta_update) {
    C delta[W];
    CTS_UNROLL
    for (int i = 0; i < W; ++i) {
      C sum = theta[0][i] - phi[i];
      CTS_UNROLL
      for (int t = 1; t < N; ++t)
        if (t < tasks) sum = sum + (theta[t][i] - phi[i]);
      delta[i] = meta_update(phi[i], sum, rule);
      CTS_UNROLL
      for (int t = 0; t < N; ++t) shift(theta[t][i], delta[i], rule);
    }
    store(b.phi + spot, phi);
  }
  CTS_UNROLL
  for (int t = 0; t < N; ++t) {
    if (t >= tasks) continue;
    if (rule.reset) {
      CTS_UNROLL
      for (int i = 0; i < W; ++i) theta[t][i] = phi[i];
    }
    store_theta(b, t * b.stride + spot, theta[t]);
  }
}

// The same for any number of tasks: theta of task t waits at kept + t * kept_stride.
template <int W, class P, class C, class Launch>
__device__ __forceinline__ void step_in_chunks(const Launch& p, const Buffers<P>& b, const Rule<C>& rule, int first, int64_t spot, int64_t at,
                                               C* kept, int64_t kept_stride) {
  C theta[CHUNK][W], phi[W], sum[W];
  load(phi, b.phi + spot);
  for (int begin = 0; begin < p.tasks; begin += CHUNK) {
    const int tasks = min(CHUNK, p.tasks - begin);
    inner_steps<CHUNK, W>(theta, p, b, rule, first + begin, tasks, begin * b.stride + spot, at);
    CTS_UNROLL
    for (int t = 0; t < CHUNK; ++t) {
      if (t >= tasks) continue;
      CTS_UNROLL
      for (int i = 0; i < W; ++i) sum[i] = begin + t == 0 ? theta[0][i] - phi[i] : sum[i] + (theta[t][i] - phi[i]);
      memcpy(kept + (begin + t) * kept_stride, theta[t], sizeof theta[t]);
    }
  }
  C delta[W];
  if (rule.meta_update) {
    CTS_UNROLL
    for (int i = 0; i < W; ++i) delta[i] = meta_update(phi[i], sum[i], rule);
    store(b.phi + spot, phi);
  }
#pragma unroll 4  // loads ahead of their use
  for (int t = 0; t < p.tasks; ++t) {
    C one[W];
    memcpy(one, kept + t * kept_stride, sizeof one);
    CTS_UNROLL
    for (int i = 0; i < W; ++i) {
      if (rule.meta_update) shift(one[i], delta[i], rule);
      if (rule.reset) one[i] = phi[i];
    }
    store_theta(b, t * b.stride + spot, one);
  }
}

// Columns spot ... spot + W of a tile. N: tasks in registers, 0 for chunks.
template <int N, int W, class P, class C, class Launch>
__device__ __forceinline__ void step_columns(const Launch& p, const Tile& tile, const Rule<C>& rule, int column, char* shared_memory) {
  const int64_t spot = tile.column + column, at = tile.at + column;
  if (tile.head) {
    step_in_registers<1, W>(p, p.heads, rule, tile.first, 1, spot, at);
  } else if constexpr (N > 0) {
    step_in_registers<N, W>(p, p.shared, rule, tile.first, p.tasks, spot, at);
  } else {
    C* memory = sizeof(P) < sizeof(C) ? reinterpret_cast<C*>(p.shared.master) : reinterpret_cast<C*>(p.shared.theta);
    C* kept = shared_memory != nullptr ? reinterpret_cast<C*>(shared_memory) + column : memory + spot;
    step_in_chunks<W>(p, p.shared, rule, tile.first, spot, at, kept, shared_memory != nullptr ? blockDim.x * (16 / sizeof(C)) : p.shared.stride);
  }
}

// The rule of a tile's group at this step: what the device was to read or decide is filled in.
template <class C, class Launch>
__device__ __forceinline__ Rule<C> rule_of(const Launch& p, const Tile& tile) {
  Rule<C> rule = p.rules[tile.group];
  const Counting& c = p.counting;
  if (c.counters != nullptr) {
    const int64_t inner_step = *c.counters + 1;
    if (p.lr[tile.group] != 0) rule.descent = C(-value_at(p.lr[tile.group]));
    if (p.meta_lr[tile.group] != 0) rule.rate = C(value_at(p.meta_lr[tile.group]) / p.tasks);
    if (c.grad_scale != nullptr) rule.scale = C(1 / double(*c.grad_scale)), rule.scaled = true;
    rule.meta_update = rule.rate != 0 && inner_step % c.meta_interval == 0;
    rule.reset = inner_step >= c.horizon;
    rule.reset_momentum = rule.reset && p.reset_momentum;
  }
  if (tile.head) rule.meta_update = rule.reset = rule.reset_momentum = false;
  return rule;
}

// The same rule with the common choices as constants, which spares a branch for each number. Weight decay stays a choice, which costs a
// predicate: adding 0 theta would turn an infinite theta into NaN.
template <class C>
__device__ __forceinline__ Rule<C> as_plain(Rule<C> rule) {
  rule.has_momentum = true;
  rule.nesterov = rule.maximize = rule.scaled = false;
  return rule;
}

// What the last block to finish does: first-gradient flags and counters for the next step.
template <class Launch>
__device__ __forceinline__ void advance(const Launch& p, bool reset, bool meta_update) {
  for (int i = threadIdx.x; i < p.count; i += blockDim.x) {
    if (p.gradient(i) != nullptr && p.rules[p.counting.groups[i]].has_momentum) p.started[i] = 1;
    if (reset && p.reset_momentum && i < p.shared_count) p.started[i] = 0;
  }
  if (threadIdx.x != 0) return;
  *p.counting.ticket = 0;
  if (!p.counting.advances) return;
  int64_t* counters = p.counting.counters;  // inner_step, round, meta_updates
  counters[0] = reset ? 0 : counters[0] + 1;
  counters[1] += reset;
  counters[2] += meta_update;
}

template <class P, int N, int POINTERS, int GROUPS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<N>) shifting_step(const __grid_constant__ Params<P, POINTERS, GROUPS> p) {
  using C = typename Work<P>::type;
  constexpr int W = 16 / sizeof(C);
  DYNAMIC_SHARED(shared_memory);
  const Counting& c = p.counting;
  const bool works = c.found_inf == nullptr || *c.found_inf == 0;
  const Tile tile = p.tiles[blockIdx.x];
  const Rule<C> rule = rule_of<C>(p, tile);
  uintptr_t addresses = 0;
  const int rows = tile.head ? 1 : p.tasks;
  for (int t = 0; t < rows; ++t) addresses |= reinterpret_cast<uintptr_t>(p.gradient(tile.first + t));
  const int packed = !works || addresses % (W * sizeof(P)) != 0 ? 0 : tile.columns / W * W;
  const bool plain = rule.has_momentum && !rule.nesterov && !rule.maximize && !rule.scaled && p.nonfinite == nullptr;
  char* kept = N == 0 && p.keeps_in_shared ? shared_memory : nullptr;
  EACH_THREAD {
    if (int(threadIdx.x) * W < packed) {
      if (plain) step_columns<N, W, P>(p, tile, as_plain(rule), threadIdx.x * W, kept);
      else step_columns<N, W, P>(p, tile, rule, threadIdx.x * W, kept);
    }
    for (int column = packed + threadIdx.x; works && column < tile.columns; column += blockDim.x)
      step_columns<N, 1, P>(p, tile, rule, column, kept);
  }
  if (c.counters == nullptr) return;
  const int64_t inner_step = *c.counters + 1;
  const bool reset = inner_step >= c.horizon, meta_update = inner_step % c.meta_interval == 0;
  __shared__ bool last;  // not given a value here: threads share it
  __syncthreads();  // all threads have read the counters before the block hands in its ticket
  EACH_THREAD if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(c.ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  EACH_THREAD {
    if (works) advance(p, reset, meta_update);
    else if (threadIdx.x == 0) *c.ticket = 0;
  }
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class P, int N, int POINTERS, int GROUPS>
void launch_kernel(const Launch& l, const Step& step, const Counting& counting) {
  using C = typename Work<P>::type;
  static_assert(sizeof(Params<P, POINTERS, GROUPS>) <= MAX_PARAMETER_BYTES, "a kernel takes no more");
  auto buffers = [](const Flat& f) {
    return Buffers<P>{static_cast<C*>(f.phi), static_cast<P*>(f.theta), static_cast<P*>(f.momentum), static_cast<float*>(f.master), f.stride};
  };
  Params<P, POINTERS, GROUPS> p;
  p.shared = buffers(l.shared), p.heads = buffers(l.heads);
  p.tiles = l.tiles, p.table = static_cast<const P* const*>(l.table), p.counting = counting;
  p.started = l.started, p.nonfinite = step.nonfinite;
  p.tasks = l.shared.rows, p.count = l.count, p.shared_count = l.shared_count;
  p.reset_momentum = step.reset_momentum, p.keeps_in_shared = l.shared_bytes > 0;
  for (int i = 0; i < l.num_groups; ++i) {
    p.rules[i] = make_rule<C>(step.groups[i], step, l.shared.rows, true);
    p.lr[i] = l.lr[i], p.meta_lr[i] = l.meta_lr[i];
  }
  if (l.table == nullptr) memcpy(p.gradients, step.gradients, l.count * sizeof(void*));
  auto kernel = shifting_step<P, N, POINTERS, GROUPS>;
  if (l.shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes), "shared memory of the step");
  void* arguments[] = {&p};
  check(cudaLaunchKernel(kernel, dim3(l.num_tiles), dim3(l.threads), arguments, l.shared_bytes, static_cast<cudaStream_t>(l.stream)),
        "launch of the step");
}

template <class P, int N>
void launch_sized(const Launch& l, const Step& step, const Counting& counting) {
  if constexpr (sizeof(P) == 4) {  // small nets count microseconds; the other types do without a second kernel
    if (l.num_groups <= SMALL_GROUPS && (l.table != nullptr || l.count <= SMALL_POINTERS))
      return launch_kernel<P, N, SMALL_POINTERS, SMALL_GROUPS>(l, step, counting);
  }
  launch_kernel<P, N, MAX_POINTERS, MAX_GROUPS>(l, step, counting);
}

}  // namespace

namespace float32 { using Parameter = float; }
namespace float64 { using Parameter = double; }
namespace bfloat16 { using Parameter = __nv_bfloat16; }
namespace float16 { using Parameter = __half; }

void CTS_DTYPE::launch(const Launch& l, const Step& step, const Counting& counting) {
  using P = Parameter;
  check(cudaSetDevice(l.device), "choice of the device");
  const int tasks = l.shared.rows;
  if (tasks <= 1) launch_sized<P, 1>(l, step, counting);
  else if (tasks <= 2) launch_sized<P, 2>(l, step, counting);
  else if (tasks <= 4) launch_sized<P, 4>(l, step, counting);
  else if (tasks <= 8) launch_sized<P, 8>(l, step, counting);
  else if (tasks <= 16) launch_sized<P, 16>(l, step, counting);
  else launch_sized<P, 0>(l, step, counting);
}

}  // namespace cts
