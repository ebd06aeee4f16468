// What methods do beside the step: sums of gradients, the end of a round, distances and signs over spans of whole
// buffers, and the sum along the tasks' paths over each tile of a step.
//
// Compiled once for each instruction set, as csrc/cpu/shifting_step.cpp is.
#include <algorithm>
#include <type_traits>

#include "cpu/stepper.h"
#include "cpu/vec.h"

namespace cts {
inline namespace CTS_ISA {
namespace {

// Gradient values at columns i ...; zeros behind its n columns.
template <class C, class S> CTS_HD Vec<C> load_gradient(const S* g, int64_t i, int64_t n) {
  return i + Vec<C>::size <= n ? Vec<C>(load(g + i)) : load_first<C>(g + i, n - i);
}

// A store of what nobody reads soon: memory is not read first, and the caches keep what they hold.
template <class C> CTS_HD void store_past_caches(C* to, Vec<C> value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(value))
    return store(to, value);  // an allocator that aligns less than torch's
#if defined(__AVX512F__)
  __m512i bits;
  memcpy(&bits, &value.x, sizeof(bits));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
#elif defined(__AVX2__)
  __m256i bits;
  memcpy(&bits, &value.x, sizeof(bits));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
#else
  store(to, value);
#endif
}

CTS_HD void finish_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Lines that rows read side by side are fetched ahead, into the second cache: the first one keeps fewer on their way
// than eight rows need.
constexpr int64_t kLinesAhead = 32;

// body(begin, end) for the lines of n columns, while the same columns of what comes next are on their way into the
// second cache.
template <class C, class Body, class... Next> CTS_HD void for_lines(int64_t n, Body body, const Next*... next) {
  constexpr int64_t line = 64 / int64_t(sizeof(C));
  for (int64_t begin = 0; begin < n; begin += line) {
    (__builtin_prefetch(next + begin, 0, 2), ...);
    body(begin, std::min(begin + line, n));
  }
}

// body(i) for their vectors.
template <class C, class Body, class... Next> CTS_HD void for_vectors(int64_t n, Body body, const Next*... next) {
  const auto vectors = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += Vec<C>::size) body(i);
  };
  for_lines<C>(n, vectors, next...);
}

// Zeros where the last vector of n columns reaches into the padding: other operations read it, and 0 times a NaN or an
// infinity is none.
template <class C> CTS_HD void clear_padding(C* values, int64_t n) {
  for (int64_t i = n; i % Vec<C>::size; ++i) values[i] = C(0);
}

// sums += G gradients, which are read side by side: the more streams, the more of them the processor fetches ahead.
template <int G, class S, class C> void add_rows(const S* const* g, int64_t n, C* sums) {
  constexpr int64_t line = 64 / int64_t(sizeof(S)), ahead = kLinesAhead * line;
  const auto sum = [&](int64_t i) {
    Vec<C> value = load(sums + i);
    CTS_UNROLL
    for (int row = 0; row < G; ++row) value = value + load_gradient<C>(g[row], i, n);
    store(sums + i, value);
  };
  int64_t begin = 0;
  for (; begin + line <= n; begin += line) {
    CTS_UNROLL
    for (int row = 0; row < G; ++row) __builtin_prefetch(g[row] + begin + ahead, 0, 2);
    for (int64_t i = begin; i < begin + line; i += Vec<C>::size) sum(i);
  }
  for (; begin < n; begin += Vec<C>::size) sum(begin);
}

// sums <- the sum over the rows of their gradients, one after the other.
template <class S, class C>
void sum_gradients(const Flat& flat, const Columns& span, const void* const* gradients, C* sums) {
  constexpr int kSideBySide = 8;
  const Segment& segment = flat.segments[span.segment];
  const int64_t n = span.end - span.begin;
  memset(sums, 0, size_t(n + Vec<C>::size) * sizeof(C));
  const S* g[kSideBySide];
  int count = 0;
  for (int32_t t = 0; t < flat.rows; ++t) {
    if (const void* row = gradients[segment.first + t]) g[count++] = static_cast<const S*>(row) + span.begin;
    if (count == kSideBySide) add_rows<kSideBySide>(g, n, sums), count = 0;
  }
  const S* const* left = g;
  if (count & 4) add_rows<4>(left, n, sums), left += 4;
  if (count & 2) add_rows<2>(left, n, sums), left += 2;
  if (count & 1) add_rows<1>(left, n, sums);
}

template <class S, class C>
void add_gradients(const Flat& flat, const Columns& span, const void* const* gradients, void* target, double weight) {
  const int64_t n = span.end - span.begin;
  alignas(64) C sums[kSpanElements + Vec<C>::size];
  sum_gradients<S>(flat, span, gradients, sums);
  C* const out = static_cast<C*>(target) + flat.segments[span.segment].offset + span.begin;
  for (int64_t i = 0; i < n; i += Vec<C>::size) store(out + i, load(out + i) + Vec<C>(C(weight)) * load(sums + i));
}

template <class S, class C>
void end_round(const Flat& flat, const Columns& span, const Columns* next, const RoundEnd& end) {
  using V = Vec<C>;
  const Segment& segment = flat.segments[span.segment];
  const int64_t first = segment.offset + span.begin, n = span.end - span.begin;
  C* const phi = static_cast<C*>(flat.phi) + first;
  if (end.gradients || end.total) {
    alignas(64) C sums[kSpanElements + V::size];
    C* const total = end.total ? static_cast<C*>(end.total) + first : nullptr;
    const V weight{C(end.weight)}, rate{C(end.rates[segment.group])}, zero{C(0)};
    if (end.gradients) sum_gradients<S>(flat, span, end.gradients, sums);
    for (int64_t i = 0; i < n; i += V::size) {
      V sum = total ? load(total + i) : zero;
      if (end.gradients) sum = sum + weight * load(sums + i);
      if (total) store(total + i, zero);
      store(phi + i, load(phi + i) - rate * sum);
    }
  }
  // reads and writes have ways of their own to memory: while theta and momentum leave, the next gradients come
  constexpr int32_t kRowsAhead = (256 << 10) / int32_t(kSpanElements * sizeof(S));
  for (int32_t t = 0; t < flat.rows; ++t) {
    const int64_t at = first + t * flat.stride;
    S *theta = static_cast<S*>(flat.theta) + at, *v = static_cast<S*>(flat.momentum) + at;
    const S* g = next && end.gradients && t < kRowsAhead
                     ? static_cast<const S*>(end.gradients[flat.segments[next->segment].first + t])
                     : nullptr;
    const S* coming = g ? g + next->begin : reinterpret_cast<const S*>(phi);  // phi is there already
    if constexpr (std::is_same_v<S, C>) {
      for_lines<C>(
          n,
          [&](int64_t begin, int64_t stop) {  // a whole line at a time, or its parts leave one by one
            for (int64_t i = begin; i < stop; i += V::size) store_past_caches(theta + i, load(phi + i));
            for (int64_t i = begin; end.momentum && i < stop; i += V::size) store_past_caches(v + i, V(C(0)));
          },
          coming);
    } else {
      C* master = static_cast<C*>(flat.master) + at;
      for_vectors<C>(
          n,
          [&](int64_t i) {
            store(master + i, load(phi + i)), store(theta + i, load(phi + i));
            if (end.momentum) store(v + i, V(C(0)));
          },
          coming);
    }
  }
  finish_stores();
}

template <class C> C* work_theta(const Flat& flat, int64_t at) {
  return static_cast<C*>(flat.master ? flat.master : flat.theta) + at;
}

// |a - b|^2 of G rows of n columns, read side by side.
template <int G, class C>
void row_distances(const C* a, int64_t a_stride, const C* b, int64_t b_stride, int64_t n, double* result) {
  constexpr int64_t kShort = 512;  // columns that are summed in C; their sums are, in double
  constexpr int64_t line = 64 / int64_t(sizeof(C)), ahead = kLinesAhead * line;
  std::fill_n(result, G, 0.0);
  for (int64_t begin = 0; begin < n; begin += kShort) {
    Vec<C> sums[G]{};
    for_lines<C>(std::min(n - begin, kShort), [&](int64_t first, int64_t last) {
      CTS_UNROLL
      for (int row = 0; row < G; ++row) {
        const C *x = a + row * a_stride + begin, *y = b + row * b_stride + begin;
        __builtin_prefetch(x + first + ahead, 0, 2), __builtin_prefetch(y + first + ahead, 0, 2);
        for (int64_t i = first; i < last; i += Vec<C>::size) {
          const Vec<C> d = load(x + i) - load(y + i);
          sums[row] = sums[row] + d * d;
        }
      }
    });
    for (int row = 0; row < G; ++row) result[row] += sum_of(sums[row]);
  }
}

template <class C>
void squared_distances(const Flat& flat, const Columns& span, const void* rows, int64_t stride, double* result) {
  constexpr int kSideBySide = 4;
  const int64_t first = flat.segments[span.segment].offset + span.begin, n = span.end - span.begin;
  const C *a = work_theta<C>(flat, first), *b = static_cast<const C*>(rows) + first;
  int32_t t = 0;
  for (; t + kSideBySide <= flat.rows; t += kSideBySide)
    row_distances<kSideBySide>(a + t * flat.stride, flat.stride, b + t * stride, stride, n, result + t);
  for (; t < flat.rows; ++t) row_distances<1>(a + t * flat.stride, flat.stride, b + t * stride, stride, n, result + t);
}

template <class S, class C>
void extend_path(const Flat& flat, const Columns& tile, const void* const* gradients, const PathSum& path) {
  using V = Vec<C>;
  const Segment& segment = flat.segments[tile.segment];
  const int64_t first = segment.offset + tile.begin, n = tile.end - tile.begin;
  const V scale{C(path.scale)};
  C* const total = static_cast<C*>(path.total) + first;
  // read here: every store below might change them, for all that the compiler knows
  const bool ends = path.weights, keep_point = path.keep_point;
  for (int32_t t = 0; t < flat.rows; ++t) {
    const C* theta = work_theta<C>(flat, first + t * flat.stride);
    C *old_theta = static_cast<C*>(path.theta) + first + t * path.stride,
      *old_g = static_cast<C*>(path.gradient) + first + t * path.stride;
    const void* const* const g_of = gradients + segment.first;
    // the next row, or the first one of the next tile, which mostly lies behind this one
    const bool last = t + 1 == flat.rows;
    const int64_t next = last ? n - t * path.stride : path.stride,
                  next_theta = last ? n - t * flat.stride : flat.stride;
    const S *g = static_cast<const S*>(g_of[t]), *next_g = static_cast<const S*>(g_of[last ? 0 : t + 1]);
    const S* coming = next_g ? next_g + (last ? tile.end : tile.begin) : reinterpret_cast<const S*>(theta);
    const V weight{C(ends ? path.weights[t] : 0)}, slope{C(ends ? -path.weights[t] * path.loss_changes[t] : 0)};
    for_vectors<C>(
        n,
        [&](int64_t i) {
          const V now = load(theta + i);
          if (ends)
            store(total + i, load(total + i) + (weight * (load(old_theta + i) - now) + slope * load(old_g + i)));
          if (!keep_point) return;
          store(old_theta + i, now);
          store(old_g + i, g ? scale * load_gradient<C>(g + tile.begin, i, n) : V(C(0)));
        },
        old_theta + next, old_g + next, theta + next_theta, coming);
    clear_padding(old_g, n);
  }
  clear_padding(total, n);
}

// Word i of a key: SplitMix64, as cts_fast/engine/backends/base.py has it.
CTS_HD uint64_t random_word(uint64_t key, uint64_t i) {
  uint64_t z = key + 0x9E3779B97F4A7C15u * (i + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// theta += values in G rows, side by side.
template <int G, class S, class C> void add_to_rows(const Flat& flat, int64_t at, int64_t n, const C* values) {
  C* theta[G];
  S* stored[G];
  for (int row = 0; row < G; ++row) {
    theta[row] = work_theta<C>(flat, at + row * flat.stride);
    stored[row] = static_cast<S*>(flat.theta) + at + row * flat.stride;
  }
  for (int64_t i = 0; i < n; i += Vec<C>::size) {
    const Vec<C> by = load(values + i);
    CTS_UNROLL
    for (int row = 0; row < G; ++row) {
      const Vec<C> moved = load(theta[row] + i) + by;
      store(theta[row] + i, moved);
      if constexpr (!std::is_same_v<S, C>) store(stored[row] + i, moved);
    }
  }
}

template <class S, class C>
void add_signs(const Flat& flat, const Columns& span, uint64_t key, uint64_t first, double scale) {
  constexpr int kSideBySide = 4;
  const int64_t at = flat.segments[span.segment].offset + span.begin, n = span.end - span.begin;
  static_assert(kSpanElements % 64 == 0);  // a span starts with a word
  alignas(64) C shift[kSpanElements + Vec<C>::size];
  for (int64_t begin = 0; begin < n; begin += 64) {
    const uint64_t word = random_word(key, first + uint64_t(span.begin + begin) / 64);
    for (int64_t i = 0; i < 64; i += Vec<C>::size) store(shift + begin + i, signed_by(word >> i, C(scale)));
  }
  memset(shift + n, 0, Vec<C>::size * sizeof(C));  // padding stays where it is
  int32_t t = 0;
  for (; t + kSideBySide <= flat.rows; t += kSideBySide)
    add_to_rows<kSideBySide, S>(flat, at + t * flat.stride, n, shift);
  for (; t < flat.rows; ++t) add_to_rows<1, S>(flat, at + t * flat.stride, n, shift);
}

template <class S, class C> constexpr MethodOps method_ops_of() {
  return {add_gradients<S, C>, end_round<S, C>, squared_distances<C>, extend_path<S, C>, add_signs<S, C>};
}

}  // namespace

MethodOps method_ops(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return method_ops_of<double, double>();
    case DType::bfloat16:
      return method_ops_of<BFloat16, float>();
    case DType::float16:
      return method_ops_of<Half, float>();
    default:
      return method_ops_of<float, float>();
  }
}

}  // namespace CTS_ISA
}  // namespace cts
