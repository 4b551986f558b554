// Log-probabilities of one row of logits (R6) and the argmax that samples from it.
#include "kernels.h"
#include "parallel.h"

namespace zerokl::ZEROKL_ISA {

void fp32_gemm(int64_t m, int64_t n, int64_t k, const uint16_t* x, const uint16_t* w, float* y) {
  linear(m, n, k, x, w, nullptr, y, false, 1);
}

void row_scale(int64_t vocab, const float* z, float temperature, float* out) {
  for (int64_t i = 0; i < vocab; i += W) {
    int valid = vocab - i < W ? int(vocab - i) : W;
    store_n(out + i, load_n(z + i, valid, 0.0f) / set1(temperature), valid);
  }
}

// Of one vocabulary segment: the exact maximum, sum of e = exp(z - maximum) by R3, and, if asked for, the moment sum of e (z - maximum).
// A segment without a finite maximum counts nothing.
void row_sum(int64_t vocab, const float* z, float* maximum, float* sum, float* moment) {
  vf top = set1(-__builtin_inff());
  for (int64_t i = 0; i < vocab; i += W) top = max(load_n(z + i, vocab - i < W ? int(vocab - i) : W, -__builtin_inff()), top);
  float m = top[0];
  for (int i = 1; i < W; i++) m = top[i] > m ? top[i] : m;
  *maximum = m;
  *sum = 0.0f;
  if (moment) *moment = 0.0f;
  if (m == -__builtin_inff()) {
    // all dropped, or NaN among them: NaN must surface
    for (int64_t i = 0; i < vocab; i++)
      if (z[i] != z[i]) *sum = z[i];
    return;
  }
  Lanes e, d;
  over_lanes(vocab, e, [&](int64_t i, vf& lane, int valid) {
    lane = keep(lane, lane + exp2((load_n(z + i, valid, 0.0f) - set1(m)) * set1(kLog2e)), valid);
  });
  *sum = fold(e);
  if (!moment) return;
  over_lanes(vocab, d, [&](int64_t i, vf& lane, int valid) {
    vf x = load_n(z + i, valid, 0.0f) - set1(m), w = exp2(x * set1(kLog2e));
    lane = keep(lane, w > vf{} ? fma(w, x, lane) : lane, valid);
  });
  *moment = fold(d);
}

// Balanced tree over `count` (a power of two) segments; the result lands in the first.
// (m, s) + (m', s') = (M, s e(m - M) + s' e(m' - M)), M the larger; moments shift with their maximum.
void merge_sums(int count, float* maximum, float* sum, float* moment) {
  for (int step = 1; step < count; step *= 2)
    for (int g = 0; g + step < count; g += 2 * step) {
      float m1 = maximum[g], m2 = maximum[g + step], m = m2 > m1 ? m2 : m1;
      float d1 = m1 - m, d2 = m2 - m;
      // a side that holds nothing adds nothing (and -inf - -inf would be NaN)
      float e1 = m1 == -__builtin_inff() ? 0.0f : exp2_1(d1 * kLog2e), e2 = m2 == -__builtin_inff() ? 0.0f : exp2_1(d2 * kLog2e);
      float a1 = e1 == 0.0f ? 0.0f : e1 * fma1(sum[g], d1, moment[g]);
      float a2 = e2 == 0.0f ? 0.0f : e2 * fma1(sum[g + step], d2, moment[g + step]);
      bool nan = sum[g] != sum[g] || sum[g + step] != sum[g + step];
      maximum[g] = m;
      sum[g] = nan ? __builtin_nanf("") : sum[g] * e1 + sum[g + step] * e2;
      moment[g] = a1 + a2;
    }
}

// log p = (z - m) - ln(sum)
float selected(float z, float maximum, float sum) { return (z - maximum) - log2_1(sum) * kLn2; }

// H = ln(sum) - moment / sum
float entropy(float sum, float moment) { return log2_1(sum) * kLn2 - moment / sum; }

// e = exp(z - maximum)
void row_weights(int64_t vocab, const float* z, float maximum, float* e) {
  for (int64_t i = 0; i < vocab; i += W) {
    int valid = vocab - i < W ? int(vocab - i) : W;
    store_n(e + i, exp2((load_n(z + i, valid, 0.0f) - set1(maximum)) * set1(kLog2e)), valid);
  }
}

// Drops (to -inf) what lies behind the cut in the order (z descending, index ascending). z starts at column `first`.
void row_keep(int64_t vocab, float* z, int64_t first, float cut, int64_t cut_index) {
  vi lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  const vi last = set1i(int32_t(cut_index - first));  // below a vocabulary's size in magnitude
  for (int64_t i = 0; i < vocab; i += W) {
    int valid = vocab - i < W ? int(vocab - i) : W;
    vf x = load_n(z + i, valid, 0.0f);
    vi behind = (x < set1(cut)) | ((x == set1(cut)) & (lane + int32_t(i) > last));
    store_n(z + i, behind ? set1(-__builtin_inff()) : x, valid);
  }
}

// d logits = grad (1[target] - p) / temperature, p = exp(z - maximum) / sum, of z after temperature; one RNE to bf16.
void row_grad(int64_t vocab, float* z, int64_t first, float maximum, float sum, int64_t target, float grad, float temperature,
              float cut, int64_t cut_index, uint16_t* out) {
  if (cut > -__builtin_inff()) row_keep(vocab, z, first, cut, cut_index);
  for (int64_t i = 0; i < vocab; i += W) {
    int valid = vocab - i < W ? int(vocab - i) : W;
    vf p = exp2((load_n(z + i, valid, 0.0f) - set1(maximum)) * set1(kLog2e)) / set1(sum);
    vf hit = {};
    if (target - first >= i && target - first < i + W) hit[int(target - first - i)] = 1.0f;
    store_bf16_n(out + i, (set1(grad) * (hit - p)) / set1(temperature), valid);
  }
}

// The first index of the largest value; NaN never wins.
template <class Key>
ZK_INLINE int64_t argmax_of(int64_t vocab, Key key) {
  vf best = set1(-__builtin_inff());
  vi where = {}, lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  for (int64_t i = 0; i < vocab; i += W) {
    vf x = key(i, vocab - i < W ? int(vocab - i) : W);
    vi better = x > best;
    best = better ? x : best;
    where = better ? lane + int32_t(i) : where;
  }
  int64_t index = where[0];
  float value = best[0];
  for (int i = 1; i < W; i++)
    if (best[i] > value || (best[i] == value && where[i] < index)) value = best[i], index = where[i];
  return index;
}

int64_t argmax(int64_t vocab, const float* z) {
  return argmax_of(vocab, [&](int64_t i, int valid) { return load_n(z + i, valid, -__builtin_inff()); });
}

// An integer hash with full avalanche ("lowbias32", Wellons, public domain).
template <class U>
ZK_INLINE U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Gumbel-max (Gumbel, 1954): argmax of z + g, g = -ln(-log2 u), u = (hash(seed, position, index) >> 9 + 1/2) / 2^23.
// The constant between ln and log2 moves every key alike. z = -inf is never chosen.
int64_t gumbel_argmax(int64_t vocab, const float* z, int64_t seed, int64_t position) {
  uint32_t key = mix(uint32_t(seed) ^ 0x9e3779b9u);
  key = mix(key ^ uint32_t(uint64_t(seed) >> 32));
  key = mix(key ^ uint32_t(position));
  key = mix(key ^ uint32_t(uint64_t(position) >> 32));
  vu lane;
  for (int i = 0; i < W; i++) lane[i] = uint32_t(i);
  return argmax_of(vocab, [&](int64_t i, int valid) {
    vu h = mix(mix((lane + uint32_t(i)) * 0x9e3779b9u + key) ^ key) >> 9;
    vf u = (__builtin_convertvector(reinterpret_cast<vi&>(h), vf) + set1(0.5f)) * set1(0x1p-23f);
    return load_n(z + i, valid, -__builtin_inff()) - log2(-log2(u)) * set1(kLn2);
  });
}

void exp2_vector(int64_t n, const float* x, float* y) {
  for (int64_t i = 0; i < n; i += W) {
    int valid = n - i < W ? int(n - i) : W;
    store_n(y + i, exp2(load_n(x + i, valid, 0.0f)), valid);
  }
}
void log2_vector(int64_t n, const float* x, float* y) {
  for (int64_t i = 0; i < n; i += W) {
    int valid = n - i < W ? int(n - i) : W;
    store_n(y + i, log2(load_n(x + i, valid, 0.0f)), valid);
  }
}

}  // namespace zerokl::ZEROKL_ISA
