// Register tiles: the micro kernel that keeps kMR x kNR fma chains in registers, and the packing that feeds it.
//
// Rows are packed kMR side by side, columns kNR side by side, both widened to fp32. A chain that is cut is stored and
// reloaded as fp32, which loses nothing.
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

// c[r][kNR] (+)= sum over k of a[k * a_step + r] b[k][kNR]
template <int R>
static void micro_rows(int64_t kc, const float* a, int64_t a_step, const float* b, float* c, bool add) {
  vf acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    acc[r][0] = add ? load(c + r * kNR) : vf{};
    acc[r][1] = add ? load(c + r * kNR + W) : vf{};
  }
  for (int64_t k = 0; k < kc; k++) {
    vf b0 = load(b + k * kNR), b1 = load(b + k * kNR + W);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      vf x = set1(a[k * a_step + r]);
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
ZK_INLINE void micro(int rows, int64_t kc, const float* a, int64_t a_step, const float* b, float* c, bool add) {
#define ZK_CASE(R) \
  case R: return micro_rows<R>(kc, a, a_step, b, c, add);
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

// out[k][width] for k in [0, kc): `lines` bf16 lines (query rows, keys), widened, each contiguous along k and starting at
// line(i); those past `lines` read as zero. Writes W words at a time: a group narrower than W spills into the next k,
// which is written after it.
template <class Line>
static void pack_across(Line line, int lines, int64_t kc, int width, float* out) {
  for (int group = 0; group < width; group += W) {
    int n = lines - group < W ? lines - group : W;
    int64_t k = 0;
    // two bf16 to a word: half the words to transpose, then split
    for (; k + 2 * W <= kc; k += 2 * W) {
      vi x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) x[i] = i < n ? load_words(reinterpret_cast<const int32_t*>(line(group + i) + k)) : vi{};
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        store(out + (k + 2 * i) * width + group, as_float(x[i] << 16));
        store(out + (k + 2 * i + 1) * width + group, as_float(x[i] & int32_t(0xffff0000)));
      }
    }
    for (; k < kc; k += W) {
      int left = kc - k < W ? int(kc - k) : W;
      vf x[W];
      for (int i = 0; i < W; i++) x[i] = i < n ? load_bf16_n(line(group + i) + k, left) : vf{};
      transpose(x);
      for (int i = 0; i < left; i++) store(out + (k + i) * width + group, x[i]);
    }
  }
}

}  // namespace zerokl::ZEROKL_ISA
