// The step's kernel: applies the rule of step.h to all rows of a tile, vector by vector.
//
// Compiled once for each instruction set (-DCTS_ISA=avx512 | avx2 | plain); csrc/cpu/stepper.cpp takes one at run time.
#include "step.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/prefetch.h"
#include "cpu/vec.h"

namespace cts {
inline namespace CTS_ISA {
namespace {

// One row at some column: S in memory, C in the master of a narrower S.
template <class S, class C> struct Row {
  S *theta, *momentum;
  C* master;

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

// Row t of a flat buffer from some column on.
template <class S, class C> CTS_HD Row<S, C> row_at(const Flat& flat, int64_t column, int64_t t) {
  const int64_t at = column + t * flat.stride;
  return {static_cast<S*>(flat.theta) + at, static_cast<S*>(flat.momentum) + at,
          sizeof(S) != sizeof(C) ? static_cast<C*>(flat.master) + at : nullptr};
}

// What a kernel may take for granted about a tile. The usual kinds: every row has a gradient and momentum, nothing else
// is asked for but perhaps weight decay, and what follows the inner step is nothing, the meta-update, or the
// meta-update and a reset. The compiler then drops the other cases, and the kernel keeps up with memory.
enum class Kind { any, inner, meta, reset };

template <class C> Kind kind_of(const Rule<C>& rule, const Control& control, const Segment& segment, int32_t rows) {
  if (!rule.has_momentum || rule.nesterov || rule.scaled || rule.maximize) return Kind::any;
  if (rule.reset && !rule.meta_update) return Kind::any;
  for (int32_t i = segment.first; i < segment.first + rows; ++i)
    if (!control.gradients[i] || (control.started && !control.started[i] && rule.gain != C(1))) return Kind::any;
  return rule.reset ? Kind::reset : rule.meta_update ? Kind::meta : Kind::inner;
}

// The rule with its numbers as vectors and, in the usual kinds, its flags as constants.
template <Kind kind, class C> CTS_HD Rule<Vec<C>> broadcast(const Rule<C>& r) {
  constexpr bool any = kind == Kind::any;
  const auto v = [](C value) { return Vec<C>(value); };
  return {v(r.descent),
          v(r.momentum),
          v(r.gain),
          v(r.weight_decay),
          v(r.rate),
          v(r.shift),
          v(r.scale),
          any ? r.has_momentum : true,
          r.has_weight_decay,
          any && r.nesterov,
          any && r.scaled,
          any && r.maximize,
          any ? r.meta_update : kind != Kind::inner,
          any ? r.reset : kind == Kind::reset,
          (any || kind == Kind::reset) && r.reset_momentum};
}

// The rows of a tile that a kernel steps together. g[i] is null where row i has no gradient.
template <int G, class S, class C> struct Rows {
  Row<S, C> row[G];
  const S* g[G];
  bool started[G];
};

// One vector of columns of G rows: their inner steps and the sum over them. `all`: they are all rows there are, so that
// the meta-update, the shift and the reset follow in registers. left: columns from here to the end of the segment; what
// lies behind is padding. Returns the squares of what phi moves by here.
template <int G, bool all, Kind kind, bool whole, class S, class C>
CTS_HD Vec<C> step_vector(const Rows<G, S, C>& rows, C* phi, C* sums, int64_t column, int64_t left,
                          const Rule<Vec<C>>& rule) {
  using V = Vec<C>;
  V theta[G], center{}, moved{};
  if (rule.meta_update || rule.reset) center = load(phi + column);
  CTS_UNROLL
  for (int i = 0; i < G; ++i) {
    const Row<S, C>& row = rows.row[i];
    theta[i] = row.load_theta(column);
    if (kind != Kind::any || rows.g[i]) {
      V g = unscaled(whole ? load(rows.g[i] + column) : load_first<C>(rows.g[i] + column, left), rule), v{};
      if (rule.has_momentum) v = load(row.momentum + column);
      inner_update(theta[i], v, g, kind != Kind::any || rows.started[i], rule);
      if (rule.has_momentum && !rule.reset_momentum) store(row.momentum + column, v);
    }
    if (rule.reset_momentum) store(row.momentum + column, V(C(0)));
  }
  if constexpr (all) {
    const V before = center;
    meta_step(theta, center, rule);
    if (rule.meta_update) store(phi + column, center), moved = center - before;
  } else if (rule.meta_update) {
    V sum = load(sums + column);
    CTS_UNROLL
    for (int i = 0; i < G; ++i) sum = sum + (theta[i] - center);
    store(sums + column, sum);
  }
  CTS_UNROLL
  for (int i = 0; i < G; ++i) {
    if (all || !(rule.meta_update || rule.reset)) rows.row[i].store_theta(column, theta[i]);
    else if (!rule.reset) rows.row[i].store_work(column, theta[i]);
  }
  return moved * moved;
}

// The same for all columns of a tile, and the sum of the squares; sums and phi belong to its first. The rule is made in
// here, behind the call that is not inlined, so that the compiler sees the kind's constants.
template <int G, bool all, Kind kind, class S, class C>
__attribute__((noinline)) double step_rows(const Flat& flat, const Columns& tile, int32_t first_row,
                                           const Control& control, const Rule<C>& general, C* phi, C* sums,
                                           Prefetcher<S, C>& prefetcher) {
  constexpr int64_t N = Vec<C>::size, line = kLine / int64_t(sizeof(S));
  const Rule<Vec<C>> rule = broadcast<kind>(general);
  const Segment& segment = flat.segments[tile.segment];
  Rows<G, S, C> rows;
  for (int i = 0; i < G; ++i) {
    const int32_t entry = segment.first + first_row + i;
    const S* g = static_cast<const S*>(control.gradients[entry]);
    rows.row[i] = row_at<S, C>(flat, segment.offset + tile.begin, first_row + i);
    rows.g[i] = g ? g + tile.begin : nullptr;
    rows.started[i] = !control.started || control.started[entry];
  }
  int64_t streams = 0;
  for (int i = 0; i < G; ++i) streams += prefetcher.streams(rows.g[i], rule.has_momentum);
  const int64_t n = tile.end - tile.begin;
  int64_t column = 0;
  Vec<C> squares{};
  for (; column + line <= n; column += line) {
    prefetcher.allow(streams);
    for (int64_t i = column; i < column + line; i += N)
      squares = squares + step_vector<G, all, kind, true>(rows, phi, sums, i, N, rule);
  }
  if (column < n) prefetcher.allow(streams);
  for (; column + N <= n; column += N)
    squares = squares + step_vector<G, all, kind, true>(rows, phi, sums, column, N, rule);
  if (column < n) squares = squares + step_vector<G, all, kind, false>(rows, phi, sums, column, n - column, rule);
  return all ? sum_of(squares) : 0;
}

// A tile whose rows fit into registers.
template <Kind kind, int G = 1, class S, class C>
double step_together(const Flat& flat, const Columns& tile, const Control& control, const Rule<C>& rule, C* phi,
                     Prefetcher<S, C>& prefetcher) {
  if constexpr (G < kTogether)
    if (flat.rows > G) return step_together < kind, G<8 ? G + 1 : 2 * G>(flat, tile, control, rule, phi, prefetcher);
  return step_rows<G, true, kind>(flat, tile, 0, control, rule, phi, static_cast<C*>(nullptr), prefetcher);
}

template <class S, class C> bool fits_registers(int32_t rows) {
  return !Prefetcher<S, C>::has_master && (rows <= std::min(kTogether, 8) || rows == kTogether);
}

// The second visit to G rows of a tile: theta' + shift delta with the deltas given, or, at a reset, the values
// themselves.
template <int G, class S, class C>
CTS_HD void shift_rows(const Flat& flat, const Columns& tile, int32_t first_row, const C* deltas,
                       const Rule<Vec<C>>& rule) {
  Row<S, C> row[G];
  for (int i = 0; i < G; ++i)
    row[i] = row_at<S, C>(flat, flat.segments[tile.segment].offset + tile.begin, first_row + i);
  for (int64_t column = 0; column < tile.end - tile.begin; column += Vec<C>::size) {
    const Vec<C> delta = load(deltas + column);
    CTS_UNROLL
    for (int i = 0; i < G; ++i) {
      Vec<C> theta = delta;
      if (!rule.reset) theta = row[i].load_work(column), shift(theta, delta, rule);
      row[i].store_theta(column, theta);
    }
  }
}

// phi's part of a step, after which moves hold what the rows need: phi itself at a reset, else delta. moves may be
// sums. Returns the squares of what phi moves by.
template <class C> CTS_HD Vec<C> move_phi(C* phi, const C* sums, C* moves, int64_t n, const Rule<Vec<C>>& rule) {
  Vec<C> squares{};
  for (int64_t i = 0; i < n; i += Vec<C>::size) {
    const Vec<C> before = load(phi + i);
    Vec<C> value = before, delta = value;
    if (rule.meta_update) delta = meta_update(value, load(sums + i), rule), store(phi + i, value);
    store(moves + i, rule.reset ? value : delta);
    squares = squares + (value - before) * (value - before);
  }
  return squares;
}

// The rows' part, the last ones first: they are still near.
template <class S, class C>
CTS_HD void move_rows(const Flat& flat, const Columns& tile, const C* moves, const Rule<Vec<C>>& rule) {
  constexpr int abreast = 4;  // rows that share their visits to the moves; one row alone waits for the second cache
  int32_t t = flat.rows;
  for (; t >= abreast; t -= abreast) shift_rows<abreast, S>(flat, tile, t - abreast, moves, rule);
  while (t-- > 0) shift_rows<1, S>(flat, tile, t, moves, rule);
}

// A tile of any number of rows: some or one at a time, with the sum over them in the first cache; then the meta-update,
// the shift and the reset, with theta' in the second cache still, unless rows are very many.
template <Kind kind, class S, class C>
double step_in_turn(const Flat& flat, const Columns& tile, const Control& control, const Rule<C>& general, C* phi,
                    Prefetcher<S, C>& prefetcher) {
  using V = Vec<C>;
  const Rule<V> rule = broadcast<kind>(general);
  constexpr int64_t N = V::size;
  alignas(64) C sums[kTileElements + N];
  const int64_t n = tile.end - tile.begin;
  if (rule.meta_update) memset(sums, 0, size_t(n + N) * sizeof(C));
  int32_t t = 0;
  constexpr int side = kInTurn ? 2 : 8;  // rows that share their visits to sums and phi
  if constexpr (kind != Kind::any && !Prefetcher<S, C>::has_master && !(kInTurn && kind == Kind::inner))
    for (; t + side <= flat.rows; t += side)
      step_rows<side, false, kind>(flat, tile, t, control, general, phi, sums, prefetcher);
  for (; t < flat.rows; ++t) step_rows<1, false, kind>(flat, tile, t, control, general, phi, sums, prefetcher);
  if (!rule.meta_update && !rule.reset) return 0;

  const V squares = move_phi(phi, sums, sums, n, rule);
  move_rows<S>(flat, tile, sums, rule);
  return sum_of(squares);
}

// The first half of a step in two: the inner step of a tile, and sums <- the sum over the rows of theta - phi. The rule
// has no reset.
template <Kind kind, class S, class C>
void first_half(const Flat& flat, const Columns& tile, const Control& control, const Rule<C>& rule, C* phi, C* sums,
                Prefetcher<S, C>& prefetcher) {
  constexpr bool has_master = Prefetcher<S, C>::has_master;
  constexpr int64_t N = Vec<C>::size;
  const int64_t n = tile.end - tile.begin;
  prefetcher.allow(prefetcher.lines(tile));
  memset(sums, 0, size_t((n + N - 1) / N * N) * sizeof(C));
  int32_t t = 0;
  const auto take = [&](auto count) {
    for (; t + count <= flat.rows; t += count)
      step_rows<count, false, kind>(flat, tile, t, control, rule, phi, sums, prefetcher);
  };
  if constexpr (kind != Kind::any && !has_master) {
    if constexpr (!kInTurn) take(std::integral_constant<int, 8>()), take(std::integral_constant<int, 4>());
    take(std::integral_constant<int, 2>());
  }
  take(std::integral_constant<int, 1>());
  for (t = 0; has_master && t < flat.rows; ++t) {  // the parameter is the master's rounding, whatever comes next
    const auto row = row_at<S, C>(flat, flat.segments[tile.segment].offset + tile.begin, t);
    for (int64_t i = 0; i < n; i += N) row.store_theta(i, row.load_work(i));
  }
}

template <Kind kind, class S, class C>
double step_tile(const Flat& flat, const Columns& tile, const Control& control, const Rule<C>& rule,
                 Prefetcher<S, C>& prefetcher) {
  C* const phi = flat.phi ? static_cast<C*>(flat.phi) + flat.segments[tile.segment].offset + tile.begin : nullptr;
  if (phi && Prefetcher<S, C>::visits_phi(control)) prefetcher.allow(prefetcher.lines(tile));
  if constexpr (kind != Kind::any && !Prefetcher<S, C>::has_master)
    if (fits_registers<S, C>(flat.rows)) return step_together<kind>(flat, tile, control, rule, phi, prefetcher);
  return step_in_turn<kind>(flat, tile, control, rule, phi, prefetcher);
}

// Whether G gradients hold a NaN or an infinity within n columns, the i-th in found[i].
template <int G, bool scaled, class S, class C>
bool look_at(const S* const* g, int64_t n, C inverse_scale, bool* found) {
  constexpr int64_t N = Vec<C>::size, line = kLine / int64_t(sizeof(S)), ahead = 4 * line;
  Vec<C> sums[G]{};  // 0 as long as all are finite, then NaN
  const Vec<C> scale(inverse_scale);
  const auto add = [&](int i, Vec<C> value) {
    if (scaled) value = value * scale;
    sums[i] = sums[i] + (value - value);
  };
  int64_t column = 0;
  for (; column + line <= n; column += line) {
    CTS_UNROLL
    for (int i = 0; i < G; ++i) __builtin_prefetch(g[i] + column + ahead);
    for (int64_t at = column; at < column + line; at += N) {
      CTS_UNROLL
      for (int i = 0; i < G; ++i) add(i, load(g[i] + at));
    }
  }
  for (; column < n; column += N)
    for (int i = 0; i < G; ++i) add(i, load_first<C>(g[i] + column, std::min(N, n - column)));
  bool any = false;
  for (int i = 0; i < G; ++i) any |= found[i] = !all_finite(sums[i]);
  return any;
}

// Whether a gradient holds a NaN or an infinity in a tile; control.nonfinite, if there is one, is set for it.
template <class S, class C> bool nonfinite(const Flat& flat, const Columns& tile, const Control& control) {
  constexpr int abreast = 8;  // so many streams read at once use the memory's bandwidth
  const int32_t first = flat.segments[tile.segment].first;
  const int64_t n = tile.end - tile.begin;
  const C scale = C(control.inverse_scale);
  const auto look = scale == C(1) ? look_at<abreast, false, S, C> : look_at<abreast, true, S, C>;
  const auto look_at_one = scale == C(1) ? look_at<1, false, S, C> : look_at<1, true, S, C>;
  const S* g[abreast];
  int32_t entries[abreast];
  bool found[abreast], any = false;
  for (int32_t t = 0, count = 0; t < flat.rows; ++t) {
    const S* const row = static_cast<const S*>(control.gradients[first + t]);
    if (row) g[count] = row + tile.begin, entries[count++] = first + t;
    if (count < abreast && t + 1 < flat.rows) continue;
    if (count == abreast) any |= look(g, n, scale, found);
    else
      for (int32_t i = 0; i < count; ++i) any |= look_at_one(g + i, n, scale, found + i);
    for (int32_t i = 0; i < count && control.nonfinite; ++i)
      if (found[i]) __atomic_store_n(control.nonfinite + entries[i], 1, __ATOMIC_RELAXED);
    count = 0;
  }
  return any;
}

template <class S, class C>
void step_tiles(const Flat* flats, const Columns* tiles, Queue& queue, const Control& control,
                const MethodOps& method_ops, const PathSum* path, double* moved) {
  Prefetcher<S, C> prefetcher(flats, tiles, queue, control);
  while (const Columns* tile = prefetcher.follow()) {
    const Flat& flat = flats[tile->flat];
    const Segment& segment = flat.segments[tile->segment];
    const Rule<C> rule = make_rule<C>(control.groups[segment.group], control, flat.phi != nullptr);
    if (path && flat.phi) method_ops.extend_path(flat, *tile, control.gradients, *path);
    const Kind kind = kind_of(rule, control, segment, flat.rows);
    double squares = 0;
    switch (kind) {
      case Kind::inner:
        squares = step_tile<Kind::inner>(flat, *tile, control, rule, prefetcher);
        break;
      case Kind::meta:
        squares = step_tile<Kind::meta>(flat, *tile, control, rule, prefetcher);
        break;
      case Kind::reset:
        squares = step_tile<Kind::reset>(flat, *tile, control, rule, prefetcher);
        break;
      case Kind::any:
        squares = step_tile<Kind::any>(flat, *tile, control, rule, prefetcher);
        break;
    }
    // in these kinds a gradient that is not finite reaches phi, and a tile has squares already
    const bool reaches_phi = kind == Kind::meta || kind == Kind::reset;
    if (control.nonfinite && !(reaches_phi && std::isfinite(squares))) nonfinite<S, C>(flat, *tile, control);
    if (moved) moved[tile - tiles] = squares;
  }
}

template <class S, class C>
void partial_tiles(const Flat* flats, const Columns* tiles, Queue& queue, const Control& control, void* total) {
  Prefetcher<S, C> prefetcher(flats, tiles, queue, control);
  while (const Columns* tile = prefetcher.follow()) {
    const Flat& flat = flats[tile->flat];
    const Segment& segment = flat.segments[tile->segment];
    Rule<C> rule = make_rule<C>(control.groups[segment.group], control, flat.phi != nullptr);
    if (!flat.phi) {
      if (kind_of(rule, control, segment, flat.rows) == Kind::inner)
        step_tile<Kind::inner>(flat, *tile, control, rule, prefetcher);
      else step_tile<Kind::any>(flat, *tile, control, rule, prefetcher);
      if (control.nonfinite) nonfinite<S, C>(flat, *tile, control);
      continue;
    }
    C *const phi = static_cast<C*>(flat.phi) + segment.offset + tile->begin, *const sums = static_cast<C*>(total) +
                                                                                           segment.offset + tile->begin;
    rule.meta_update = true, rule.reset = false;  // the sum is asked for whatever it is multiplied with
    if (!rule.reset_momentum && kind_of(rule, control, segment, flat.rows) == Kind::meta)
      first_half<Kind::meta>(flat, *tile, control, rule, phi, sums, prefetcher);
    else first_half<Kind::any>(flat, *tile, control, rule, phi, sums, prefetcher);
    if (control.nonfinite) nonfinite<S, C>(flat, *tile, control);
  }
}

template <class S, class C>
void finish(const Flat& flat, const Columns& span, const Control& control, const void* total) {
  const Segment& segment = flat.segments[span.segment];
  const Rule<Vec<C>> rule = broadcast<Kind::any>(make_rule<C>(control.groups[segment.group], control, true));
  if (!rule.meta_update && !rule.reset) return;
  alignas(64) C moves[kSpanElements + Vec<C>::size];
  const int64_t first = segment.offset + span.begin;
  move_phi(static_cast<C*>(flat.phi) + first, static_cast<const C*>(total) + first, moves, span.end - span.begin, rule);
  move_rows<S>(flat, span, moves, rule);
}

template <class S, class C> constexpr Kernel kernel_of() {
  return {step_tiles<S, C>, partial_tiles<S, C>, finish<S, C>, fits_registers<S, C>, nonfinite<S, C>};
}

}  // namespace

Kernel kernel(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return kernel_of<double, double>();
    case DType::bfloat16:
      return kernel_of<BFloat16, float>();
    case DType::float16:
      return kernel_of<Half, float>();
    default:
      return kernel_of<float, float>();
  }
}

}  // namespace CTS_ISA
}  // namespace cts
