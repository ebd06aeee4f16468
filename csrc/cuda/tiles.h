// What a thread does with its columns of a tile: inner steps of several tasks, meta-update, shift and reset.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/memory.h"

namespace cts {
namespace {

// How a block takes its tasks: each thread all of them, or in slices, of N tasks each or of any number.
enum class Slices { NONE, FULL, ANY };

// Tasks of a thread whose numbers are in flight at a time. More of them cost registers, and so blocks on a
// multiprocessor: on an H100, 1 and 2 with 6 and 5 blocks took equally long, 4 with 4 blocks longer, though less so
// than 2 with 4 blocks. Slices have 4 blocks in any case.
template <class P, Slices S>
constexpr int LOADED = S == Slices::FULL                    ? (sizeof(P) == 4 ? 4 : 2)
                       : S == Slices::ANY && sizeof(P) == 8 ? 1
                                                            : 2;

template <class P> struct Buffers {
  typename Work<P>::type* phi;  // null: heads
  P *theta, *momentum;
  float* master;
  int64_t stride;
};

// What a launch is given. `table` is the device's copy of the gradients' addresses, or null: `gradients` holds them.
// wide: all gradients are aligned. dampened: some group's first gradients differ, so steps read the flags. A slice of a
// block takes `share` of the tasks. num_tasks: T of the mean.
template <class P, int POINTERS, int GROUPS> struct Params {
  Buffers<P> shared, heads;
  const Tile* tiles;
  const P* const* table;
  uint8_t *started, *nonfinite;
  Counting counting;
  int32_t tasks, num_tasks, share, count, shared_count;
  bool reset_momentum, wide, streams, dampened;
  Rule<typename Work<P>::type> rules[GROUPS];
  DeviceRates rates[GROUPS];
  const P* gradients[POINTERS];

  __device__ __forceinline__ const P* gradient(int i) const { return table != nullptr ? table[i] : gradients[i]; }
};

__device__ __forceinline__ double value_of(const DeviceRate& rate) {
  return rate.is_double ? *static_cast<const double*>(rate.address) : *static_cast<const float*>(rate.address);
}

// The inner step of the first `tasks` of N tasks at W columns: theta [N][W] holds the result, momentum is stored.
// gradients: where theirs lie; a call that looks fills in the first AHEAD of them. first: the first one's in the table;
// place: of the tile in its row; at: of the tile in its gradient; column: of the thread in the tile, apart from what
// the whole block shares, so that one register holds it for all addresses. LEAN: the usual rule, no gradient is
// missing.
template <bool LEAN, int N, int AHEAD, int W, class P, class C, class Launch>
__device__ __forceinline__ void inner_updates(C (*theta)[W], const P** gradients, bool looks, const Launch& p,
                                              const Buffers<P>& b, const Rule<C>& rule, int first, int tasks,
                                              int64_t place, int64_t at, unsigned column) {
  P x[N][W], v[N][W], g[N][W];
  CTS_UNROLL
  for (int t = 0; t < N; ++t) {
    if (t >= tasks) continue;
    const int64_t here = place + t * b.stride;
    load(x[t], b.theta + here + column);
    if (sizeof(P) < sizeof(C)) load(theta[t], reinterpret_cast<const C*>(b.master) + here + column);
    if (rule.has_momentum) load(v[t], b.momentum + here + column);
  }
  CTS_UNROLL
  for (int t = 0; t < (N > AHEAD ? N : AHEAD); ++t) {
    if (t >= tasks) continue;
    if (looks && t < AHEAD) gradients[t] = p.gradient(first + t);
    if (t < N && (LEAN || gradients[t] != nullptr)) load_once(g[t], gradients[t] + at + column);
  }
  CTS_UNROLL
  for (int t = 0; t < N; ++t) {
    if (t >= tasks) continue;
    C momentum[W];
    bool bad = false;
    const bool present = LEAN || gradients[t] != nullptr;
    const bool started = LEAN || p.started == nullptr || rule.gain == 1 || p.started[first + t] != 0;
    CTS_UNROLL
    for (int i = 0; i < W; ++i) {
      // low precision: the parameter counts where it is not its rounded master: the user wrote it
      if (sizeof(P) == sizeof(C) || widen<C>(Narrow<P>::of(theta[t][i])) != widen<C>(x[t][i]))
        theta[t][i] = widen<C>(x[t][i]);
      momentum[i] = 0;
      if (!present) continue;
      C gradient = unscaled(widen<C>(g[t][i]), rule);
      if (!LEAN && p.nonfinite != nullptr) bad = bad || !(gradient - gradient == 0);
      if (rule.has_momentum) momentum[i] = widen<C>(v[t][i]);
      inner_update(theta[t][i], momentum[i], gradient, started, rule);
    }
    if (!LEAN && bad) p.nonfinite[first + t] = 1;
    if (rule.reset_momentum) {
      CTS_UNROLL
      for (int i = 0; i < W; ++i) momentum[i] = 0;
    }
    if (rule.reset_momentum || (present && rule.has_momentum))
      narrow_and_store(b.momentum + place + t * b.stride + column, momentum, p.streams);
  }
}

template <int W, class P, class C>
__device__ __forceinline__ void store_theta(const Buffers<P>& b, int64_t place, unsigned column, const C (&theta)[W],
                                            bool streams) {
  narrow_and_store(b.theta + place + column, theta, streams);
  if (sizeof(P) < sizeof(C)) store(reinterpret_cast<C*>(b.master) + place + column, theta, streams);
}

template <int W, class P, class C>
__device__ __forceinline__ void load_theta(C (&theta)[W], const Buffers<P>& b, int64_t place, unsigned column) {
  load(theta, reinterpret_cast<const C*>(sizeof(P) < sizeof(C) ? static_cast<const void*>(b.master) : b.theta) + place +
                  column);
}

// sum <- the sum over all slices, in their order.
template <int W, class C> __device__ __forceinline__ void add_slices(C (&sum)[W]) {
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

// Whether a lean kernel looks for gradients that are not finite; those of 16-bit types have no register left for that,
// and such a step is a general kernel's.
template <class P, bool LEAN> constexpr bool LEAN_FLAGS = LEAN && sizeof(P) >= 4;

// Whether it is worth a look which gradients hold a NaN or an infinity: one that does makes what follows from it so.
template <int W, class C, class Launch>
__device__ __forceinline__ bool asks_for_flags(const Launch& p, const C (&follows)[W]) {
  if (p.nonfinite == nullptr) return false;
  C all = follows[0];
  CTS_UNROLL
  for (int i = 1; i < W; ++i) all += follows[i];
  return !(all - all == 0);
}

// Sets the flags of the tasks from ... to whose gradients hold a NaN or an infinity within W columns.
template <int W, class Launch>
__device__ void flag_nonfinite(const Launch& p, const Tile& tile, int from, int to, unsigned column) {
#pragma unroll 1
  for (int t = from; t < to; ++t) {
    const auto* gradient = p.gradient(tile.first + t) + tile.at + column;
#pragma unroll 1
    for (int i = 0; i < W; ++i) {
      const auto g = widen<typename Work<std::decay_t<decltype(*gradient)>>::type>(gradient[i]);
      if (!(g - g == 0)) p.nonfinite[tile.first + t] = 1;
    }
  }
}

// One step of W columns of a shared tensor. A thread takes all tasks, or those of its slice; one that is not active
// only takes part in the barriers. EXACT: there are N tasks, or as many in each slice.
template <bool LEAN, int N, Slices S, bool EXACT, int W, class P, class C, class Launch>
__device__ __forceinline__ void step_shared(const Launch& p, const Tile& tile, const Rule<C>& rule, unsigned column,
                                            bool active) {
  const Buffers<P>& b = p.shared;
  bool bad = false;
  constexpr bool SLICED = S != Slices::NONE;
  // of a large table all addresses are asked for at once, so that later gradients need not wait for them
  constexpr int BATCH = N < LOADED<P, S> ? N : LOADED<P, S>, AHEAD = S == Slices::FULL ? N : BATCH;
  const int from = SLICED ? threadIdx.y * p.share : 0, to = EXACT    ? from + N
                                                            : SLICED ? min(from + p.share, p.tasks)
                                                                     : p.tasks;
  int begin = from;
  C theta[N][W], phi[W], sum[W] = {};
  if (active) {
    load(phi, b.phi + tile.column + column);
    for (;; begin += N) {
      const P* gradients[AHEAD];
      CTS_UNROLL
      for (int t = 0; t < N; t += BATCH)
        inner_updates<LEAN, BATCH, AHEAD>(theta + t, gradients + t % AHEAD, t % AHEAD == 0, p, b, rule,
                                          tile.first + begin + t, to - begin - t, (begin + t) * b.stride + tile.column,
                                          tile.at, column);
      CTS_UNROLL
      for (int t = 0; t < N; ++t) {
        if (begin + t >= to) continue;
        CTS_UNROLL
        for (int i = 0; i < W; ++i)
          sum[i] = t == 0 && begin == from ? theta[0][i] - phi[i] : sum[i] + (theta[t][i] - phi[i]);
      }
      if constexpr (S != Slices::ANY) break;
      if (begin + N >= to) break;
      CTS_UNROLL
      for (int t = 0; t < N; ++t) store_theta(b, (begin + t) * b.stride + tile.column, column, theta[t], p.streams);
    }
    if (LEAN_FLAGS<P, LEAN>) bad = asks_for_flags(p, sum);
  }
  C delta[W] = {};
  if (rule.meta_update) {
    if (SLICED && blockDim.y > 1) add_slices(sum);
    CTS_UNROLL
    for (int i = 0; i < W; ++i) delta[i] = meta_update(phi[i], sum[i], rule);
  }
  if (!active) return;
  if (rule.meta_update && (!SLICED || threadIdx.y == 0)) store(b.phi + tile.column + column, phi, p.streams);
  const auto finish = [&](C(&one)[W], int t) {
    CTS_UNROLL
    for (int i = 0; i < W; ++i) {
      if (rule.meta_update) shift(one[i], delta[i], rule);
      if (rule.reset) one[i] = phi[i];
    }
    store_theta(b, t * b.stride + tile.column, column, one, p.streams);
  };
  CTS_UNROLL
  for (int t = 0; t < N; ++t)
    if (begin + t < to) finish(theta[t], begin + t);
  if (S == Slices::ANY) {
    for (int t = from; t < begin; ++t) {
      C one[W];
      load_theta(one, b, t * b.stride + tile.column, column);
      finish(one, t);
    }
  }
  if (bad) flag_nonfinite<W>(p, tile, from, to, column);
}

// The inner step of W columns of a head.
template <bool LEAN, int W, class P, class C, class Launch>
__device__ __forceinline__ void step_head(const Launch& p, const Tile& tile, const Rule<C>& rule, unsigned column) {
  C theta[1][W];
  const P* gradient;
  inner_updates<LEAN, 1, 1>(theta, &gradient, true, p, p.heads, rule, tile.first, 1, tile.column, tile.at, column);
  store_theta(p.heads, tile.column, column, theta[0], p.streams);
  if (LEAN_FLAGS<P, LEAN> && asks_for_flags(p, theta[0])) flag_nonfinite<W>(p, tile, 0, 1, column);
}

// Columns of a tile that go 16 bytes (of phi) at a time, by way of the gradients' alignment; the rest go one by one.
template <class P, class C, class Launch>
__device__ __forceinline__ int packed_columns(const Launch& p, const Tile& tile) {
  constexpr int W = 16 / sizeof(C);
  bool wide = p.wide;
  if (!wide) {
    uintptr_t addresses = 0;
    for (int t = 0; t < (tile.head ? 1 : p.tasks); ++t)
      addresses |= reinterpret_cast<uintptr_t>(p.gradient(tile.first + t));
    wide = addresses % (W * sizeof(P)) == 0;
  }
  return wide ? tile.columns / W * W : 0;
}

// A head's tile, whose columns all threads of the block share.
template <bool LEAN, class P, class C, class Launch>
__device__ __forceinline__ void step_head_tile(const Launch& p, const Tile& tile, const Rule<C>& rule, int packed) {
  constexpr int W = 16 / sizeof(C);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  if (thread * W < packed) step_head<LEAN, W, P>(p, tile, rule, thread * W);
  for (int column = packed + thread; column < tile.columns; column += threads)
    step_head<LEAN, 1, P>(p, tile, rule, column);
}

}  // namespace
}  // namespace cts
