// The step's kernel: walks tiles of columns, vector by vector, and applies the rule of shifting_step.h to all rows at once.
//
// Compiled once for each instruction set (-DCTS_ISA=avx512 | avx2 | plain); csrc/cpu.cpp takes one at run time.
#include "shifting_step.h"

#include <type_traits>

#include "cpu.h"
#include "vec.h"

namespace cts {
inline namespace CTS_ISA {
namespace {

constexpr int64_t kLine = 64;          // bytes of a cache line
constexpr int64_t kAhead = 8 * kLine;  // how far ahead a kernel in registers prefetches each of its streams
constexpr int64_t kBlock = 8192;       // bytes of phi in a block: two pages of each row in turn, which DRAM and TLB like
constexpr int64_t kLong = 1 << 16;     // columns from which more than four rows are better visited in turn than together

// A pointer that may lie outside of its array and is never read through.
template <class S>
CTS_HD S* advanced(S* base, int64_t elements) {
  return reinterpret_cast<S*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(elements) * sizeof(S));
}

template <class S>
CTS_HD void prefetch(const S* base, int64_t elements) {
  __builtin_prefetch(advanced(base, elements), 1);
}

// The same, into the second cache.
template <class S>
CTS_HD void prefetch_far(const S* base, int64_t elements) {
  __builtin_prefetch(advanced(base, elements), 1, 2);
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

// What a kernel may take for granted about a tile. The usual kinds: every row has a gradient, momentum and a meta-update, and nothing
// else is asked for but perhaps weight decay. The compiler then drops the other cases, and the kernel keeps up with memory.
enum class Kind { any, usual, usual_with_weight_decay };

template <class C>
Kind kind_of(const Rule<C>& rule, const Step& step, const Segment& segment, int32_t rows) {
  if (step.nonfinite || !rule.has_momentum || !rule.meta_update || rule.nesterov || rule.scaled || rule.maximize || rule.reset)
    return Kind::any;
  for (int32_t i = segment.first; i < segment.first + rows; ++i)
    if (!step.gradients[i] || (step.started && !step.started[i] && rule.gain != C(1))) return Kind::any;
  return rule.has_weight_decay ? Kind::usual_with_weight_decay : Kind::usual;
}

// The rule with its numbers as vectors and, in the usual kinds, its flags as constants.
template <Kind kind, class C>
CTS_HD Rule<Vec<C>> broadcast(const Rule<C>& r) {
  constexpr bool any = kind == Kind::any;
  const auto v = [](C value) { return Vec<C>(value); };
  return {v(r.descent), v(r.momentum), v(r.gain), v(r.weight_decay), v(r.rate), v(r.shift), v(r.scale),
          !any || r.has_momentum, any ? r.has_weight_decay : kind == Kind::usual_with_weight_decay,
          any && r.nesterov, any && r.scaled, any && r.maximize, !any || r.meta_update, any && r.reset, any && r.reset_momentum};
}

// One row's inner step over n columns; phi is null where no meta-update and no reset are due. sums: where theta' - phi is added.
// next, next_g: the row that comes after this one, prefetched line by line.
template <Kind kind, class S, class C>
CTS_HD void inner_block(const Row<S, C>& row, const S* g, bool started, uint8_t* nonfinite, const C* phi, C* sums, int64_t n,
                        const Row<S, C>& next, const S* next_g, const Rule<Vec<C>>& rule) {
  using V = Vec<C>;
  constexpr int64_t N = V::size, line = kLine / int64_t(sizeof(S));
  constexpr bool has_master = sizeof(S) != sizeof(C);
  const auto step_vector = [&](int64_t i, auto whole) {
    V theta = row.load_theta(i);
    if (kind != Kind::any || g) {
      V d = unscaled(decltype(whole)::value ? load(g + i) : load_first<C>(g + i, n - i), rule), v{};
      if (kind == Kind::any && nonfinite && !all_finite(d)) __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
      if (rule.has_momentum) v = load(row.momentum + i);
      inner_step(theta, v, d, started, rule);
      if (rule.has_momentum) store(row.momentum + i, v);
    }
    if (rule.reset_momentum) store(row.momentum + i, V(C(0)));
    if (rule.meta_update) store(sums + i, load(sums + i) + (theta - load(phi + i)));
    if (phi) row.store_work(i, theta);
    else row.store_theta(i, theta);
  };
  int64_t i = 0;
  for (; i + line <= n; i += line) {
    prefetch_far(next_g, i), prefetch_far(next.theta, i), prefetch_far(next.momentum, i);
    if (has_master) prefetch_far(next.master, i), prefetch_far(next.master, i + line / 2);
    for (int64_t j = i; j < i + line; j += N) step_vector(j, std::true_type());
  }
  for (; i + N <= n; i += N) step_vector(i, std::true_type());
  if (i < n) step_vector(i, std::false_type());
}

// One tile of any kind and any number of tasks, in blocks of columns: the inner steps of all rows, with the sum over the tasks in the
// first cache, then the meta-update and, with theta' still in the second, the shift.
template <Kind kind, class S, class C>
__attribute__((noinline)) void tile_in_blocks(const Flat& flat, const Tile& tile, const Tile* next, const Step& step, const Rule<C>& general) {
  using V = Vec<C>;
  constexpr int64_t N = V::size, block = kBlock / int64_t(sizeof(C));
  constexpr bool has_master = sizeof(S) != sizeof(C);
  const Rule<V> rule = broadcast<kind>(general);
  const Segment& segment = flat.segments[tile.segment];
  const bool uses_phi = rule.meta_update || rule.reset;
  const auto row_at = [&](const Segment& of, int64_t t, int64_t column) {
    const int64_t at = of.offset + column + t * flat.stride;
    return Row<S, C>{advanced(static_cast<S*>(flat.theta), at), advanced(static_cast<S*>(flat.momentum), at),
                     has_master ? advanced(static_cast<C*>(flat.master), at) : nullptr};
  };
  const auto gradient = [&](const Segment& of, int64_t t) { return static_cast<const S*>(step.gradients[of.first + t]); };
  alignas(64) C sums[block];

  for (int64_t column = tile.begin; column < tile.end; column += block) {
    const int64_t n = column + block < tile.end ? block : tile.end - column;
    C* const phi = uses_phi ? static_cast<C*>(flat.phi) + segment.offset + column : nullptr;
    if (rule.meta_update) memset(sums, 0, sizeof(sums));
    for (int64_t t = 0; t < flat.rows; ++t) {
      const bool last = t + 1 == flat.rows, leaves = last && column + n == tile.end && next;
      const Segment& coming = leaves ? flat.segments[next->segment] : segment;
      const int64_t coming_row = last ? 0 : t + 1, coming_column = leaves ? next->begin : last ? column + block : column;
      const S* const g = gradient(segment, t);
      const bool started = kind != Kind::any || !step.started || step.started[segment.first + t];
      uint8_t* const nonfinite = step.nonfinite ? step.nonfinite + segment.first + t : nullptr;
      inner_block<kind>(row_at(segment, t, column), g ? g + column : nullptr, started, nonfinite, phi, sums, n,
                        row_at(coming, coming_row, coming_column), advanced(gradient(coming, coming_row), coming_column), rule);
    }
    if (!uses_phi) continue;
    for (int64_t i = 0; i < n; i += N) {
      V value = load(phi + i), delta = value;
      if (rule.meta_update) delta = meta_update(value, load(sums + i), rule), store(phi + i, value);
      store(sums + i, rule.reset ? value : delta);
    }
    for (int64_t t = flat.rows; t-- > 0;) {  // the last rows are the ones still near
      const Row<S, C> row = row_at(segment, t, column);
      for (int64_t i = 0; i < n; i += N) {
        V theta = load(sums + i);
        if (!rule.reset) {
          const V delta = theta;
          theta = row.load_work(i), shift(theta, delta, rule);
        }
        row.store_theta(i, theta);
      }
    }
  }
}

// One vector of columns of a usual tile with T tasks: theta' of all of them stays in registers. g, rows: each task's gradient and
// buffers at column 0 of the segment. left: columns that are not padding.
template <int T, bool whole, class C>
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
template <int T, Kind kind, class C>
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
    for (int64_t column = block; column < end; column += N) step_in_registers<T, true>(g, rows, phi, rule, column, N);
  }
  if (whole_end < tile.end) step_in_registers<T, false>(g, rows, phi, rule, whole_end, segment.numel - whole_end);
}

template <Kind kind, class S, class C>
void step_tile(const Flat& flat, const Tile& tile, const Tile* next, const Step& step, const Rule<C>& rule) {
  if constexpr (kind != Kind::any && sizeof(S) == sizeof(C)) {
    const bool is_long = flat.segments[tile.segment].numel >= kLong;
    switch (is_long && flat.rows > 4 ? 0 : flat.rows) {
      case 2: return tile_in_registers<2, kind>(flat, tile, next, step, rule);
      case 3: return tile_in_registers<3, kind>(flat, tile, next, step, rule);
      case 4: return tile_in_registers<4, kind>(flat, tile, next, step, rule);
      case 5: return tile_in_registers<5, kind>(flat, tile, next, step, rule);
      case 6: return tile_in_registers<6, kind>(flat, tile, next, step, rule);
      case 7: return tile_in_registers<7, kind>(flat, tile, next, step, rule);
      case 8: return tile_in_registers<8, kind>(flat, tile, next, step, rule);
    }
  }
  tile_in_blocks<kind, S>(flat, tile, next, step, rule);
}

template <class S, class C>
void step_tiles(const Flat* flats, const Tile* tiles, int64_t first, int64_t last, int64_t num_tiles, const Step& step) {
  for (int64_t i = first; i < last; ++i) {
    const Tile& tile = tiles[i];
    const Flat& flat = flats[tile.flat];
    const Segment& segment = flat.segments[tile.segment];
    const Rule<C> rule = make_rule<C>(step.groups[segment.group], step, flat.rows, flat.phi != nullptr);
    const Tile* next = i + 1 < num_tiles && tiles[i + 1].flat == tile.flat ? &tiles[i + 1] : nullptr;
    switch (kind_of(rule, step, segment, flat.rows)) {
      case Kind::usual: step_tile<Kind::usual, S>(flat, tile, next, step, rule); break;
      case Kind::usual_with_weight_decay: step_tile<Kind::usual_with_weight_decay, S>(flat, tile, next, step, rule); break;
      case Kind::any: step_tile<Kind::any, S>(flat, tile, next, step, rule); break;
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
