// The step on a GPU: one launch for all tasks, one pass over memory. The rule itself is csrc/step.h.
//
// A block owns one tile, columns of one tensor; a thread owns 16 bytes of them (of phi), loads theta, momentum and
// gradient of up to 8 tasks before it uses the first, and holds theta in registers. More tasks are split over slices of
// the block, whose sums of differences meet in shared memory; a slice with more than 8 tasks takes them one after the
// other and lets theta wait in global memory. Heads are tiles of one task that take the inner step alone.
//
// The usual step (1, 2, 4, 8 or more tasks, momentum, no dampening, no Nesterov, no maximize, no scale, every gradient
// there) has lean kernels without a choice for each number, and for slices of 8 tasks each; others go through the
// general kernels. In both, a tile whose gradients are not aligned goes column by column.
//
// Where other processes hold further tasks, the step comes in two launches, partial_step and finish_step, each with one
// general kernel for any number of tasks.
//
// Compiled once for each dtype, -DCTS_DTYPE=float32 and so on.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/tiles.h"

namespace cts {
namespace {

// All of a tile.
template <bool LEAN, int N, Slices S, class P, class C, class Launch>
__device__ __forceinline__ void step_tile(const Launch& p, const Tile& tile, const Rule<C>& rule) {
  constexpr int W = 16 / sizeof(C);
  const int packed = packed_columns<P, C>(p, tile);
  if (tile.head) return step_head_tile<LEAN, P>(p, tile, rule, packed);
  constexpr bool SLICED = S != Slices::NONE, EXACT = S == Slices::FULL || (!SLICED && (LEAN || N <= 2));
  const int lane = threadIdx.x, lanes = blockDim.x;
  const bool active = lane * W < packed;
  if (active || (SLICED && packed > 0)) step_shared<LEAN, N, S, EXACT, W, P>(p, tile, rule, lane * W, active);
  for (int column = packed + lane; column - (SLICED ? lane : 0) < tile.columns; column += lanes)
    step_shared<LEAN, N, S, EXACT, 1, P>(p, tile, rule, column, column < tile.columns);
}

// What a captured step decides on the device, before anything is counted.
struct Decision {
  bool works, meta_update, reset;
};

__device__ __forceinline__ Decision decide(const Counting& c) {
  const int64_t inner_step = *c.counters + 1;
  return {c.found_inf == nullptr || *c.found_inf == 0, c.meta_interval == 1 || inner_step % c.meta_interval == 0,
          inner_step >= c.horizon};
}

// The rule of a tile's group at this step: what the device was to read or decide is filled in, what a lean kernel takes
// for granted is constant.
template <bool LEAN, class C, class Launch>
__device__ __forceinline__ Rule<C> rule_of(const Launch& p, const Tile& tile, const Decision& decision) {
  Rule<C> rule = p.rules[tile.group];
  const Counting& c = p.counting;
  if (c.counters != nullptr) {
    const DeviceRates& rates = p.rates[tile.group];
    if (rates.lr.address != nullptr) rule.descent = C(-value_of(rates.lr));
    if (rates.meta_lr.address != nullptr) rule.rate = C(value_of(rates.meta_lr) / p.num_tasks);
    if (c.grad_scale != nullptr) rule.scale = C(1 / double(*c.grad_scale)), rule.scaled = true;
    rule.meta_update = rule.rate != 0 && decision.meta_update;
    rule.reset = decision.reset;
    rule.reset_momentum = rule.reset && p.reset_momentum;
  }
  if (tile.head) rule.meta_update = rule.reset = rule.reset_momentum = false;
  if (LEAN) rule.has_momentum = true, rule.gain = 1, rule.nesterov = rule.maximize = rule.scaled = false;
  return rule;
}

// The flag of a gradient for the next step.
template <class C, class Launch>
__device__ __forceinline__ void advance_flag(const Launch& p, const Rule<C>& rule, int i, bool clears) {
  if (clears) p.started[i] = 0;
  else if (rule.has_momentum && p.gradient(i) != nullptr) p.started[i] = 1;
}

// The counters, and the ticket for the next launch. One thread of the block with the last ticket calls it.
__device__ __forceinline__ void advance_counters(const Counting& c, const Decision& decision) {
  *c.ticket = 0;
  if (!decision.works || !c.advances) return;
  int64_t* counters = c.counters;  // inner_step, round, meta_updates
  counters[0] = decision.reset ? 0 : counters[0] + 1;
  counters[1] += decision.reset;
  counters[2] += decision.meta_update;
}

// Whether this is the last block to have read what the last one writes. All threads call it; one, of the warp with the
// least to do, knows.
__device__ __forceinline__ bool is_last(const Counting& c) {
  __syncthreads();
  return threadIdx.x == blockDim.x - 1 && threadIdx.y == blockDim.y - 1 &&
         add_after_reads(c.ticket, 1) == gridDim.x - 1;
}

// Blocks that share a multiprocessor, which bounds the registers; what an H100 is fastest with, where that spills
// nothing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <class P> constexpr int MOST_BLOCKS = sizeof(P) >= 4 ? 5 : 4;
#else
template <class P> constexpr int MOST_BLOCKS = 4;
#endif
template <class P, bool LEAN, int N, Slices S>
constexpr int MIN_BLOCKS = S != Slices::NONE ? 1
                           : N <= 2          ? (LEAN ? 8 : 7)
                           : N <= 4          ? 5
                           : LEAN            ? MOST_BLOCKS<P>
                                             : 4;

template <bool LEAN, int N, Slices S, class P, int POINTERS, int GROUPS>
__global__ void __launch_bounds__(S == Slices::NONE ? THREADS : MAX_SLICES * 32, MIN_BLOCKS<P, LEAN, N, S>)
    shifting_step(const __grid_constant__ Params<P, POINTERS, GROUPS> p) {
  const Counting& c = p.counting;
  const Tile tile = p.tiles[blockIdx.x];
  const bool counts = c.counters != nullptr;
  const Decision decision = counts ? decide(c) : Decision{};
  const auto rule = rule_of<LEAN, typename Work<P>::type>(p, tile, decision);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const bool late = !LEAN && p.dampened;  // steps read the flags, so they are written when all blocks are done
  if (counts && !late) {                  // the counters have been read; a tensor's first block writes its flags
    if (is_last(c)) advance_counters(c, decision);
    for (int t = thread; decision.works && tile.at == 0 && t < (tile.head ? 1 : p.tasks); t += threads)
      advance_flag(p, rule, tile.first + t, rule.reset_momentum);
  }
  if (decision.works || !counts) step_tile<LEAN, N, S, P>(p, tile, rule);
  if (!counts || !late) return;
  __shared__ int last;
  const bool mine = is_last(c);
  if (thread == threads - 1) last = mine;
  __syncthreads();
  if (mine) advance_counters(c, decision);
  for (int i = thread; last && decision.works && i < p.count; i += threads)
    advance_flag(p, p.rules[c.groups[i]], i, decision.reset && p.reset_momentum && i < p.shared_count);
}

// The first half of a step in two, of W columns: the inner steps, and total <- the sum over all rows of theta - phi.
// Slices, and threads that are not active, are as in step_shared.
template <int W, class P, class C, class Launch>
__device__ __forceinline__ void sum_shared(const Launch& p, const Tile& tile, const Rule<C>& rule, C* total,
                                           unsigned column, bool active) {
  const Buffers<P>& b = p.shared;
  constexpr int BATCH = LOADED<P, Slices::ANY>;
  const int from = threadIdx.y * p.share, to = min(from + p.share, p.tasks);
  C sum[W] = {};
  if (active) {
    C theta[BATCH][W], phi[W];
    load(phi, b.phi + tile.column + column);
    for (int begin = from; begin < to; begin += BATCH) {
      const P* gradients[BATCH];
      inner_updates<false, BATCH, BATCH>(theta, gradients, true, p, b, rule, tile.first + begin, to - begin,
                                         begin * b.stride + tile.column, tile.at, column);
      CTS_UNROLL
      for (int t = 0; t < BATCH; ++t) {
        if (begin + t >= to) continue;
        CTS_UNROLL
        for (int i = 0; i < W; ++i) sum[i] = sum[i] + (theta[t][i] - phi[i]);
        store_theta(b, (begin + t) * b.stride + tile.column, column, theta[t], p.streams);
      }
    }
  }
  if (blockDim.y > 1) add_slices(sum);
  if (active && threadIdx.y == 0) store(total + tile.column + column, sum, false);
}

// The second half of W columns: the meta-update with a total over all tasks, shift and reset.
template <int W, class P, class C, class Launch>
__device__ __forceinline__ void finish_shared(const Launch& p, const Tile& tile, const Rule<C>& rule, unsigned column,
                                              bool active) {
  const Buffers<P>& b = p.shared;
  C phi[W], sum[W], delta[W] = {};
  if (active) {
    load(phi, b.phi + tile.column + column);
    load(sum, p.total + tile.column + column);
    CTS_UNROLL
    for (int i = 0; i < W; ++i)
      if (rule.meta_update) delta[i] = meta_update(phi[i], sum[i], rule);
  }
  if (blockDim.y > 1) __syncthreads();  // all slices have read phi
  if (!active) return;
  if (rule.meta_update && threadIdx.y == 0) store(b.phi + tile.column + column, phi, p.streams);
  for (int t = threadIdx.y * p.share; t < min(int(threadIdx.y + 1) * p.share, p.tasks); ++t) {
    C theta[W];
    load_theta(theta, b, t * b.stride + tile.column, column);
    CTS_UNROLL
    for (int i = 0; i < W; ++i) {
      if (rule.meta_update) shift(theta[i], delta[i], rule);
      if (rule.reset) theta[i] = phi[i];
    }
    store_theta(b, t * b.stride + tile.column, column, theta, p.streams);
  }
}

// body(columns at a time, a constant; column; whether it is active) for what the calling thread visits of a shared
// tile; all threads of a block come equally often.
template <int W, class Body>
__device__ __forceinline__ void over_columns(const Tile& tile, int packed, const Body& body) {
  const int lane = threadIdx.x, lanes = blockDim.x;
  if (packed > 0) body(std::integral_constant<int, W>(), lane * W, lane * W < packed);
  for (int column = packed + lane; column - lane < tile.columns; column += lanes)
    body(std::integral_constant<int, 1>(), column, column < tile.columns);
}

template <class P, int POINTERS, int GROUPS> struct Partial {
  Params<P, POINTERS, GROUPS> step;
  typename Work<P>::type* total;
};

template <class P, int POINTERS, int GROUPS>
__global__ void __launch_bounds__(MAX_SLICES * 32)
    partial_step(const __grid_constant__ Partial<P, POINTERS, GROUPS> p) {
  using C = typename Work<P>::type;
  const Tile tile = p.step.tiles[blockIdx.x];
  const Rule<C> rule = rule_of<false, C>(p.step, tile, Decision{});
  const int packed = packed_columns<P, C>(p.step, tile);
  if (tile.head) return step_head_tile<false, P>(p.step, tile, rule, packed);
  over_columns<16 / sizeof(C)>(tile, packed, [&](auto width, unsigned column, bool active) {
    sum_shared<decltype(width)::value, P>(p.step, tile, rule, p.total, column, active);
  });
}

template <class P, int GROUPS> struct Finish {
  Buffers<P> shared;
  const Tile* tiles;
  const typename Work<P>::type* total;
  int32_t tasks, share;
  bool streams;
  Rule<typename Work<P>::type> rules[GROUPS];
};

template <class P, int GROUPS>
__global__ void __launch_bounds__(MAX_SLICES * 32) finish_step(const __grid_constant__ Finish<P, GROUPS> p) {
  using C = typename Work<P>::type;
  constexpr int W = 16 / sizeof(C);
  const Tile tile = p.tiles[blockIdx.x];
  if (tile.head) return;
  const Rule<C> rule = p.rules[tile.group];
  over_columns<W>(tile, tile.columns / W * W, [&](auto width, unsigned column, bool active) {
    finish_shared<decltype(width)::value, P>(p, tile, rule, column, active);
  });
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Whether all gradients are aligned to `bytes`; a missing one is.
bool are_aligned(const Launch& l, const Control& control, size_t bytes) {
  uintptr_t addresses = 0;
  for (int i = 0; i < l.count; ++i) addresses |= reinterpret_cast<uintptr_t>(control.gradients[i]);
  return addresses % bytes == 0;
}

template <class P> Buffers<P> buffers(const Flat& f) {
  using C = typename Work<P>::type;
  return {static_cast<C*>(f.phi), static_cast<P*>(f.theta), static_cast<P*>(f.momentum), static_cast<float*>(f.master),
          f.stride};
}

template <class P, int POINTERS, int GROUPS>
void fill(Params<P, POINTERS, GROUPS>& p, const Launch& l, const Control& control, const Counting& counting) {
  using C = typename Work<P>::type;
  const Shape shape = shape_of(l.shared.rows);
  p.shared = buffers<P>(l.shared), p.heads = buffers<P>(l.heads);
  p.tiles = l.tiles, p.table = static_cast<const P* const*>(l.table), p.counting = counting;
  p.started = l.started, p.nonfinite = control.nonfinite;
  p.tasks = l.shared.rows, p.num_tasks = control.num_tasks, p.share = shape.share, p.count = l.count,
  p.shared_count = l.shared_count;
  p.reset_momentum = control.reset_momentum, p.wide = are_aligned(l, control, 16 / sizeof(C) * sizeof(P));
  p.streams = l.streams, p.dampened = std::any_of(control.groups, control.groups + l.num_groups,
                                                  [](const SgdGroup& g) { return g.dampening != 0; });
  for (int i = 0; i < l.num_groups; ++i) {
    p.rules[i] = make_rule<C>(control.groups[i], control, true);
    p.rates[i] = l.rates[i];
  }
  if (l.table == nullptr) memcpy(p.gradients, control.gradients, l.count * sizeof(void*));
}

// One block a tile.
template <class P> void queue(void (*kernel)(P), P& parameters, const Launch& l) {
  static_assert(sizeof(P) <= MAX_PARAMETER_BYTES, "a kernel takes no more");
  const Shape shape = shape_of(l.shared.rows);
  void* arguments[] = {&parameters};
  check(cudaLaunchKernel(kernel, dim3(l.num_tiles), dim3(shape.lanes, shape.slices), arguments,
                         shape.slices > 1 ? shape.lanes * shape.slices * 16 : 0, static_cast<cudaStream_t>(l.stream)),
        "launch of the step");
}

template <bool LEAN, int N, Slices S, class P, int POINTERS, int GROUPS>
void launch_kernel(const Launch& l, const Control& control, const Counting& counting) {
  Params<P, POINTERS, GROUPS> p;
  fill(p, l, control, counting);
  queue(shifting_step<LEAN, N, S, P, POINTERS, GROUPS>, p, l);
}

// Whether all groups have the rule that lean kernels are made for, of N tasks or slices.
template <class P, int N, Slices S> bool is_usual(const Launch& l, const Control& control, const Counting& counting) {
  if (control.nonfinite != nullptr && !LEAN_FLAGS<P, true>) return false;
  if (S == Slices::NONE && l.shared.rows != N) return false;
  if (control.inverse_scale != 1 || counting.grad_scale != nullptr) return false;
  if (std::find(control.gradients, control.gradients + l.count, nullptr) != control.gradients + l.count) return false;
  return std::all_of(control.groups, control.groups + l.num_groups, [&](const SgdGroup& g) {
    return g.momentum != 0 && !g.nesterov && !g.maximize && g.dampening == 0;
  });
}

template <class P, int N, Slices S = Slices::NONE>
void launch_sized(const Launch& l, const Control& control, const Counting& counting) {
  constexpr Slices GENERAL = S == Slices::NONE ? S : Slices::ANY;
  const bool usual = is_usual<P, N, S>(l, control, counting);
  if constexpr (sizeof(P) == 4) {  // small nets count microseconds; the other types do without these kernels
    if (usual && l.num_groups <= SMALL_GROUPS && (l.table != nullptr || l.count <= SMALL_POINTERS))
      return launch_kernel<true, N, S, P, SMALL_POINTERS, SMALL_GROUPS>(l, control, counting);
  }
  if (usual) launch_kernel<true, N, S, P, MAX_POINTERS, MAX_GROUPS>(l, control, counting);
  else launch_kernel<false, N, GENERAL, P, MAX_POINTERS, MAX_GROUPS>(l, control, counting);
}

}  // namespace

namespace float32 {
using Parameter = float;
}
namespace float64 {
using Parameter = double;
}
namespace bfloat16 {
using Parameter = __nv_bfloat16;
}
namespace float16 {
using Parameter = __half;
}

void CTS_DTYPE::launch(const Launch& l, const Control& control, const Counting& counting) {
  using P = Parameter;
  check(cudaSetDevice(l.device), "choice of the device");
  const int tasks = l.shared.rows;
  if (tasks <= 1) launch_sized<P, 1>(l, control, counting);
  else if (tasks <= 2) launch_sized<P, 2>(l, control, counting);
  else if (tasks <= 4) launch_sized<P, 4>(l, control, counting);
  else if (tasks <= 8) launch_sized<P, 8>(l, control, counting);
  else if (tasks % HELD == 0 && tasks <= HELD * MAX_SLICES) launch_sized<P, HELD, Slices::FULL>(l, control, counting);
  else launch_sized<P, HELD, Slices::ANY>(l, control, counting);
}

void CTS_DTYPE::launch_partial(const Launch& l, const Control& control, void* total) {
  using P = Parameter;
  check(cudaSetDevice(l.device), "choice of the device");
  Partial<P, MAX_POINTERS, MAX_GROUPS> p;
  fill(p.step, l, control, Counting{});
  p.total = static_cast<Work<P>::type*>(total);
  queue(partial_step<P, MAX_POINTERS, MAX_GROUPS>, p, l);
}

void CTS_DTYPE::launch_finish(const Launch& l, const Control& control, const void* total) {
  using P = Parameter;
  using C = Work<P>::type;
  check(cudaSetDevice(l.device), "choice of the device");
  Finish<P, MAX_GROUPS> p;
  p.shared = buffers<P>(l.shared), p.tiles = l.tiles, p.total = static_cast<const C*>(total);
  p.tasks = l.shared.rows, p.share = shape_of(l.shared.rows).share, p.streams = l.streams;
  for (int i = 0; i < l.num_groups; ++i) p.rules[i] = make_rule<C>(control.groups[i], control, true);
  queue(finish_step<P, MAX_GROUPS>, p, l);
}

}  // namespace cts
