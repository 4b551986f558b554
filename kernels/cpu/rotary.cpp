// Rotary position embedding, half style (R7). Su et al., 2021.
#include "kernels.h"
#include "parallel.h"

namespace zerokl::ZEROKL_ISA {

// x [tokens, heads, dim] with strides x_row, x_head; y contiguous. table [positions, rotary_dim] holds cos | sin.
// y_low = fma(a, c, -(b s)), y_high = fma(b, c, a s); the inverse turns by -angle. Dimensions past rotary_dim pass through.
void rotary(int64_t tokens, int64_t heads, int64_t dim, int64_t rotary_dim, const uint16_t* x, int64_t x_row, int64_t x_head,
            const int64_t* positions, const float* table, bool inverse, uint16_t* y) {
  const int64_t half = rotary_dim / 2;
  const vf sign = set1(inverse ? -1.0f : 1.0f);
  for_rows(tokens, [&](int64_t t) {
    const float *cosine = table + positions[t] * rotary_dim, *sine = cosine + half;
    for (int64_t h = 0; h < heads; h++) {
      const uint16_t* in = x + t * x_row + h * x_head;
      uint16_t* out = y + (t * heads + h) * dim;
      for (int64_t i = 0; i < half; i += W) {
        int n = half - i < W ? int(half - i) : W;
        vf a = load_bf16_n(in + i, n), b = load_bf16_n(in + half + i, n);
        vf c = load_n(cosine + i, n, 0.0f), s = load_n(sine + i, n, 0.0f) * sign;
        store_bf16_n(out + i, fma(a, c, -(b * s)), n);
        store_bf16_n(out + half + i, fma(b, c, a * s), n);
      }
      memcpy(out + rotary_dim, in + rotary_dim, size_t(dim - rotary_dim) * 2);
    }
  });
}

}  // namespace zerokl::ZEROKL_ISA
