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

// Element (i, j) at data[i * row + j * col]; one of the strides is 1.
struct Matrix {
  const void* data;
  bool bf16;
  int64_t row, col;
};

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

ZK_INLINE void micro(int rows, int64_t kc, const float* a, int64_t a_step, const float* b, float* c, bool add) {
  switch (rows) {
    case 1: return micro_rows<1>(kc, a, a_step, b, c, add);
    case 2: return micro_rows<2>(kc, a, a_step, b, c, add);
    case 3: return micro_rows<3>(kc, a, a_step, b, c, add);
    case 4: return micro_rows<4>(kc, a, a_step, b, c, add);
#if defined(__AVX2__)
    case 5: return micro_rows<5>(kc, a, a_step, b, c, add);
    case 6: return micro_rows<6>(kc, a, a_step, b, c, add);
#endif
#if defined(__AVX512F__)
    case 7: return micro_rows<7>(kc, a, a_step, b, c, add);
    case 8: return micro_rows<8>(kc, a, a_step, b, c, add);
    case 9: return micro_rows<9>(kc, a, a_step, b, c, add);
    case 10: return micro_rows<10>(kc, a, a_step, b, c, add);
    case 11: return micro_rows<11>(kc, a, a_step, b, c, add);
    case 12: return micro_rows<12>(kc, a, a_step, b, c, add);
#endif
  }
}

ZK_INLINE vf load_any(const Matrix& m, int64_t offset) {
  return m.bf16 ? load_bf16(static_cast<const uint16_t*>(m.data) + offset) : load(static_cast<const float*>(m.data) + offset);
}
ZK_INLINE vf load_any_n(const Matrix& m, int64_t offset, int n) {
  if (n >= W) return load_any(m, offset);
  if (n <= 0) return vf{};
  return m.bf16 ? load_bf16_n(static_cast<const uint16_t*>(m.data) + offset, n)
                : load_n(static_cast<const float*>(m.data) + offset, n, 0.0f);
}

// In-register transpose of W x W words: log2(W) rounds, round s exchanging bit s of row and lane.
template <class V>
ZK_INLINE void transpose(V* x) {
#pragma GCC unroll 4
  for (int s = 1; s < W; s *= 2) {
    vi low, high;
    for (int l = 0; l < W; l++) {
      low[l] = l & s ? W + l - s : l;
      high[l] = l & s ? W + l : l + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & s)) {
        V a = x[i], b = x[i + s];
        x[i] = __builtin_shuffle(a, b, low);
        x[i + s] = __builtin_shuffle(a, b, high);
      }
  }
}

// out[k][width] for k in [0, kc): `lines` lines (rows of A, columns of B or keys), each contiguous along k and starting at
// line(i); those past `lines` read as zero. Writes W words at a time: a group narrower than W spills into the next k,
// which is written after it.
template <class Line>
static void pack_across(bool bf16, Line line, int lines, int64_t kc, int width, float* out) {
  for (int group = 0; group < width; group += W) {
    int n = lines - group < W ? lines - group : W;
    int64_t k = 0;
    if (bf16) {
      // two bf16 to a word: half the words to transpose, then split
      for (; k + 2 * W <= kc; k += 2 * W) {
        vi x[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
          x[i] = i < n ? *reinterpret_cast<const vi_u*>(static_cast<const uint16_t*>(line(group + i)) + k) : vi{};
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
          store(out + (k + 2 * i) * width + group, as_float(x[i] << 16));
          store(out + (k + 2 * i + 1) * width + group, as_float(x[i] & int32_t(0xffff0000)));
        }
      }
    }
    for (; k < kc; k += W) {
      int left = kc - k < W ? int(kc - k) : W;
      vf x[W];
      for (int i = 0; i < W; i++) x[i] = i < n ? load_any_n({line(group + i), bf16, 0, 1}, k, left) : vf{};
      transpose(x);
      for (int i = 0; i < left; i++) store(out + (k + i) * width + group, x[i]);
    }
  }
}

}  // namespace zerokl::ZEROKL_ISA
