// What methods do beside the step, over long spans of whole buffers: sums of gradients, the reset, distances, and Leap's segment.
//
// Compiled once for each instruction set, as csrc/shifting_step.cpp is.
#include <algorithm>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu.h"
#include "vec.h"

namespace cts {
inline namespace CTS_ISA {
namespace {

// Gradient values at columns i ...; zeros behind its n columns.
template <class C, class S>
CTS_HD Vec<C> load_gradient(const S* g, int64_t i, int64_t n) {
  return i + Vec<C>::size <= n ? Vec<C>(load(g + i)) : load_first<C>(g + i, n - i);
}

// A store of what nobody reads soon: memory is not read first, and the caches keep what they hold.
template <class C>
CTS_HD void store_past_caches(C* to, Vec<C> value) {
#if defined(__SSE2__)
  static_assert(sizeof(value) % sizeof(__m128i) == 0);
  for (size_t part = 0; part < sizeof(value) / sizeof(__m128i); ++part) {
    __m128i bits;
    memcpy(&bits, reinterpret_cast<const char*>(&value.x) + part * sizeof(bits), sizeof(bits));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + part, bits);
  }
#else
  store(to, value);
#endif
}

CTS_HD void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// body(i) for the vectors of n columns, while the same columns of what comes next are on their way into the second cache.
template <class C, class Body, class... Next>
CTS_HD void for_vectors(int64_t n, Body body, const Next*... next) {
  constexpr int64_t line = 64 / int64_t(sizeof(C));
  for (int64_t begin = 0; begin < n; begin += line) {
    (__builtin_prefetch(next + begin, 0, 2), ...);
    for (int64_t i = begin; i < n && i < begin + line; i += Vec<C>::size) body(i);
  }
}

template <class C>
double sum_of(Vec<C> v) {
  double sum = 0;
  for (int i = 0; i < Vec<C>::size; ++i) sum += v.x[i];
  return sum;
}

template <class S, class C>
void add_gradients(const Flat& flat, const Tile& span, const void* const* gradients, void* target, const double* weights) {
  const Segment& segment = flat.segments[span.segment];
  const int64_t n = span.end - span.begin;
  alignas(64) C sums[kTileElements + Vec<C>::size];
  memset(sums, 0, size_t(n + Vec<C>::size) * sizeof(C));
  for (int32_t t = 0; t < flat.rows; ++t) {
    const S* g = static_cast<const S*>(gradients[segment.first + t]);
    if (!g) continue;
    const S* next = t + 1 < flat.rows ? static_cast<const S*>(gradients[segment.first + t + 1]) : nullptr;
    for_vectors<C>(n, [&](int64_t i) { store(sums + i, load(sums + i) + load_gradient<C>(g + span.begin, i, n)); }, (next ? next : g) + span.begin);
  }
  C* const out = static_cast<C*>(target) + segment.offset + span.begin;
  const Vec<C> weight{C(weights[segment.group])};
  for (int64_t i = 0; i < n; i += Vec<C>::size) store(out + i, load(out + i) + weight * load(sums + i));
}

template <class S, class C>
void reset(const Flat& flat, const Tile& span, bool momentum) {
  const int64_t first = flat.segments[span.segment].offset + span.begin, n = span.end - span.begin;
  const C* phi = static_cast<const C*>(flat.phi) + first;
  for (int32_t t = 0; t < flat.rows; ++t) {
    const int64_t at = first + t * flat.stride;
    S *theta = static_cast<S*>(flat.theta) + at, *v = static_cast<S*>(flat.momentum) + at;
    if constexpr (std::is_same_v<S, C>) {
      for (int64_t i = 0; i < n; i += Vec<C>::size) store_past_caches(theta + i, load(phi + i));
      for (int64_t i = 0; momentum && i < n; i += Vec<C>::size) store_past_caches(v + i, Vec<C>(C(0)));
    } else {
      C* master = static_cast<C*>(flat.master) + at;
      for (int64_t i = 0; i < n; i += Vec<C>::size) store(master + i, load(phi + i)), store(theta + i, load(phi + i));
      for (int64_t i = 0; momentum && i < n; i += Vec<C>::size) store(v + i, Vec<C>(C(0)));
    }
  }
  finish_stores();
}

template <class C>
C* work_theta(const Flat& flat, int64_t at) {
  return static_cast<C*>(flat.master ? flat.master : flat.theta) + at;
}

template <class C>
void squared_distances(const Flat& flat, const Tile& span, const void* rows, int64_t stride, double* result) {
  constexpr int64_t kShort = 512;  // columns that are summed in C; their sums are, in double
  const int64_t first = flat.segments[span.segment].offset + span.begin, n = span.end - span.begin;
  for (int32_t t = 0; t < flat.rows; ++t) {
    const bool last = t + 1 == flat.rows;
    const int64_t next_theta = last ? 0 : flat.stride, next_row = last ? 0 : stride;
    const C *a = work_theta<C>(flat, first + t * flat.stride), *b = static_cast<const C*>(rows) + first + t * stride;
    result[t] = 0;
    for (int64_t begin = 0; begin < n; begin += kShort, a += kShort, b += kShort) {
      Vec<C> sum{C(0)};
      for_vectors<C>(std::min(n - begin, kShort), [&](int64_t i) {
        const Vec<C> d = load(a + i) - load(b + i);
        sum = sum + d * d;
      }, a + next_theta, b + next_row);
      result[t] += sum_of(sum);
    }
  }
}

template <class S, class C>
void leap(const Flat& flat, const Tile& span, const void* const* gradients, const LeapBuffers& kept, const LeapSegment& segment_end) {
  using V = Vec<C>;
  const Segment& segment = flat.segments[span.segment];
  const int64_t first = segment.offset + span.begin, n = span.end - span.begin;
  const bool ends = segment_end.weights, keeps = segment_end.keeps;
  const V scale{C(segment_end.scale)};
  C* const total = static_cast<C*>(kept.total) + first;
  for (int32_t t = 0; t < flat.rows; ++t) {
    const bool last = t + 1 == flat.rows;
    const int64_t next_theta = last ? 0 : flat.stride, next_kept = last ? 0 : kept.stride;
    const C* theta = work_theta<C>(flat, first + t * flat.stride);
    C *old_theta = static_cast<C*>(kept.theta) + first + t * kept.stride, *old_g = static_cast<C*>(kept.gradient) + first + t * kept.stride;
    const S *g = static_cast<const S*>(gradients[segment.first + t]), *next_g = last ? nullptr : static_cast<const S*>(gradients[segment.first + t + 1]);
    const V weight{C(ends ? segment_end.weights[t] : 0)}, slope{C(ends ? -segment_end.weights[t] * segment_end.changes[t] : 0)};
    for_vectors<C>(n, [&](int64_t i) {
      const V now = load(theta + i);
      if (ends) store(total + i, load(total + i) + (weight * (load(old_theta + i) - now) + slope * load(old_g + i)));
      if (!keeps) return;
      store(old_theta + i, now);
      store(old_g + i, g ? scale * load_gradient<C>(g + span.begin, i, n) : V(C(0)));
    }, theta + next_theta, old_theta + next_kept, old_g + next_kept, next_g ? next_g + span.begin : reinterpret_cast<const S*>(theta));
  }
}

template <class S, class C>
void add_signs(const Flat& flat, const Tile& span, const int8_t* signs, double scale) {
  const int64_t first = flat.segments[span.segment].offset + span.begin, n = span.end - span.begin;
  alignas(64) C shift[kTileElements + Vec<C>::size];
  for (int64_t i = 0; i < n; ++i) shift[i] = C(scale) * C(signs[span.begin + i]);
  memset(shift + n, 0, Vec<C>::size * sizeof(C));  // padding stays where it is
  for (int32_t t = 0; t < flat.rows; ++t) {
    C* theta = work_theta<C>(flat, first + t * flat.stride);
    for_vectors<C>(n, [&](int64_t i) {
      const Vec<C> moved = load(theta + i) + load(shift + i);
      store(theta + i, moved);
      if constexpr (!std::is_same_v<S, C>) store(static_cast<S*>(flat.theta) + first + t * flat.stride + i, moved);
    }, theta + (t + 1 < flat.rows ? flat.stride : 0));
  }
}

template <class S, class C>
constexpr Passes passes_of() {
  return {add_gradients<S, C>, reset<S, C>, squared_distances<C>, leap<S, C>, add_signs<S, C>};
}

}  // namespace

Passes passes(DType dtype) {
  switch (dtype) {
    case DType::float64: return passes_of<double, double>();
    case DType::bfloat16: return passes_of<BFloat16, float>();
    case DType::float16: return passes_of<Half, float>();
    default: return passes_of<float, float>();
  }
}

}  // namespace CTS_ISA
}  // namespace cts
