// Vectors of W floats with the same bits on AVX-512, AVX2 and baseline x86-64 / any other CPU.
//
// Each kernel file is compiled once per instruction set with ZEROKL_ISA naming the namespace. Nothing here may be an
// inline function with external linkage, nor may these files use std:: templates: the linker would keep one copy of
// them, perhaps the AVX-512 one, for all callers. Everything is therefore static.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "zerokl_contract.h"

namespace zerokl::ZEROKL_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), may_alias));
typedef vf vf_u __attribute__((aligned(4)));
typedef vh vh_u __attribute__((aligned(2)));
typedef vi vi_u __attribute__((aligned(2)));  // words are also read as pairs of bf16, which lie on even addresses

#define ZK_INLINE static inline __attribute__((always_inline))

ZK_INLINE vf set1(float x) { return x - vf{}; }
ZK_INLINE vi set1i(int32_t x) { return x - vi{}; }
ZK_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
ZK_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
ZK_INLINE vi load_words(const int32_t* p) { return *reinterpret_cast<const vi_u*>(p); }
ZK_INLINE void store_words(int32_t* p, vi x) { *reinterpret_cast<vi_u*>(p) = x; }
ZK_INLINE vi bits(vf x) { return reinterpret_cast<vi&>(x); }
ZK_INLINE vf as_float(vi x) { return reinterpret_cast<vf&>(x); }

// One rounding: a * b + c.
ZK_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  vf r;
  for (int i = 0; i < W; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}
ZK_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
ZK_INLINE vf round_even(vf x) { return (x + set1(0x1.8p23f)) - set1(0x1.8p23f); }

// The second operand where the comparison is false, so a NaN in b survives and a NaN in a is dropped.
#if defined(__AVX512F__)  // GCC would compare and blend
ZK_INLINE vf max(vf a, vf b) { return reinterpret_cast<vf>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b))); }
ZK_INLINE vf min(vf a, vf b) { return reinterpret_cast<vf>(_mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b))); }
#else
ZK_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
ZK_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
#endif

// bf16 is the upper half of fp32.
ZK_INLINE vf load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)  // GCC would widen the halves one by one; its unmasked intrinsics trip -Wmaybe-uninitialized
  vi wide = reinterpret_cast<vi>(_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  vi wide = __builtin_convertvector(*reinterpret_cast<const vh_u*>(p), vi);
#endif
  return as_float(wide << 16);
}
ZK_INLINE float from_bf16(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// fp32 to bf16, round to nearest even, subnormals kept, every NaN to 0x7fc0.
ZK_INLINE void store_bf16(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
  // the instruction rounds alike but flushes subnormals and keeps NaN payloads: vectors that hold one take the long way
  constexpr int kQuietNan = 0x01, kSubnormal = 0x20, kSignallingNan = 0x80;
  if (!_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(x), kQuietNan | kSubnormal | kSignallingNan)) [[likely]] {
    const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    memcpy(p, &half, sizeof half);
    return;
  }
#endif
  vu u = reinterpret_cast<vu&>(x);
  u = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vi nan = x != x;
  u = nan ? (vu{} + 0x7fc0u) : u;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(u)));
#else
  *reinterpret_cast<vh_u*>(p) = __builtin_convertvector(u, vh);
#endif
}
ZK_INLINE uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if (x != x) return 0x7fc0;
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
ZK_INLINE float round_bf16(float x) { return from_bf16(to_bf16(x)); }

// The first n lanes; the others read as `fill` (zero for bf16) and are not written.
ZK_INLINE vf load_n(const float* p, int n, float fill) {
  if (n == W) return load(p);
  float t[W];
  for (int i = 0; i < W; i++) t[i] = i < n ? p[i] : fill;
  return load(t);
}
ZK_INLINE vf load_bf16_n(const uint16_t* p, int n) {
  if (n == W) return load_bf16(p);
  uint16_t t[W];
  for (int i = 0; i < W; i++) t[i] = i < n ? p[i] : uint16_t(0);
  return load_bf16(t);
}
// The first n bf16 as words, in the lower halves.
ZK_INLINE vi widen_n(const uint16_t* p, int n) {
  if (n >= W) return __builtin_convertvector(*reinterpret_cast<const vh_u*>(p), vi);
  vi t = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return t;
}
ZK_INLINE void store_n(float* p, vf x, int n) {
  if (n == W) return store(p, x);
  float t[W];
  store(t, x);
  for (int i = 0; i < n; i++) p[i] = t[i];
}
ZK_INLINE void store_bf16_n(uint16_t* p, vf x, int n) {
  if (n == W) return store_bf16(p, x);
  uint16_t t[W];
  store_bf16(t, x);
  for (int i = 0; i < n; i++) p[i] = t[i];
}

// R4: 2^x. 1 exactly at 0, 0 at -inf and below -150, inf above 128, NaN kept, results rounded once even when subnormal.
ZK_INLINE vf exp2(vf x) {
  x = max(set1(-160.0f), x);
  x = min(set1(130.0f), x);
  vf n = round_even(x), f = x - n;
  constexpr int top = int(sizeof(kExp2Poly) / sizeof(float)) - 1;
  vf p = set1(kExp2Poly[top]);
  for (int i = top - 1; i >= 0; i--) p = fma(p, f, set1(kExp2Poly[i]));
  p = fma(p, f, set1(1.0f));
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // 2^n in two exact factors: only the last product rounds
  vi k = __builtin_convertvector(n == n ? n : vf{}, vi), half = k >> 1;
  p = p * as_float((half + 127) << 23);
  return p * as_float((k - half + 127) << 23);
#endif
}

// R4: log2(x). -inf at 0, NaN below 0, subnormals kept.
ZK_INLINE vf log2(vf x) {
  vi tiny = x < set1(0x1p-126f);
  vf y = tiny ? x * set1(0x1p24f) : x;
  vi e = (bits(y) - 0x3f3504f3) >> 23;
  vf m = as_float(bits(y) - (e << 23)), t = m - set1(1.0f);
  constexpr int top = int(sizeof(kLog2Poly) / sizeof(float)) - 1;
  vf q = set1(kLog2Poly[top]);
  for (int i = top - 1; i >= 0; i--) q = fma(q, t, set1(kLog2Poly[i]));
  vf r = fma(t, q, __builtin_convertvector(e + (tiny & -24), vf));
  r = x == set1(0.0f) ? set1(-__builtin_inff()) : r;
  r = x == set1(__builtin_inff()) ? x : r;
  return x >= set1(0.0f) ? r : set1(__builtin_nanf(""));
}
ZK_INLINE float exp2_1(float x) { return exp2(set1(x))[0]; }
ZK_INLINE float log2_1(float x) { return log2(set1(x))[0]; }

// The upper half of the first `n` lanes moved to the lower half.
template <int n>
ZK_INLINE vf upper(vf x) {
  vi from;
  for (int i = 0; i < W; i++) from[i] = (i + n / 2) % W;
  return __builtin_shuffle(x, from);
}
// The halving tree over a vector: sum, or exact maximum.
template <int n = W>
ZK_INLINE float fold_vector(vf x) {
  if constexpr (n == 1)
    return x[0];
  else
    return fold_vector<n / 2>(x + upper<n>(x));
}
template <int n = W>
ZK_INLINE float highest_of(vf x) {
  if constexpr (n == 1)
    return x[0];
  else
    return highest_of<n / 2>(max(x, upper<n>(x)));
}

// R3: the 128 lanes and the halving tree that folds them.
struct Lanes {
  vf lane[kLanes / W];
};
ZK_INLINE float fold(Lanes l) {
#pragma GCC unroll 16
  for (int half = kLanes / W / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; i++) l.lane[i] = l.lane[i] + l.lane[i + half];
  return fold_vector(l.lane[0]);
}

// `next` in the first `valid` lanes, `old` in the rest: a row's order sees only the row's own elements.
ZK_INLINE vf keep(vf old, vf next, int valid) {
  if (valid == W) return next;
  for (int i = 0; i < valid; i++) old[i] = next[i];
  return old;
}

// Calls step(i, lanes-vector &, valid) for W-wide pieces of a row in R3's order; `valid` < W only in the last one.
template <class Step>
ZK_INLINE void over_lanes(int64_t n, Lanes& l, Step step) {
  for (int i = 0; i < kLanes / W; i++) l.lane[i] = vf{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes / W; j++) step(i + j * W, l.lane[j], W);
  for (int j = 0; i < n; i += W, j++) step(i, l.lane[j], n - i < W ? int(n - i) : W);
}

}  // namespace zerokl::ZEROKL_ISA
