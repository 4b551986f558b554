// fp32 chains over ascending pairs of bf16 (R1) and the packing that feeds them: linear layers, q k and dO v.
//
// A pair is two fmas, odd k first, with subnormals flushed: what one VDPBF16PS does. CPUs without that instruction do the
// two fmas on widened operands, with the flush bits of MXCSR set. A step is one word along k: a pair there, half a pair here.
#pragma once

#include "tile.h"

namespace zerokl::ZEROKL_ISA {

#if defined(__AVX512BF16__)
constexpr int kStep = 2;  // a word holds k and k + 1
#else
constexpr int kStep = 1;  // a word holds k widened; pairs lie odd k first
#endif
constexpr int kWords = 2 / kStep;  // steps of a pair

// K zero-padded to whole pairs.
ZK_INLINE int64_t steps_of(int64_t K) { return (K + 1) / 2 * 2 / kStep; }

// Flushes subnormal inputs and results to zero while it lives.
class Flush {
 public:
#if defined(__AVX512BF16__)
  Flush() {}  // VDPBF16PS always does
#elif defined(__x86_64__)
  Flush() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040u); }
  ~Flush() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
#error "the CPU kernels are written for x86-64"
#endif
};

// One step of a chain: acc + the word's products.
ZK_INLINE vf step(vi x, vi b, vf acc) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(b)));
#else
  return fma(as_float(x), as_float(b), acc);
#endif
}

// c[r][kNR] (+)= chains over `steps` words of a[s * a_step + r] and b[s][kNR]
template <int R>
static void chain_rows(int64_t steps, const int32_t* a, int64_t a_step, const int32_t* b, float* c, bool add) {
  vf acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    acc[r][0] = add ? load(c + r * kNR) : vf{};
    acc[r][1] = add ? load(c + r * kNR + W) : vf{};
  }
  for (int64_t s = 0; s < steps; s++) {
    const vi b0 = load_words(b + s * kNR), b1 = load_words(b + s * kNR + W);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const vi x = set1i(a[s * a_step + r]);
      acc[r][0] = step(x, b0, acc[r][0]);
      acc[r][1] = step(x, b1, acc[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    store(c + r * kNR, acc[r][0]);
    store(c + r * kNR + W, acc[r][1]);
  }
}

ZK_INLINE void chains(int rows, int64_t steps, const int32_t* a, int64_t a_step, const int32_t* b, float* c, bool add) {
#define ZK_CASE(R) \
  case R: return chain_rows<R>(steps, a, a_step, b, c, add);
  switch (rows) { ZK_ROWS(ZK_CASE) }
#undef ZK_CASE
}

// Word s of the kWords that hold the pair (k, k + 1), for W neighbours.
ZK_INLINE vi word_of(vi pair, [[maybe_unused]] int s) {
#if defined(__AVX512BF16__)
  return pair;
#else
  return s == 0 ? pair & int32_t(0xffff0000) : pair << 16;
#endif
}

// Writes the pair to out, `width` words a step.
ZK_INLINE void store_pair(vi pair, int32_t* out, int width) {
  for (int s = 0; s < kWords; s++) store_words(out + s * width, word_of(pair, s));
}

// W pairs from k on of a line that is contiguous along k and ends at `end`; zero past it.
ZK_INLINE vi load_pairs(const uint16_t* line, int64_t k, int64_t end) {
  if (end - k >= 2 * W) return load_words(reinterpret_cast<const int32_t*>(line + k));
  uint16_t t[2 * W] = {};
  for (int64_t i = 0; i < end - k; i++) t[i] = line[k + i];
  return load_words(reinterpret_cast<const int32_t*>(t));
}

// Packs `lines` lines over k in [k0, k1), k0 even: out[step][width]. line(i) points to k = 0 of line i, contiguous along k;
// lines past `lines` read as zero. Stores W words at a time: a group narrower than W spills into the next step, written
// after it. coming(), if given, names what to prefetch: called once per W words read.
template <class Line, class Coming = int>
static void pack_lines(Line line, int lines, int64_t k0, int64_t k1, int width, int32_t* out, [[maybe_unused]] Coming coming = 0) {
  for (int group = 0; group < width; group += W) {
    const int n = lines - group < W ? lines - group : W;
    int32_t* to = out + group;
    int64_t k = k0;
    if (n == W)
      for (; k + 2 * W <= k1; k += 2 * W) {
        vi x[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
          const uint16_t* p = line(group + i) + k;
          if constexpr (requires { coming(); }) __builtin_prefetch(coming(), 0, 2);
          x[i] = load_words(reinterpret_cast<const int32_t*>(p));
        }
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store_pair(x[i], to + ((k - k0) / 2 + i) * kWords * width, width);
      }
    for (; k < k1; k += 2 * W) {
      vi x[W];
      for (int i = 0; i < W; i++) x[i] = i < n ? load_pairs(line(group + i), k, k1) : vi{};
      transpose(x);
      const int pairs = k1 - k < 2 * W ? int(k1 - k + 1) / 2 : W;
      for (int i = 0; i < pairs; i++) store_pair(x[i], to + ((k - k0) / 2 + i) * kWords * width, width);
    }
  }
}

}  // namespace zerokl::ZEROKL_ISA
