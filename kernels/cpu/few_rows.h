// Chains of few rows (decoding). Reading the weight is what they cost, so it is transposed in registers and multiplied
// there. Packing it through memory pays where many rows share it; here it would take longer than the reads.
#pragma once

#include "pairs.h"

namespace zerokl::ZEROKL_ISA {

constexpr int kFewRows = 4;

// acc[g][r] continues over the first `pairs` of the pairs x[g], each of W outputs; a[step][R] is packed.
template <int R>
ZK_INLINE void pair_steps(const int32_t* a, int pairs, const vi (*x)[W], vf (*acc)[R]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (i >= pairs) return;
#pragma GCC unroll 2
    for (int s = 0; s < kWords; s++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const vi word = set1i(a[(i * kWords + s) * R + r]);
        acc[0][r] = step(word, word_of(x[0][i], s), acc[0][r]);
        acc[1][r] = step(word, word_of(x[1][i], s), acc[1][r]);
      }
  }
}

// c[r][kNR] (+)= chains over k in [k0, k1), k0 even, of R packed rows a[step][R] and kNR lines, contiguous along k. Both
// vectors of outputs are transposed first: then twice as many chains run beside each other, and a word of `a` serves two.
// coming() names what to prefetch, once per W words read.
template <int R, class Line, class Coming>
static void few_rows(Line line, int64_t k0, int64_t k1, const int32_t* a, float* c, bool add, Coming coming) {
  vf acc[2][R];
  const uint16_t* lines[kNR];
  for (int i = 0; i < kNR; i++) lines[i] = line(i);
  for (int g = 0; g < 2; g++)
    for (int r = 0; r < R; r++) acc[g][r] = add ? load(c + r * kNR + g * W) : vf{};
  int64_t k = k0;
  for (; k + 2 * W <= k1; k += 2 * W, a += W * kWords * R) {
    vi x[2][W];
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        __builtin_prefetch(coming(), 0, 2);
        x[g][i] = load_words(reinterpret_cast<const int32_t*>(lines[g * W + i] + k));
      }
      transpose(x[g]);
    }
    pair_steps<R>(a, W, x, acc);
  }
  if (k < k1) {
    vi x[2][W];
    for (int g = 0; g < 2; g++) {
      for (int i = 0; i < W; i++) x[g][i] = load_pairs(lines[g * W + i], k, k1);
      transpose(x[g]);
    }
    pair_steps<R>(a, int(k1 - k + 1) / 2, x, acc);
  }
  for (int g = 0; g < 2; g++)
    for (int r = 0; r < R; r++) store(c + r * kNR + g * W, acc[g][r]);
}

template <class Line, class Coming>
static void few_rows(int rows, Line line, int64_t k0, int64_t k1, const int32_t* a, float* c, bool add, Coming coming) {
  switch (rows) {
    case 1: return few_rows<1>(line, k0, k1, a, c, add, coming);
    case 2: return few_rows<2>(line, k0, k1, a, c, add, coming);
    case 3: return few_rows<3>(line, k0, k1, a, c, add, coming);
    default: return few_rows<4>(line, k0, k1, a, c, add, coming);
  }
}

}  // namespace zerokl::ZEROKL_ISA
