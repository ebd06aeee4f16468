// The step's kernel: walks tiles of columns, vector by vector, and applies the rule of shifting_step.h to all rows at once.
//
// Compiled once for each instruction set (-DCTS_ISA=avx512 | avx2 | plain); csrc/cpu.cpp takes one at run time.
#include "shifting_step.h"

#include "cpu.h"
#include "vec.h"

namespace cts {
inline namespace CTS_ISA {
namespace {

constexpr int64_t kLine = 64;          // bytes of a cache line
constexpr int64_t kAhead = 8 * kLine;  // how far each stream is prefetched
constexpr int kGroup = kVectorBytes < 32 ? 8 : 256 / kVectorBytes;  // vectors whose sum over the tasks is in registers

// A pointer that may lie outside of its array and is never read through.
template <class S>
CTS_HD S* advanced(S* base, int64_t elements) {
  return reinterpret_cast<S*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(elements) * sizeof(S));
}

template <class S>
CTS_HD void prefetch(const S* base, int64_t elements) {
  __builtin_prefetch(advanced(base, elements), 1);
}

// One row at some column: S in memory, C in the master of a narrower S.
template <class S, class C>
struct Row {
  S *theta, *momentum;
  C* master;

  CTS_HD void advance(int64_t stride) {
    theta += stride, momentum += stride;
    if constexpr (sizeof(S) != sizeof(C)) master += stride;
  }

  CTS_HD Vec<C> load_theta(int64_t at) const {
    if constexpr (sizeof(S) == sizeof(C)) return load(theta + at);
    else return load_master(master + at, theta + at);
  }
  CTS_HD Vec<C> load_work(int64_t at) const {
    if constexpr (sizeof(S) == sizeof(C)) return load(theta + at);
    else return load(master + at);
  }
  CTS_HD void store_work(int64_t at, Vec<C> value) const {
    if constexpr (sizeof(S) == sizeof(C)) store(theta + at, value);
    else store(master + at, value);
  }
  CTS_HD void store_theta(int64_t at, Vec<C> value) const {
    store_work(at, value);
    if constexpr (sizeof(S) != sizeof(C)) store(theta + at, value);
  }
};

// What a tile's kernel may take for granted. `yes` and `with_weight_decay`: every row has a gradient, momentum and a meta-update, and
// nothing else is asked for. The compiler then drops the other cases, and the kernel keeps up with memory.
enum class Usual { yes, with_weight_decay, no };

template <class C>
Usual usual(const Rule<C>& rule, const Step& step, const Segment& segment, int32_t rows) {
  if (step.nonfinite || !rule.has_momentum || !rule.meta_update || rule.nesterov || rule.scaled || rule.maximize || rule.reset)
    return Usual::no;
  for (int32_t i = segment.first; i < segment.first + rows; ++i)
    if (!step.gradients[i] || (step.started && !step.started[i] && rule.gain != C(1))) return Usual::no;
  return rule.has_weight_decay ? Usual::with_weight_decay : Usual::yes;
}

// The rule with its numbers as vectors and, in the usual cases, its flags as constants.
template <Usual kind, class C>
CTS_HD Rule<Vec<C>> broadcast(const Rule<C>& r) {
  constexpr bool any = kind == Usual::no;
  const auto v = [](C value) { return Vec<C>(value); };
  return {v(r.descent), v(r.momentum), v(r.gain), v(r.weight_decay), v(r.rate), v(r.shift), v(r.scale),
          !any || r.has_momentum, any ? r.has_weight_decay : kind == Usual::with_weight_decay,
          any && r.nesterov, any && r.scaled, any && r.maximize, !any || r.meta_update, any && r.reset, any && r.reset_momentum};
}

// `vectors` vectors of columns of a segment, all rows: the inner steps with the sum over the tasks in registers, then, while theta' is
// still in the first cache, the meta-update and the shift. whole: no column is padding. ahead: columns to prefetch ahead.
template <int vectors, bool whole, Usual kind, class S, class C>
CTS_HD void step_columns(const Flat& flat, const Segment& segment, const Step& step, const Rule<Vec<C>>& rule, int64_t column,
                         int64_t ahead) {
  using V = Vec<C>;
  constexpr int64_t N = V::size, line = kLine / int64_t(sizeof(S)), lines = vectors * N / line;
  constexpr bool has_master = sizeof(S) != sizeof(C), any = kind == Usual::no;
  const int64_t rows = flat.rows, stride = flat.stride, at = segment.offset + column, left = segment.numel - column;
  const bool uses_phi = rule.meta_update || rule.reset;
  const void* const* gradients = step.gradients + segment.first;
  C* const phi = uses_phi ? static_cast<C*>(flat.phi) + at : nullptr;
  const Row<S, C> first{static_cast<S*>(flat.theta) + at, static_cast<S*>(flat.momentum) + at,
                        has_master ? static_cast<C*>(flat.master) + at : nullptr};
  V sums[vectors];
  CTS_UNROLL
  for (int i = 0; i < vectors; ++i) sums[i] = V(C(0));

  Row<S, C> row = first;
  for (int64_t t = 0; t < rows; ++t, row.advance(stride)) {
    const S* g = static_cast<const S*>(gradients[t]);
    CTS_UNROLL
    for (int i = 0; i < lines; ++i) {
      prefetch(g, column + ahead + i * line), prefetch(row.theta, ahead + i * line), prefetch(row.momentum, ahead + i * line);
      if (has_master) prefetch(row.master, ahead + i * line), prefetch(row.master, ahead + i * line + line / 2);
    }
    if (!any || g) g += column;
    const bool started = !any || !step.started || step.started[segment.first + t];
    CTS_UNROLL
    for (int i = 0; i < vectors; ++i) {
      V theta = row.load_theta(i * N);
      if (!any || g) {
        V d = unscaled(whole ? load(g + i * N) : load_first<C>(g, left), rule), v{};
        if (any && step.nonfinite && !all_finite(d)) __atomic_store_n(step.nonfinite + segment.first + t, 1, __ATOMIC_RELAXED);
        if (rule.has_momentum) v = load(row.momentum + i * N);
        inner_step(theta, v, d, started, rule);
        if (rule.has_momentum) store(row.momentum + i * N, v);
      }
      if (rule.reset_momentum) store(row.momentum + i * N, V(C(0)));
      if (rule.meta_update) sums[i] = sums[i] + (theta - load(phi + i * N));
      if (uses_phi) row.store_work(i * N, theta);
      else row.store_theta(i * N, theta);
    }
  }
  if (!uses_phi) return;

  CTS_UNROLL
  for (int i = 0; i < vectors; ++i) {
    V value = load(phi + i * N);
    if (rule.meta_update) sums[i] = meta_update(value, sums[i], rule), store(phi + i * N, value);  // from here on: delta
    if (rule.reset) sums[i] = value;
  }
  row = first;
  for (int64_t t = 0; t < rows; ++t, row.advance(stride)) {
    CTS_UNROLL
    for (int i = 0; i < vectors; ++i) {
      V theta = sums[i];
      if (!rule.reset) theta = row.load_work(i * N), shift(theta, sums[i], rule);
      row.store_theta(i * N, theta);
    }
  }
}

// As step_columns for the usual cases and a number of tasks known at compile time: theta' of all of them stays in registers. g, rows:
// each task's gradient and buffers at column 0 of the segment. left: columns that are not padding.
template <int T, bool whole, Usual kind, class C>
CTS_HD void step_in_registers(const C* const (&g)[T], const Row<C, C> (&rows)[T], C* phi, const Rule<Vec<C>>& rule, int64_t column, int64_t left) {
  Vec<C> theta[T], value = load(phi + column);
  CTS_UNROLL
  for (int t = 0; t < T; ++t) {
    theta[t] = rows[t].load_theta(column);
    Vec<C> d = whole ? load(g[t] + column) : load_first<C>(g[t] + column, left), v = load(rows[t].momentum + column);
    inner_step(theta[t], v, d, true, rule);
    store(rows[t].momentum + column, v);
  }
  meta_step(theta, value, rule);
  store(phi + column, value);
  CTS_UNROLL
  for (int t = 0; t < T; ++t) rows[t].store_theta(column, theta[t]);
}

// One tile with T tasks in registers; `next` is the tile behind it or null, and its gradients are prefetched at the end of this one.
template <int T, Usual kind, class C>
__attribute__((noinline)) void tile_in_registers(const Flat& flat, const Tile& tile, const Tile* next, const Step& step, const Rule<C>& general) {
  constexpr int64_t N = Vec<C>::size, line = kLine / int64_t(sizeof(C)), ahead = kAhead / int64_t(sizeof(C));
  const Rule<Vec<C>> rule = broadcast<kind>(general);
  const Segment& segment = flat.segments[tile.segment];
  const int64_t whole_end = tile.end - (tile.end == segment.numel ? tile.end % N : 0);
  C* const phi = static_cast<C*>(flat.phi) + segment.offset;
  const C* g[T];
  const C* coming[T];
  Row<C, C> rows[T];
  for (int t = 0; t < T; ++t) {
    const int64_t at = segment.offset + t * flat.stride;
    g[t] = static_cast<const C*>(step.gradients[segment.first + t]);
    coming[t] = advanced(g[t], ahead);
    rows[t] = {static_cast<C*>(flat.theta) + at, static_cast<C*>(flat.momentum) + at, nullptr};
  }
  for (int64_t block = tile.begin; block < whole_end; block += line) {
    if (next && block + ahead >= tile.end) {
      const int32_t first = flat.segments[next->segment].first;
      for (int t = 0; t < T; ++t) coming[t] = advanced(static_cast<const C*>(step.gradients[first + t]), next->begin + ahead - tile.end);
      next = nullptr;
    }
    CTS_UNROLL
    for (int t = 0; t < T; ++t) prefetch(coming[t], block), prefetch(rows[t].theta, block + ahead), prefetch(rows[t].momentum, block + ahead);
    prefetch(phi, block + ahead);
    const int64_t end = block + line < whole_end ? block + line : whole_end;
    for (int64_t column = block; column < end; column += N) step_in_registers<T, true, kind>(g, rows, phi, rule, column, N);
  }
  if (whole_end < tile.end) step_in_registers<T, false, kind>(g, rows, phi, rule, whole_end, segment.numel - whole_end);
}

// One tile of any kind and any number of tasks.
template <Usual kind, class S, class C>
__attribute__((noinline)) void tile_in_columns(const Flat& flat, const Tile& tile, const Step& step, const Rule<C>& general) {
  constexpr int64_t N = Vec<C>::size, ahead = kAhead / int64_t(sizeof(S));
  const Rule<Vec<C>> rule = broadcast<kind>(general);
  const Segment& segment = flat.segments[tile.segment];
  const int64_t whole_end = tile.end - (tile.end == segment.numel ? tile.end % N : 0);
  int64_t column = tile.begin;
  for (; column + kGroup * N <= whole_end; column += kGroup * N)
    step_columns<kGroup, true, kind, S, C>(flat, segment, step, rule, column, ahead);
  for (; column < whole_end; column += N) step_columns<1, true, kind, S, C>(flat, segment, step, rule, column, ahead);
  if (column < tile.end) step_columns<1, false, kind, S, C>(flat, segment, step, rule, column, ahead);
}

template <Usual kind, class S, class C>
void step_tile(const Flat& flat, const Tile& tile, const Tile* next, const Step& step, const Rule<C>& rule) {
  if constexpr (sizeof(S) == sizeof(C) && kind != Usual::no) {
    switch (flat.rows) {
      case 2: return tile_in_registers<2, kind>(flat, tile, next, step, rule);
      case 3: return tile_in_registers<3, kind>(flat, tile, next, step, rule);
      case 4: return tile_in_registers<4, kind>(flat, tile, next, step, rule);
      case 5: return tile_in_registers<5, kind>(flat, tile, next, step, rule);
      case 6: return tile_in_registers<6, kind>(flat, tile, next, step, rule);
      case 7: return tile_in_registers<7, kind>(flat, tile, next, step, rule);
      case 8: return tile_in_registers<8, kind>(flat, tile, next, step, rule);
    }
  }
  tile_in_columns<kind, S, C>(flat, tile, step, rule);
}

template <class S, class C>
void step_tiles(const Flat* flats, const Tile* tiles, int64_t first, int64_t last, int64_t num_tiles, const Step& step) {
  for (int64_t i = first; i < last; ++i) {
    const Tile& tile = tiles[i];
    const Flat& flat = flats[tile.flat];
    const Segment& segment = flat.segments[tile.segment];
    const Rule<C> rule = make_rule<C>(step.groups[segment.group], step, flat.rows, flat.phi != nullptr);
    const Tile* next = i + 1 < num_tiles && tiles[i + 1].flat == tile.flat ? &tiles[i + 1] : nullptr;
    switch (usual(rule, step, segment, flat.rows)) {
      case Usual::yes: step_tile<Usual::yes, S>(flat, tile, next, step, rule); break;
      case Usual::with_weight_decay: step_tile<Usual::with_weight_decay, S>(flat, tile, next, step, rule); break;
      case Usual::no: step_tile<Usual::no, S>(flat, tile, next, step, rule); break;
    }
  }
}

}  // namespace

Kernel kernel(DType dtype) {
  switch (dtype) {
    case DType::float64: return step_tiles<double, double>;
    case DType::bfloat16: return step_tiles<BFloat16, float>;
    case DType::float16: return step_tiles<Half, float>;
    default: return step_tiles<float, float>;
  }
}

}  // namespace CTS_ISA
}  // namespace cts
