// The step's kernel: walks tiles of columns, vector by vector, and applies the rule of shifting_step.h to all rows at once.
//
// Compiled once for each instruction set (-DCTS_ISA=avx512 | avx2 | plain); csrc/cpu.cpp takes one at run time.
#include "shifting_step.h"

#include "cpu.h"
#include "vec.h"

namespace cts {
inline namespace CTS_ISA {
namespace {

constexpr int64_t kLine = 64;         // bytes of a cache line
constexpr int64_t kAhead = 8 * kLine;  // how far each stream is prefetched
constexpr int64_t kBlock = 1024;       // bytes of C of one row in a block

// A pointer that may lie outside of its array and is never read through.
template <class S>
CTS_HD S* advanced(S* base, int64_t elements) {
  return reinterpret_cast<S*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(elements) * sizeof(S));
}

template <class S>
CTS_HD void prefetch(const S* base, int64_t elements) {
  __builtin_prefetch(advanced(base, elements), 1);
}

// One row's part of a coordinate in memory: S in theta, momentum and gradient; C in phi and, where S is narrower, in the master.
template <class S, class C>
struct Row {
  S *theta, *momentum;
  C* master;

  CTS_HD Vec<C> load_theta(int64_t at) const {
    if constexpr (sizeof(S) == sizeof(C)) return load(theta + at);
    else return load_master(master + at, theta + at);
  }
  CTS_HD void store_theta(int64_t at, Vec<C> value) const {
    store(theta + at, value);
    if constexpr (sizeof(S) != sizeof(C)) store(master + at, value);
  }
};

template <class S, class C>
CTS_HD Row<S, C> row_of(const Flat& flat, int64_t t) {
  int64_t start = t * flat.stride;
  return {static_cast<S*>(flat.theta) + start, static_cast<S*>(flat.momentum) + start,
          sizeof(S) == sizeof(C) ? nullptr : static_cast<C*>(flat.master) + start};
}

// All rows of one flat, and how one vector of columns is stepped.
template <class S, class C>
struct Columns {
  static constexpr int64_t N = Vec<C>::size;
  const Flat& flat;
  const Segment& segment;
  const Step& step;
  const Rule<C>& rule;

  CTS_HD const S* gradient(int64_t t) const { return static_cast<const S*>(step.gradients[segment.first + t]); }
  CTS_HD C* phi(int64_t column) const { return static_cast<C*>(flat.phi) + segment.offset + column; }

  // The inner step of one row at `column` ...; returns theta'.
  CTS_HD Vec<C> inner(const Row<S, C>& row, int64_t t, const S* g, int64_t column) const {
    const int64_t at = segment.offset + column, left = segment.numel - column;
    Vec<C> theta = row.load_theta(at);
    if (g) {
      Vec<C> d = unscaled(left >= N ? load(g + column) : load_first<C>(g + column, left), rule), v{};
      if (step.nonfinite && !all_finite(d)) __atomic_store_n(step.nonfinite + segment.first + t, 1, __ATOMIC_RELAXED);
      if (rule.has_momentum) v = load(row.momentum + at);
      inner_step(theta, v, d, !step.started || step.started[segment.first + t], rule);
      if (rule.has_momentum) store(row.momentum + at, v);
    }
    if (rule.reset_momentum) store(row.momentum + at, Vec<C>(0));
    return theta;
  }
};

// Up to kMaxInRegisters tasks, a number known at compile time: theta' of all of them stays in registers.
template <class S, class C, int T>
void step_in_registers(const Columns<S, C>& c, const Tile& tile, const Tile* next) {
  constexpr int64_t line = kLine / int64_t(sizeof(S)), ahead = kAhead / int64_t(sizeof(S));
  const bool uses_phi = c.rule.meta_update || c.rule.reset;
  const S* g[T];
  const S* coming[T];  // gradients to be prefetched: this tile's, and at its end the next one's
  Row<S, C> rows[T];
  for (int t = 0; t < T; ++t) {
    g[t] = c.gradient(t);
    coming[t] = advanced(g[t], ahead);
    rows[t] = row_of<S, C>(c.flat, t);
  }
  for (int64_t block = tile.begin; block < tile.end; block += line) {
    if (next && block + ahead >= tile.end) {
      const Segment& segment = c.flat.segments[next->segment];
      for (int t = 0; t < T; ++t)
        coming[t] = advanced(static_cast<const S*>(c.step.gradients[segment.first + t]), next->begin + ahead - tile.end);
      next = nullptr;
    }
    CTS_UNROLL
    for (int t = 0; t < T; ++t) {
      prefetch(coming[t], block);
      prefetch(rows[t].theta, c.segment.offset + block + ahead);
      prefetch(rows[t].momentum, c.segment.offset + block + ahead);
      if constexpr (sizeof(S) != sizeof(C))
        prefetch(rows[t].master, c.segment.offset + block + ahead), prefetch(rows[t].master, c.segment.offset + block + ahead + line / 2);
    }
    if (uses_phi) prefetch(c.phi(block), ahead);
    const int64_t end = block + line < tile.end ? block + line : tile.end;
    for (int64_t column = block; column < end; column += Columns<S, C>::N) {
      Vec<C> theta[T];
      CTS_UNROLL
      for (int t = 0; t < T; ++t) theta[t] = c.inner(rows[t], t, g[t], column);
      if (uses_phi) {
        Vec<C> phi = load(c.phi(column));
        meta_step(theta, phi, c.rule);
        if (c.rule.meta_update) store(c.phi(column), phi);
      }
      CTS_UNROLL
      for (int t = 0; t < T; ++t) rows[t].store_theta(c.segment.offset + column, theta[t]);
    }
  }
}

// Any number of tasks: blocks of columns small enough that theta' of all tasks is still in the cache for the second pass.
template <class S, class C>
void step_in_blocks(const Columns<S, C>& c, const Tile& tile) {
  constexpr int64_t N = Columns<S, C>::N, size = kBlock / int64_t(sizeof(C)), line = kLine / int64_t(sizeof(S));
  const bool uses_phi = c.rule.meta_update || c.rule.reset;
  Vec<C> sums[size / N];
  for (int64_t block = tile.begin; block < tile.end; block += size) {
    const int64_t end = block + size < tile.end ? block + size : tile.end, offset = c.segment.offset;
    for (int64_t t = 0; t < c.flat.rows; ++t) {
      const bool last = t + 1 == c.flat.rows;  // then the first row of the next block comes
      const Row<S, C> row = row_of<S, C>(c.flat, t), coming = row_of<S, C>(c.flat, last ? 0 : t + 1);
      const S *g = c.gradient(t), *coming_g = c.gradient(last ? 0 : t + 1);
      const int64_t skip = last ? size : 0;
      for (int64_t column = block; column < end; column += N) {
        if ((column - block) % line == 0) {
          prefetch(coming_g, column + skip);
          prefetch(coming.theta, offset + column + skip);
          prefetch(coming.momentum, offset + column + skip);
        }
        if (sizeof(S) != sizeof(C) && (column - block) % (line / 2) == 0) prefetch(coming.master, offset + column + skip);
        const Vec<C> theta = c.inner(row, t, g, column);
        row.store_theta(offset + column, theta);
        if (c.rule.meta_update) {
          const Vec<C> difference = theta - load(c.phi(column));
          Vec<C>& sum = sums[(column - block) / N];
          sum = t ? sum + difference : difference;
        }
      }
    }
    if (!uses_phi) continue;
    if (c.rule.meta_update) {
      for (int64_t column = block; column < end; column += N) {
        Vec<C> phi = load(c.phi(column)), &sum = sums[(column - block) / N];
        sum = meta_update(phi, sum, c.rule);  // from here on: delta
        store(c.phi(column), phi);
      }
    }
    for (int64_t t = 0; t < c.flat.rows; ++t) {
      const Row<S, C> row = row_of<S, C>(c.flat, t);
      for (int64_t column = block; column < end; column += N) {
        Vec<C> theta;
        if (c.rule.reset) {
          theta = load(c.phi(column));
        } else {
          theta = row.load_theta(offset + column);
          shift(theta, sums[(column - block) / N], c.rule);
        }
        row.store_theta(offset + column, theta);
      }
    }
  }
}

template <class S, class C>
void step_tiles(const Flat* flats, const Tile* tiles, int64_t first, int64_t last, int64_t num_tiles, const Step& step) {
  for (int64_t i = first; i < last; ++i) {
    const Tile& tile = tiles[i];
    const Flat& flat = flats[tile.flat];
    const Segment& segment = flat.segments[tile.segment];
    const Rule<C> rule = make_rule<C>(step.groups[segment.group], step, flat.rows, flat.phi != nullptr);
    const Columns<S, C> columns{flat, segment, step, rule};
    const Tile* next = i + 1 < num_tiles && tiles[i + 1].flat == tile.flat ? &tiles[i + 1] : nullptr;
    switch (flat.rows) {
      case 1: step_in_registers<S, C, 1>(columns, tile, next); break;
      case 2: step_in_registers<S, C, 2>(columns, tile, next); break;
      case 4: step_in_registers<S, C, 4>(columns, tile, next); break;
      case 8: step_in_registers<S, C, 8>(columns, tile, next); break;
      case 16: step_in_registers<S, C, 16>(columns, tile, next); break;
      default: step_in_blocks<S, C>(columns, tile);
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
