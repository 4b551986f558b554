// Rotary position embedding (R7), pairs (i, i + half) or interleaved (2 i, 2 i + 1). Su et al., 2021.
#include "kernels.h"
#include "parallel.h"

namespace zerokl::ZEROKL_ISA {

// n elements that lie kStep apart, the other lanes zero.
template <int kStep>
ZK_INLINE vf load_apart(const uint16_t* p, int n) {
  if constexpr (kStep == 1) return load_bf16_n(p, n);
  uint16_t t[W];
  for (int i = 0; i < W; i++) t[i] = i < n ? p[i * kStep] : uint16_t(0);
  return load_bf16(t);
}
template <int kStep>
ZK_INLINE void store_apart(uint16_t* p, vf x, int n) {
  if constexpr (kStep == 1) return store_bf16_n(p, x, n);
  uint16_t t[W];
  store_bf16(t, x);
  for (int i = 0; i < n; i++) p[i * kStep] = t[i];
}

// Pairs (i kStep, i kStep + partner) of one head: low = fma(a, c, -(b s)), high = fma(b, c, a s).
template <int kStep>
static void turn(int64_t pairs, int64_t partner, const uint16_t* in, const float* cosine, const float* sine, float sign, uint16_t* out) {
  for (int64_t i = 0; i < pairs; i += W) {
    const int n = pairs - i < W ? int(pairs - i) : W;
    const int64_t low = i * kStep, high = low + partner;
    vf a = load_apart<kStep>(in + low, n), b = load_apart<kStep>(in + high, n);
    vf c = load_n(cosine + i, n, 0.0f), s = load_n(sine + i, n, 0.0f) * set1(sign);
    store_apart<kStep>(out + low, fma(a, c, -(b * s)), n);
    store_apart<kStep>(out + high, fma(b, c, a * s), n);
  }
}

// x [tokens, heads, dim] with strides x_row, x_head; y contiguous. table [positions, rotary_dim] holds cos | sin.
// The inverse turns by -angle. Dimensions past rotary_dim pass through.
void rotary(int64_t tokens, int64_t heads, int64_t dim, int64_t rotary_dim, const uint16_t* x, int64_t x_row, int64_t x_head,
            const int64_t* positions, const float* table, bool interleaved, bool inverse, uint16_t* y) {
  const int64_t half = rotary_dim / 2;
  const float sign = inverse ? -1.0f : 1.0f;
  for_rows(tokens, [&](int64_t t) {
    const float *cosine = table + positions[t] * rotary_dim, *sine = cosine + half;
    for (int64_t h = 0; h < heads; h++) {
      const uint16_t* in = x + t * x_row + h * x_head;
      uint16_t* out = y + (t * heads + h) * dim;
      if (interleaved)
        turn<2>(half, 1, in, cosine, sine, sign, out);
      else
        turn<1>(half, half, in, cosine, sine, sign, out);
      memcpy(out + rotary_dim, in + rotary_dim, size_t(dim - rotary_dim) * 2);
    }
  });
}

}  // namespace zerokl::ZEROKL_ISA
