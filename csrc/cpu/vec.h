// SIMD vectors of the instruction set that this file is compiled for, and the four dtypes in memory.
#pragma once

#include <cstring>
#include <type_traits>

#include "step.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace cts {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline namespace CTS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#elif defined(CTS_PLAIN_VECTOR_BYTES)
constexpr int kVectorBytes = CTS_PLAIN_VECTOR_BYTES;  // emulated: tests of widths that the machine has not
#else
constexpr int kVectorBytes = 16;
#endif

template <class C> struct NativeVector;
template <> struct NativeVector<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <> struct NativeVector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

// kVectorBytes of C (float or double).
template <class C> struct Vec {
  static constexpr int size = kVectorBytes / int(sizeof(C));
  using Native = typename NativeVector<C>::type;
  Native x;

  Vec() = default;
  CTS_HD Vec(Native native) : x(native) {}
  CTS_HD explicit Vec(C value) : x(value - Native{}) {}

  friend CTS_HD Vec operator+(Vec a, Vec b) { return a.x + b.x; }
  friend CTS_HD Vec operator-(Vec a, Vec b) { return a.x - b.x; }
  friend CTS_HD Vec operator*(Vec a, Vec b) { return a.x * b.x; }
  friend CTS_HD Vec operator-(Vec a) { return -a.x; }
};

#if defined(__AVX512F__)
CTS_HD Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a.x, b.x, c.x); }
CTS_HD Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a.x, b.x, c.x); }
#elif defined(__AVX2__)
CTS_HD Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a.x, b.x, c.x); }
CTS_HD Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a.x, b.x, c.x); }
#else
template <class C> CTS_HD Vec<C> fused(Vec<C> a, Vec<C> b, Vec<C> c) {
  Vec<C> result;
  for (int i = 0; i < Vec<C>::size; ++i) result.x[i] = fused(a.x[i], b.x[i], c.x[i]);
  return result;
}
#endif

// Whether no lane is NaN or infinite.
template <class C> CTS_HD bool all_finite(Vec<C> a) {
  auto zero_or_nan = a.x - a.x;
  auto same = zero_or_nan == zero_or_nan;
  bool finite = true;
  for (int i = 0; i < Vec<C>::size; ++i) finite &= same[i] != 0;
  return finite;
}

template <class C> double sum_of(Vec<C> a) {
  double sum = 0;
  for (int i = 0; i < Vec<C>::size; ++i) sum += a.x[i];
  return sum;
}

// +-value in each lane: + where the lane's bit is set, the lowest bit for the first lane.
template <class C> CTS_HD Vec<C> signed_by(uint64_t bits, C value) {
  using Word = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;
  typedef Word Words __attribute__((vector_size(kVectorBytes)));
  constexpr Word sign = Word(1) << (8 * sizeof(Word) - 1);
  Words lanes, value_bits;
  for (int i = 0; i < Vec<C>::size; ++i) lanes[i] = Word(1) << i;
  const Vec<C> same(value);
  memcpy(&value_bits, &same.x, sizeof(value_bits));
  value_bits ^= (Words)((lanes & (Word(bits) - Words{})) == Words{}) & sign;
  Vec<C> result;
  memcpy(&result.x, &value_bits, sizeof(value_bits));
  return result;
}

// Vectors in memory; no alignment is asked for.
template <class C> CTS_HD Vec<C> load(const C* from) {
  Vec<C> result;
  memcpy(&result.x, from, sizeof(result.x));
  return result;
}

template <class C> CTS_HD void store(C* to, Vec<C> value) { memcpy(to, &value.x, sizeof(value.x)); }

typedef uint32_t Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfLanes __attribute__((vector_size(kVectorBytes / 2)));

CTS_HD Lanes load_lanes(const void* from) {
  HalfLanes bits;
  memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, Lanes);
}

CTS_HD void store_lanes(void* to, Lanes value) {
  HalfLanes bits = __builtin_convertvector(value, HalfLanes);
  memcpy(to, &bits, sizeof(bits));
}

CTS_HD Vec<float> load(const BFloat16* from) {
  Lanes bits = load_lanes(from) << 16;
  Vec<float> result;
  memcpy(&result.x, &bits, sizeof(bits));
  return result;
}

CTS_HD void store(BFloat16* to, Vec<float> value) {  // to nearest, ties to even; a NaN stays one
  Lanes bits;
  memcpy(&bits, &value.x, sizeof(bits));
  Lanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Lanes is_nan = (Lanes)((bits & 0x7fffffff) > 0x7f800000);
  store_lanes(to, (is_nan & 0x7fc0) | (~is_nan & rounded));
}

#if defined(__AVX512F__)
CTS_HD Vec<float> load(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
CTS_HD void store(Half* to, Vec<float> value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(value.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
CTS_HD Vec<float> load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
CTS_HD void store(Half* to, Vec<float> value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(value.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// Without hardware conversion: the exponent is shifted by a multiplication, which also normalises subnormals.
CTS_HD Vec<float> load(const Half* from) {
  Lanes half = load_lanes(from), magnitude = (half & 0x7fff) << 13;
  Vec<float> value;
  memcpy(&value.x, &magnitude, sizeof(magnitude));
  value.x *= 0x1p112f;
  Lanes bits;
  memcpy(&bits, &value.x, sizeof(bits));
  Lanes is_special = (Lanes)(magnitude >= 0x0f800000);  // infinity or NaN
  bits |= is_special & 0x7f800000;
  bits |= (half & 0x8000) << 16;
  memcpy(&value.x, &bits, sizeof(bits));
  return value;
}

CTS_HD void store(Half* to, Vec<float> value) {  // to nearest, ties to even
  Lanes bits;
  memcpy(&bits, &value.x, sizeof(bits));
  Lanes sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Normal results: round at bit 13 and move the exponent's bias. Subnormal ones: adding 0.5 leaves 2^-24 as the last
  // bit.
  Lanes normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Vec<float> small;
  memcpy(&small.x, &magnitude, sizeof(magnitude));
  small.x += 0.5f;
  Lanes subnormal;
  memcpy(&subnormal, &small.x, sizeof(subnormal));
  subnormal -= 0x3f000000;
  Lanes is_small = (Lanes)(magnitude < 0x38800000), is_large = (Lanes)(magnitude >= 0x477ff000),
        is_nan = (Lanes)(magnitude > 0x7f800000);
  Lanes result = (is_small & subnormal) | (~is_small & normal);
  result = (is_large & 0x7c00) | (~is_large & result);
  result = (is_nan & 0x7e00) | (~is_nan & result);
  store_lanes(to, sign | result);
}
#endif

// The first n lanes; zeros beyond, and not a byte beyond is read.
template <class C, class S> CTS_HD Vec<C> load_first(const S* from, int64_t n) {
  alignas(64) S lanes[Vec<C>::size] = {};
  memcpy(lanes, from, n * sizeof(S));
  return load(lanes);
}

// What a 16-bit parameter is held in: its float32 master, unless somebody wrote the parameter since the last step.
template <class S> CTS_HD Vec<float> load_master(const float* master, const S* stored) {
  Vec<float> value = load(master), written = load(stored);
  alignas(64) S rounded[Vec<float>::size];
  store(rounded, value);
  auto same = load(rounded).x == written.x;
  return same ? value.x : written.x;
}

}  // namespace CTS_ISA
}  // namespace cts
