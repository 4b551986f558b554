// SwiGLU, forward and backward (R4, R7). Shazeer, 2020.
#include "kernels.h"
#include "parallel.h"

namespace zerokl::ZEROKL_ISA {

// x [rows, 2 n] holds gate | up; y = (g / (1 + exp(-g))) u, times the row's weight if there is one
void silu_and_mul(int64_t rows, int64_t n, const uint16_t* x, const float* row_weight, uint16_t* y) {
  for_rows(rows, [&](int64_t r) {
    for (int64_t i = 0; i < n; i += W) {
      int valid = n - i < W ? int(n - i) : W;
      vf g = load_bf16_n(x + r * 2 * n + i, valid), u = load_bf16_n(x + r * 2 * n + n + i, valid);
      vf d = set1(1.0f) + exp2(g * set1(-kLog2e)), h = (g / d) * u;
      store_bf16_n(y + r * n + i, row_weight ? h * set1(row_weight[r]) : h, valid);
    }
  });
}

// s = 1 / d;  dg = (dy u) (s fma(g, 1 - s, 1));  du = dy (g / d); with a row weight w, dy w stands for dy and
// dw is the R3 sum of fma(dy, h, lane)
void silu_and_mul_backward(int64_t rows, int64_t n, const uint16_t* x, const float* row_weight, const uint16_t* dy, uint16_t* dx,
                           float* drow_weight) {
  const vf one = set1(1.0f);
  for_rows(rows, [&](int64_t r) {
    Lanes weight_grad;
    over_lanes(n, weight_grad, [&](int64_t i, vf& lane, int valid) {
      vf g = load_bf16_n(x + r * 2 * n + i, valid), u = load_bf16_n(x + r * 2 * n + n + i, valid);
      vf dout = load_bf16_n(dy + r * n + i, valid), d = one + exp2(g * set1(-kLog2e)), s = one / d;
      if (drow_weight) lane = keep(lane, fma(dout, (g / d) * u, lane), valid);
      if (row_weight) dout = dout * set1(row_weight[r]);
      store_bf16_n(dx + r * 2 * n + i, (dout * u) * (s * fma(g, one - s, one)), valid);
      store_bf16_n(dx + r * 2 * n + n + i, dout * (g / d), valid);
    });
    if (drow_weight) drow_weight[r] = fold(weight_grad);
  });
}

}  // namespace zerokl::ZEROKL_ISA
