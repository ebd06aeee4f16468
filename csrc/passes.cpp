// What methods do beside the step, over whole buffers: sums of gradients, the reset, distances, and Leap's segment. All of it is bound
// by memory, so it is compiled once, with the narrowest vectors.
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu.h"
#include "vec.h"

namespace cts {
namespace {

// Calls body(S(), C()) with the types of a dtype.
template <class Body>
void with_types(DType dtype, Body body) {
  switch (dtype) {
    case DType::float64: return body(double(), double());
    case DType::bfloat16: return body(BFloat16(), float());
    case DType::float16: return body(Half(), float());
    default: return body(float(), float());
  }
}

// Gradient values at columns i …; zeros behind its n columns.
template <class C, class S>
Vec<C> load_gradient(const S* g, int64_t i, int64_t n) {
  return i + Vec<C>::size <= n ? Vec<C>(load(g + i)) : load_first<C>(g + i, n - i);
}

// A store of what nobody reads soon: memory is not read first, and the caches keep what they hold.
template <class C>
void store_past_caches(C* to, Vec<C> value) {
#if defined(__SSE2__)
  if constexpr (sizeof(value) == sizeof(__m128i)) {
    __m128i bits;
    memcpy(&bits, &value, sizeof(bits));
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits);
  }
#endif
  store(to, value);
}

void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class C>
double sum_of(Vec<C> v) {
  double sum = 0;
  for (int i = 0; i < Vec<C>::size; ++i) sum += v.x[i];
  return sum;
}

}  // namespace

template <class Body>
void Plan::over_spans(int threads, Body body) const {
  struct Work {
    const Plan& plan;
    const Body& body;
    Queue queue;
  } work{*this, body, {int64_t(spans_.size()), 1}};
  run_team(
      [](void* data) {
        Work& work = *static_cast<Work*>(data);
        for (int64_t i; (i = work.queue.next.fetch_add(1, std::memory_order_relaxed)) < work.queue.count;) work.body(i, work.plan.spans_[i]);
        finish_stores();
      },
      &work, team_for(threads, spans_.size()));
}

void Plan::add_gradients(const void* const* gradients, void* target, const std::vector<double>& weights, int threads) const {
  with_types(dtype_, [&](auto s, auto c) {
    using S = decltype(s);
    using C = decltype(c);
    over_spans(threads, [&](int64_t, const Tile& span) {
      const Segment& segment = shared().segments[span.segment];
      const int64_t n = span.end - span.begin;
      alignas(64) C sums[kTileElements + Vec<C>::size] = {};
      for (int32_t t = 0; t < shared().rows; ++t) {
        const S* g = static_cast<const S*>(gradients[segment.first + t]);
        if (!g) continue;
        for (int64_t i = 0; i < n; i += Vec<C>::size) store(sums + i, load(sums + i) + load_gradient<C>(g + span.begin, i, n));
      }
      C* const out = static_cast<C*>(target) + segment.offset + span.begin;
      const Vec<C> weight{C(weights[segment.group])};
      for (int64_t i = 0; i < n; i += Vec<C>::size) store(out + i, load(out + i) + weight * load(sums + i));
    });
  });
}

void Plan::reset(bool momentum, int threads) const {
  with_types(dtype_, [&](auto s, auto c) {
    using S = decltype(s);
    using C = decltype(c);
    over_spans(threads, [&](int64_t, const Tile& span) {
      const int64_t first = shared().segments[span.segment].offset + span.begin, n = span.end - span.begin;
      const C* phi = static_cast<const C*>(shared().phi) + first;
      for (int32_t t = 0; t < shared().rows; ++t) {
        const int64_t at = first + t * shared().stride;
        S *theta = static_cast<S*>(shared().theta) + at, *v = static_cast<S*>(shared().momentum) + at;
        if constexpr (std::is_same_v<S, C>) {
          for (int64_t i = 0; i < n; i += Vec<C>::size) store_past_caches(theta + i, load(phi + i));
          for (int64_t i = 0; momentum && i < n; i += Vec<C>::size) store_past_caches(v + i, Vec<C>(C(0)));
        } else {
          C* master = static_cast<C*>(shared().master) + at;
          for (int64_t i = 0; i < n; i += Vec<C>::size) store(master + i, load(phi + i)), store(theta + i, load(phi + i));
          for (int64_t i = 0; momentum && i < n; i += Vec<C>::size) store(v + i, Vec<C>(C(0)));
        }
      }
    });
  });
}

std::vector<double> Plan::squared_distances(const void* rows, int64_t stride, int threads) const {
  const size_t tasks = size_t(shared().rows);
  std::vector<double> parts(spans_.size() * tasks), result(tasks);
  with_types(dtype_, [&](auto, auto c) {
    using C = decltype(c);
    over_spans(threads, [&](int64_t i, const Tile& span) {
      const int64_t first = shared().segments[span.segment].offset + span.begin, n = span.end - span.begin;
      for (size_t t = 0; t < tasks; ++t) {
        const C *a = work_theta<C>() + first + int64_t(t) * shared().stride, *b = static_cast<const C*>(rows) + first + int64_t(t) * stride;
        double total = 0;
        for (int64_t begin = 0; begin < n; begin += 256) {  // short sums in C, their sum in double
          Vec<C> sum{C(0)};
          for (int64_t j = begin; j < n && j < begin + 256; j += Vec<C>::size) {
            const Vec<C> d = load(a + j) - load(b + j);
            sum = sum + d * d;
          }
          total += sum_of(sum);
        }
        parts[size_t(i) * tasks + t] = total;
      }
    });
  });
  for (size_t i = 0; i < parts.size(); ++i) result[i % tasks] += parts[i];
  return result;
}

void Plan::leap(const void* const* gradients, const LeapBuffers& kept, const std::vector<double>& weights, const std::vector<double>& changes,
                double scale, bool keeps, int threads) const {
  with_types(dtype_, [&](auto s, auto c) {
    using S = decltype(s);
    using C = decltype(c);
    using V = Vec<C>;
    over_spans(threads, [&](int64_t, const Tile& span) {
      const Segment& segment = shared().segments[span.segment];
      const int64_t first = segment.offset + span.begin, n = span.end - span.begin;
      C* const total = static_cast<C*>(kept.total) + first;
      for (int32_t t = 0; t < shared().rows; ++t) {
        const C* theta = work_theta<C>() + first + t * shared().stride;
        C *old_theta = static_cast<C*>(kept.theta) + first + t * kept.stride, *old_g = static_cast<C*>(kept.gradient) + first + t * kept.stride;
        const S* g = static_cast<const S*>(gradients[segment.first + t]);
        const V weight(weights.empty() ? C(0) : C(weights[t])), change(weights.empty() ? C(0) : C(-weights[t] * changes[t])), factor{C(scale)};
        for (int64_t i = 0; i < n; i += V::size) {
          const V now = load(theta + i);
          if (!weights.empty()) store(total + i, load(total + i) + (weight * (load(old_theta + i) - now) + change * load(old_g + i)));
          if (!keeps) continue;
          store(old_theta + i, now);
          store(old_g + i, g ? factor * load_gradient<C>(g + span.begin, i, n) : V(C(0)));
        }
      }
    });
  });
}

}  // namespace cts
