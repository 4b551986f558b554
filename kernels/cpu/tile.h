// Register tiles: the micro kernel that keeps kMR x kNR fma chains in registers, and the packing that feeds it.
//
// A chain that is cut is stored and reloaded as fp32, which loses nothing.
#pragma once

#include "simd.h"

namespace zerokl::ZEROKL_ISA {

#if defined(__AVX512F__)
constexpr int kMR = 12;  // 24 of 32 registers hold chains
#elif defined(__AVX2__)
constexpr int kMR = 6;  // 12 of 16
#else
constexpr int kMR = 4;
#endif
constexpr int kNR = 2 * W;

// c[r][kNR] += sum over k of a[k * a_step + r * kRow] line(k)[0, n), one fma each; the bf16 lines are widened on the way.
template <int R, int kRow, class Line>
static void micro_rows(int64_t kc, const float* a, int64_t a_step, Line line, int n, float* c) {
  const int n0 = n < W ? n : W, n1 = n - n0 < W ? n - n0 : W;
  vf acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    acc[r][0] = load(c + r * kNR);
    acc[r][1] = load(c + r * kNR + W);
  }
  for (int64_t k = 0; k < kc; k++) {
    const uint16_t* p = line(k);
    vf b0 = load_bf16_n(p, n0), b1 = load_bf16_n(p + n0, n1);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      vf x = set1(a[k * a_step + r * kRow]);
      acc[r][0] = fma(x, b0, acc[r][0]);
      acc[r][1] = fma(x, b1, acc[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    store(c + r * kNR, acc[r][0]);
    store(c + r * kNR + W, acc[r][1]);
  }
}

#if defined(__AVX512F__)
#define ZK_ROWS(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12)
#elif defined(__AVX2__)
#define ZK_ROWS(F) F(1) F(2) F(3) F(4) F(5) F(6)
#else
#define ZK_ROWS(F) F(1) F(2) F(3) F(4)
#endif
template <int kRow, class Line>
ZK_INLINE void micro(int rows, int64_t kc, const float* a, int64_t a_step, Line line, int n, float* c) {
#define ZK_CASE(R) \
  case R: return micro_rows<R, kRow>(kc, a, a_step, line, n, c);
  switch (rows) { ZK_ROWS(ZK_CASE) }
#undef ZK_CASE
}

// In-register transpose of W x W words: log2(W) rounds, round S exchanging bit S of row and lane.
template <int S, class V>
ZK_INLINE void transpose_from(V* x) {
  if constexpr (S < W) {
    constexpr auto lane = [](int l, bool high) { return l & S ? W + l - (high ? 0 : S) : l + (high ? S : 0); };
    vi low = {}, high = {};
#pragma GCC unroll 16
    for (int l = 0; l < W; l++) low[l] = lane(l, false), high[l] = lane(l, true);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & S)) {
        V a = x[i], b = x[i + S];
        x[i] = __builtin_shuffle(a, b, low);
        x[i + S] = __builtin_shuffle(a, b, high);
      }
    transpose_from<2 * S>(x);
  }
}
template <class V>
ZK_INLINE void transpose(V* x) {
  transpose_from<1>(x);
}

}  // namespace zerokl::ZEROKL_ISA
