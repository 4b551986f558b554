// RMSNorm (R3, R7), forward and backward. Zhang and Sennrich, 2019.
#include "kernels.h"
#include "parallel.h"

namespace zerokl::ZEROKL_ISA {

// 1 / sqrt(mean(x^2) + eps), every step one IEEE rounding
static float inverse_rms(int64_t n, const uint16_t* x, float eps) {
  Lanes l;
  over_lanes(n, l, [&](int64_t i, vf& lane, int valid) {
    vf v = load_bf16_n(x + i, valid);
    lane = keep(lane, fma(v, v, lane), valid);
  });
  return 1.0f / __builtin_sqrtf(fold(l) / float(n) + eps);
}

// With a residual: sum = RNE(x + residual), and the norm reads the rounded sum.
void rms_norm(int64_t rows, int64_t n, const uint16_t* x, const uint16_t* residual, const uint16_t* w, float eps, uint16_t* y,
              uint16_t* sum) {
  for_rows(rows, [&](int64_t r) {
    const uint16_t* in = x + r * n;
    if (residual) {
      uint16_t* s = sum + r * n;
      for (int64_t i = 0; i < n; i += W) {
        int valid = n - i < W ? int(n - i) : W;
        store_bf16_n(s + i, load_bf16_n(in + i, valid) + load_bf16_n(residual + r * n + i, valid), valid);
      }
      in = s;
    }
    vf scale = set1(inverse_rms(n, in, eps));
    for (int64_t i = 0; i < n; i += W) {
      int valid = n - i < W ? int(n - i) : W;
      store_bf16_n(y + r * n + i, (load_bf16_n(in + i, valid) * scale) * load_bf16_n(w + i, valid), valid);
    }
  });
}

// g = dy w;  dx = g r - x (r^3 sum(g x) / n) (+ dsum);  dw += dy (x r) over ascending rows
void rms_norm_backward(int64_t rows, int64_t n, const uint16_t* x, const uint16_t* w, float eps, const uint16_t* dy,
                       const uint16_t* dsum, uint16_t* dx, float* dw) {
  float* inverse = static_cast<float*>(scratch(Slot::kPackA, size_t(rows) * sizeof(float)));
  for_rows(rows, [&](int64_t r) {
    const uint16_t *in = x + r * n, *g_in = dy + r * n;
    float inv = inverse[r] = inverse_rms(n, in, eps);
    Lanes l;
    over_lanes(n, l, [&](int64_t i, vf& lane, int valid) {
      vf g = load_bf16_n(g_in + i, valid) * load_bf16_n(w + i, valid);
      lane = keep(lane, fma(g, load_bf16_n(in + i, valid), lane), valid);
    });
    vf c = set1(-(((fold(l) * inv) * inv) * inv / float(n)));
    for (int64_t i = 0; i < n; i += W) {
      int valid = n - i < W ? int(n - i) : W;
      vf g = load_bf16_n(g_in + i, valid) * load_bf16_n(w + i, valid);
      vf d = fma(load_bf16_n(in + i, valid), c, g * set1(inv));
      if (dsum) d = d + load_bf16_n(dsum + r * n + i, valid);
      store_bf16_n(dx + r * n + i, d, valid);
    }
  });
  if (!dw) return;
  parallel_for((n + W - 1) / W, [&](int64_t task) {
    int64_t i = task * W;
    int valid = n - i < W ? int(n - i) : W;
    vf sum = load_n(dw + i, valid, 0.0f);
    for (int64_t r = 0; r < rows; r++)
      sum = fma(load_bf16_n(dy + r * n + i, valid), load_bf16_n(x + r * n + i, valid) * set1(inverse[r]), sum);
    store_n(dw + i, sum, valid);
  });
}

}  // namespace zerokl::ZEROKL_ISA
