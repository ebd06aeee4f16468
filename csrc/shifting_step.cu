// The step on a GPU: one launch for all tasks, one pass over memory. The rule itself is csrc/shifting_step.h.
//
// A block owns one tile, columns of one tensor; a thread owns 16 bytes of them (of phi), loads theta, momentum and gradient of up to 8 tasks
// before it uses the first, and holds theta in registers. More tasks are split over slices of the block, whose sums of differences meet in
// shared memory; a slice with more than 8 tasks takes them one after the other and lets theta wait in global memory. Heads are tiles of one
// task that take the inner step alone.
//
// The usual rule (momentum, no Nesterov, no maximize, no scale, no flags) has lean kernels, in which a tile whose gradients are all there and
// aligned goes through a short path without a choice a number; others go through the general kernels.
//
// Compiled once for each dtype, -DCTS_DTYPE=float32 and so on.
#ifndef CTS_HOST_SHIM
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

// Stores in assembly, because the compiler would split some of them. Momentum is not read before the next step, so it may leave the caches
// first (.cs); the next forward pass reads theta.
#define CTS_STORES(name, kind)                                                                                                              \
  __device__ __forceinline__ void name(uint4* to, uint4 x) {                                                                                \
    asm volatile("st.global" kind ".v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y), "r"(x.z),       \
                 "r"(x.w) : "memory");                                                                                                      \
  }                                                                                                                                         \
  __device__ __forceinline__ void name(uint2* to, uint2 x) {                                                                                \
    asm volatile("st.global" kind ".v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y) : "memory");             \
  }                                                                                                                                         \
  template <class T> __device__ __forceinline__ void name(T* to, T x) { *to = x; }
CTS_STORES(store_raw, "")
CTS_STORES(store_raw_once, ".cs")

// The compiler forgets where x came from, so it computes addresses anew instead of keeping those of all tasks in registers.
__device__ __forceinline__ void forget(int64_t& x) { asm volatile("" : "+l"(x)); }
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

// Tasks of a thread whose numbers are in flight at a time: more of them cost registers and so blocks.
template <bool SLICED> constexpr int LOADED = SLICED ? 1 : 2;

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

template <bool ONCE = false, int W, class P>
__device__ __forceinline__ void store(P* to, const P (&in)[W]) {
  typename Raw<W * sizeof(P)>::type raw;
  memcpy(&raw, in, sizeof raw);
  if (ONCE) store_raw_once(reinterpret_cast<decltype(raw)*>(to), raw);
  else store_raw(reinterpret_cast<decltype(raw)*>(to), raw);
}

// A gradient: read once, so it may leave the caches first.
template <int W, class P>
__device__ __forceinline__ void load_once(P (&out)[W], const P* from) {
  auto raw = __ldcs(reinterpret_cast<const typename Raw<W * sizeof(P)>::type*>(from));
  memcpy(out, &raw, sizeof raw);
}

template <bool ONCE = false, int W, class P, class C>
__device__ __forceinline__ void narrow_and_store(P* to, const C (&in)[W]) {
  P out[W];
  CTS_UNROLL
  for (int i = 0; i < W; ++i) out[i] = Narrow<P>::of(in[i]);
  store<ONCE>(to, out);
}

template <class P>
struct Buffers {
  typename Work<P>::type* phi;  // null: heads
  P *theta, *momentum;
  float* master;
  int64_t stride;
};

// What a launch is given. `table` is the device's copy of the gradients' addresses, or null: `gradients` holds them. wide: all gradients are
// aligned and, in a lean kernel, there. A slice of a block takes `share` of the tasks.
template <class P, int POINTERS, int GROUPS>
struct Params {
  Buffers<P> shared, heads;
  const Tile* tiles;
  const P* const* table;
  uint8_t *started, *nonfinite;
  Counting counting;
  int32_t tasks, share, count, shared_count;
  bool reset_momentum, wide;
  Rule<typename Work<P>::type> rules[GROUPS];
  uintptr_t lr[GROUPS], meta_lr[GROUPS];  // where a tensor's value is: a float's address, or a double's plus one; 0: it is in the rule
  const P* gradients[POINTERS];

  __device__ __forceinline__ const P* gradient(int i) const { return table != nullptr ? table[i] : gradients[i]; }
};

__device__ __forceinline__ double value_at(uintptr_t address) {
  return address & 1 ? *reinterpret_cast<const double*>(address - 1) : *reinterpret_cast<const float*>(address);
}

// The inner step of the first `tasks` of N tasks at W columns: theta [N][W] holds the result, momentum is stored. first: the first one's gradient
// in the table; place: of the columns in its row; at: of the columns in its gradient. LEAN: no flags. PRESENT: no gradient is missing.
template <bool LEAN, bool PRESENT, int N, int W, class P, class C, class Launch>
__device__ __forceinline__ void inner_steps(C (*theta)[W], const Launch& p, const Buffers<P>& b, const Rule<C>& rule, int first, int tasks,
                                            int64_t place, int64_t at) {
  P x[N][W], v[N][W], g[N][W];
  const P* from[N];
  CTS_UNROLL
  for (int t = 0; t < N; ++t) {
    if (t >= tasks) continue;
    const int64_t here = place + t * b.stride;
    load(x[t], b.theta + here);
    if (sizeof(P) < sizeof(C)) load(theta[t], reinterpret_cast<const C*>(b.master) + here);
    if (rule.has_momentum) load(v[t], b.momentum + here);
  }
  CTS_UNROLL
  for (int t = 0; t < N; ++t) {
    if (t >= tasks) continue;
    from[t] = p.gradient(first + t);
    if (PRESENT || from[t] != nullptr) load_once(g[t], from[t] + at);
  }
  CTS_UNROLL
  for (int t = 0; t < N; ++t) {
    if (t >= tasks) continue;
    C momentum[W];
    bool bad = false;
    const bool present = PRESENT || from[t] != nullptr;
    const bool started = LEAN || p.started == nullptr || rule.gain == 1 || p.started[first + t] != 0;
    CTS_UNROLL
    for (int i = 0; i < W; ++i) {  // low precision: the parameter counts where it is not its rounded master: the user wrote it
      if (sizeof(P) == sizeof(C) || widen<C>(Narrow<P>::of(theta[t][i])) != widen<C>(x[t][i])) theta[t][i] = widen<C>(x[t][i]);
      momentum[i] = 0;
      if (!present) continue;
      C gradient = unscaled(widen<C>(g[t][i]), rule);
      if (!LEAN && p.nonfinite != nullptr) bad = bad || !(gradient - gradient == 0);
      if (rule.has_momentum) momentum[i] = widen<C>(v[t][i]);
      inner_step(theta[t][i], momentum[i], gradient, started, rule);
    }
    if (!LEAN && bad) p.nonfinite[first + t] = 1;
    if (rule.reset_momentum) {
      CTS_UNROLL
      for (int i = 0; i < W; ++i) momentum[i] = 0;
    }
    if (rule.reset_momentum || (present && rule.has_momentum)) narrow_and_store<true>(b.momentum + place + t * b.stride, momentum);
  }
}

template <int W, class P, class C>
__device__ __forceinline__ void store_theta(const Buffers<P>& b, int64_t place, const C (&theta)[W]) {
  narrow_and_store(b.theta + place, theta);
  if (sizeof(P) < sizeof(C)) store(reinterpret_cast<C*>(b.master) + place, theta);
}

template <int W, class P, class C>
__device__ __forceinline__ void load_theta(C (&theta)[W], const Buffers<P>& b, int64_t place) {
  load(theta, reinterpret_cast<const C*>(sizeof(P) < sizeof(C) ? static_cast<const void*>(b.master) : b.theta) + place);
}

// sum <- the sum over all slices, in their order.
template <int W, class C>
__device__ __forceinline__ void add_slices(C (&sum)[W]) {
  DYNAMIC_SHARED(memory);
  using Part = typename Raw<W * sizeof(C)>::type;
  Part* parts = reinterpret_cast<Part*>(memory) + threadIdx.x;  // [slices][lanes]
  memcpy(&parts[threadIdx.y * blockDim.x], sum, sizeof sum);
  __syncthreads();
  for (unsigned s = 0; s < blockDim.y; ++s) {
    C one[W];
    memcpy(one, &parts[s * blockDim.x], sizeof one);
    CTS_UNROLL
    for (int i = 0; i < W; ++i) sum[i] = s == 0 ? one[i] : sum[i] + one[i];
  }
  __syncthreads();  // the next columns' parts go to the same place
}

// One step of W columns of a shared tensor. A thread takes all tasks, or those of its slice; one that is not active only keeps the others
// company at their barriers. EXACT: there are N tasks.
template <bool LEAN, bool PRESENT, int N, bool SLICED, bool EXACT, int W, class P, class C, class Launch>
__device__ __forceinline__ void step_shared(const Launch& p, const Tile& tile, const Rule<C>& rule, int column, bool active) {
  const Buffers<P>& b = p.shared;
  constexpr int BATCH = N < LOADED<SLICED> ? N : LOADED<SLICED>;
  const int64_t spot = tile.column + column, at = tile.at + column;
  const int from = SLICED ? threadIdx.y * p.share : 0, to = EXACT ? N : SLICED ? min(from + p.share, p.tasks) : p.tasks;
  int begin = from;
  C theta[N][W], phi[W], sum[W] = {};
  if (active) {
    load(phi, b.phi + spot);
    for (;; begin += N) {
      int64_t place = begin * b.stride + spot;
      CTS_UNROLL
      for (int t = 0; t < N; t += BATCH, place += BATCH * b.stride) {
        if (N > 8) forget(place);
        inner_steps<LEAN, PRESENT, BATCH>(theta + t, p, b, rule, tile.first + begin + t, to - begin - t, place, at);
      }
      CTS_UNROLL
      for (int t = 0; t < N; ++t) {
        if (begin + t >= to) continue;
        CTS_UNROLL
        for (int i = 0; i < W; ++i) sum[i] = t == 0 && begin == from ? theta[0][i] - phi[i] : sum[i] + (theta[t][i] - phi[i]);
      }
      if constexpr (!SLICED) break;
      if (begin + N >= to) break;
      CTS_UNROLL
      for (int t = 0; t < N; ++t) store_theta(b, (begin + t) * b.stride + spot, theta[t]);
    }
  }
  C delta[W] = {};
  if (rule.meta_update) {
    if (SLICED && blockDim.y > 1) add_slices(sum);
    CTS_UNROLL
    for (int i = 0; i < W; ++i) delta[i] = meta_update(phi[i], sum[i], rule);
  }
  if (!active) return;
  if (rule.meta_update && (!SLICED || threadIdx.y == 0)) store(b.phi + spot, phi);
  const auto finish = [&](C (&one)[W], int64_t place) {
    CTS_UNROLL
    for (int i = 0; i < W; ++i) {
      if (rule.meta_update) shift(one[i], delta[i], rule);
      if (rule.reset) one[i] = phi[i];
    }
    store_theta(b, place, one);
  };
  int64_t place = begin * b.stride + spot;
  CTS_UNROLL
  for (int t = 0; t < N; ++t, place += b.stride) {
    if (N > 8) forget(place);
    if (begin + t < to) finish(theta[t], place);
  }
  if (SLICED) {
    for (int t = from; t < begin; ++t) {
      C one[W];
      load_theta(one, b, t * b.stride + spot);
      finish(one, t * b.stride + spot);
    }
  }
}

// The inner step of W columns of a head.
template <bool LEAN, bool PRESENT, int W, class P, class C, class Launch>
__device__ __forceinline__ void step_head(const Launch& p, const Tile& tile, const Rule<C>& rule, int column) {
  C theta[1][W];
  inner_steps<LEAN, PRESENT, 1>(theta, p, p.heads, rule, tile.first, 1, tile.column + column, tile.at + column);
  store_theta(p.heads, tile.column + column, theta[0]);
}

// All of a tile. Its columns up to `packed` go 16 bytes (of phi) at a time, by way of the gradients' alignment; the rest one by one.
template <bool LEAN, int N, bool SLICED, class P, class C, class Launch>
__device__ __forceinline__ void step_tile(const Launch& p, const Tile& tile, const Rule<C>& rule) {
  constexpr int W = 16 / sizeof(C);
  bool wide = p.wide;
  if (!wide) {
    uintptr_t addresses = 0;
    bool missing = false;
    for (int t = 0; t < (tile.head ? 1 : p.tasks); ++t) {
      const auto address = reinterpret_cast<uintptr_t>(p.gradient(tile.first + t));
      addresses |= address, missing |= address == 0;
    }
    wide = addresses % (W * sizeof(P)) == 0 && !(LEAN && missing);
  }
  const int packed = wide ? tile.columns / W * W : 0;
  if (tile.head) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    if (thread * W < packed) step_head<LEAN, LEAN, W, P>(p, tile, rule, thread * W);
    for (int column = packed + thread; column < tile.columns; column += threads) step_head<LEAN, false, 1, P>(p, tile, rule, column);
    return;
  }
  constexpr bool ALWAYS = !SLICED && N <= 2;  // N tasks
  const int lane = threadIdx.x, lanes = blockDim.x;
  const bool active = lane * W < packed;
  if (LEAN && !SLICED && (ALWAYS || p.tasks == N)) {
    if (active) step_shared<LEAN, LEAN, N, SLICED, true, W, P>(p, tile, rule, lane * W, true);
  } else if (active || (SLICED && packed > 0)) {
    step_shared<LEAN, LEAN, N, SLICED, ALWAYS, W, P>(p, tile, rule, lane * W, active);
  }
  for (int column = packed + lane; column - (SLICED ? lane : 0) < tile.columns; column += lanes)
    step_shared<LEAN, false, N, SLICED, ALWAYS, 1, P>(p, tile, rule, column, column < tile.columns);
}

// What a captured step decides on the device, before anything is counted.
struct Decision {
  bool works, meta_update, reset;
};

__device__ __forceinline__ Decision decide(const Counting& c) {
  const int64_t inner_step = *c.counters + 1;
  return {c.found_inf == nullptr || *c.found_inf == 0, c.meta_interval == 1 || inner_step % c.meta_interval == 0, inner_step >= c.horizon};
}

// The rule of a tile's group at this step: what the device was to read or decide is filled in, what a lean kernel takes for granted is constant.
template <bool LEAN, class C, class Launch>
__device__ __forceinline__ Rule<C> rule_of(const Launch& p, const Tile& tile, const Decision& decision) {
  Rule<C> rule = p.rules[tile.group];
  const Counting& c = p.counting;
  if (c.counters != nullptr) {
    if (p.lr[tile.group] != 0) rule.descent = C(-value_at(p.lr[tile.group]));
    if (p.meta_lr[tile.group] != 0) rule.rate = C(value_at(p.meta_lr[tile.group]) / p.tasks);
    if (c.grad_scale != nullptr) rule.scale = C(1 / double(*c.grad_scale)), rule.scaled = true;
    rule.meta_update = rule.rate != 0 && decision.meta_update;
    rule.reset = decision.reset;
    rule.reset_momentum = rule.reset && p.reset_momentum;
  }
  if (tile.head) rule.meta_update = rule.reset = rule.reset_momentum = false;
  if (LEAN) rule.has_momentum = true, rule.nesterov = rule.maximize = rule.scaled = false;
  return rule;
}

// What the last block to finish does: first-gradient flags and counters for the next step.
template <class Launch>
__device__ __forceinline__ void advance(const Launch& p, const Decision& decision) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  if (thread == 0) *p.counting.ticket = 0;
  if (!decision.works) return;
  for (int i = thread; i < p.count; i += threads) {
    if (p.gradient(i) != nullptr && p.rules[p.counting.groups[i]].has_momentum) p.started[i] = 1;
    if (decision.reset && p.reset_momentum && i < p.shared_count) p.started[i] = 0;
  }
  if (thread != 0 || !p.counting.advances) return;
  int64_t* counters = p.counting.counters;  // inner_step, round, meta_updates
  counters[0] = decision.reset ? 0 : counters[0] + 1;
  counters[1] += decision.reset;
  counters[2] += decision.meta_update;
}

// A block's turn among those that have read what the last one will write. All threads call it.
__device__ __forceinline__ unsigned take_ticket(const Counting& c) {
  __syncthreads();
  if (threadIdx.x != 0 || threadIdx.y != 0) return 0;
  __threadfence();
  return atomicAdd(c.ticket, 1u);
}

// Blocks that share a multiprocessor, which bounds the registers.
template <class P, bool LEAN, int N, bool SLICED>
constexpr int MIN_BLOCKS = SLICED ? (LEAN ? 2 : 1) : N <= 2 ? 8 : N <= 4 ? 6 : LEAN && sizeof(P) >= 4 ? 5 : 4;

template <bool LEAN, int N, bool SLICED, class P, int POINTERS, int GROUPS>
__global__ void __launch_bounds__(SLICED ? MAX_SLICES * 32 : THREADS, MIN_BLOCKS<P, LEAN, N, SLICED>)
    shifting_step(const __grid_constant__ Params<P, POINTERS, GROUPS> p) {
  const Counting& c = p.counting;
  const Tile tile = p.tiles[blockIdx.x];
  const bool counts = c.counters != nullptr;
  const Decision decision = counts ? decide(c) : Decision{true, false, false};
  const auto rule = rule_of<LEAN, typename Work<P>::type>(p, tile, decision);
  const bool reads_flags = !LEAN && rule.gain != 1;  // as it goes: then its ticket has to wait until it is through
  unsigned turn = 0;
  if (counts && !reads_flags) turn = take_ticket(c);
  if (decision.works) step_tile<LEAN, N, SLICED, P>(p, tile, rule);
  if (!counts) return;
  if (reads_flags) turn = take_ticket(c);
  __shared__ int last;
  if (threadIdx.x == 0 && threadIdx.y == 0) last = turn == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  advance(p, decision);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Whether all gradients are aligned to `bytes` and, if they must, there.
bool are_wide(const Launch& l, const Step& step, size_t bytes, bool present) {
  uintptr_t addresses = 0;
  bool missing = false;
  for (int i = 0; i < l.count; ++i) {
    const auto address = reinterpret_cast<uintptr_t>(step.gradients[i]);
    addresses |= address, missing |= address == 0;
  }
  return addresses % bytes == 0 && !(present && missing);
}

template <bool LEAN, int N, bool SLICED, class P, int POINTERS, int GROUPS>
void launch_kernel(const Launch& l, const Step& step, const Counting& counting) {
  using C = typename Work<P>::type;
  static_assert(sizeof(Params<P, POINTERS, GROUPS>) <= MAX_PARAMETER_BYTES, "a kernel takes no more");
  auto buffers = [](const Flat& f) {
    return Buffers<P>{static_cast<C*>(f.phi), static_cast<P*>(f.theta), static_cast<P*>(f.momentum), static_cast<float*>(f.master), f.stride};
  };
  const Shape shape = shape_of(l.shared.rows);
  Params<P, POINTERS, GROUPS> p;
  p.shared = buffers(l.shared), p.heads = buffers(l.heads);
  p.tiles = l.tiles, p.table = static_cast<const P* const*>(l.table), p.counting = counting;
  p.started = l.started, p.nonfinite = step.nonfinite;
  p.tasks = l.shared.rows, p.share = shape.share, p.count = l.count, p.shared_count = l.shared_count;
  p.reset_momentum = step.reset_momentum, p.wide = are_wide(l, step, 16 / sizeof(C) * sizeof(P), LEAN);
  for (int i = 0; i < l.num_groups; ++i) {
    p.rules[i] = make_rule<C>(step.groups[i], step, l.shared.rows, true);
    p.lr[i] = l.lr[i], p.meta_lr[i] = l.meta_lr[i];
  }
  if (l.table == nullptr) memcpy(p.gradients, step.gradients, l.count * sizeof(void*));
  void* arguments[] = {&p};
  check(cudaLaunchKernel(shifting_step<LEAN, N, SLICED, P, POINTERS, GROUPS>, dim3(l.num_tiles), dim3(shape.lanes, shape.slices), arguments,
                         shape.slices > 1 ? shape.lanes * shape.slices * 16 : 0, static_cast<cudaStream_t>(l.stream)),
        "launch of the step");
}

// Whether all groups have the rule that lean kernels are made for.
bool is_usual(const Launch& l, const Step& step, const Counting& counting) {
  if (step.nonfinite != nullptr || step.inverse_scale != 1 || counting.grad_scale != nullptr) return false;
  return std::all_of(step.groups, step.groups + l.num_groups, [&](const Group& g) {
    return g.momentum != 0 && !g.nesterov && !g.maximize && (l.started == nullptr || g.dampening == 0);
  });
}

template <class P, int N, bool SLICED = false>
void launch_sized(const Launch& l, const Step& step, const Counting& counting) {
  const bool usual = is_usual(l, step, counting);
  if constexpr (sizeof(P) == 4) {  // small nets count microseconds; the other types do without these kernels
    if (usual && l.num_groups <= SMALL_GROUPS && (l.table != nullptr || l.count <= SMALL_POINTERS))
      return launch_kernel<true, N, SLICED, P, SMALL_POINTERS, SMALL_GROUPS>(l, step, counting);
  }
  (usual ? launch_kernel<true, N, SLICED, P, MAX_POINTERS, MAX_GROUPS> : launch_kernel<false, N, SLICED, P, MAX_POINTERS, MAX_GROUPS>)(l, step, counting);
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
  else launch_sized<P, HELD, true>(l, step, counting);
}

}  // namespace cts
