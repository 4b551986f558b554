// Quantisers and the linear layers on their codes (CONTRACT.md, Quantisers).
#include "gemm.h"
#include "kernels.h"

namespace zerokl::ZEROKL_ISA {

// Biased exponent of the smallest power of two that is not below x, for finite x >= 0; 0 stands for 2^-127.
ZK_INLINE int ceil_exponent(float x) {
  const int32_t u = bits(set1(x))[0], mantissa = u & 0x7fffff;
  return u < 0x800000 ? mantissa > 0x400000 : (u >> 23) + (mantissa != 0);
}

// 2^(e - 127) for e in 0 ... 255: E8M0, whose 0 is the subnormal 2^-127 and whose 255 is NaN.
ZK_INLINE float power_of_two(int e) { return as_float(set1i(e == 0 ? 0x400000 : e == 255 ? 0x7fc00000 : e << 23))[0]; }

// A block's stored scale and its value. `inverse`, what e4m3 codes are multiplied by, is NaN in a block with NaN or Inf.
struct Scale {
  float value, inverse;
  uint8_t e8m0;
};

// amax: the bits of the block's largest |x|; from 0x7f80 on the block holds Inf or NaN.
ZK_INLINE Scale scale_of(Quantizer quantizer, int amax) {
  const float nan = power_of_two(255);
  if (amax >= 0x7f80) return {nan, nan, 255};
  const float a = from_bf16(uint16_t(amax));
  switch (quantizer) {
    case Quantizer::kFp8:
    case Quantizer::kFp8PowerOfTwo: {
      const float s = (a > kFp8AmaxMin ? a : kFp8AmaxMin) / kE4m3Max;
      if (quantizer == Quantizer::kFp8) return {s, 1.0f / s, 0};
      const int e = ceil_exponent(s);
      return {power_of_two(e), power_of_two(254 - e), 0};
    }
    case Quantizer::kMxRceil:
    case Quantizer::kMxFloor: {
      const int floor = (amax >> 7) - kE4m3MaxExponent, e = quantizer == Quantizer::kMxRceil ? ceil_exponent(a / kE4m3Max) : floor > 0 ? floor : 0;
      return {power_of_two(e), power_of_two(254 - e), uint8_t(e)};
    }
    case Quantizer::kInt4: {
      const float s = a / kInt4Divisor;
      return {round_bf16(s > kInt4ScaleMin ? s : kInt4ScaleMin), 0.0f, 0};
    }
  }
  __builtin_unreachable();
}

ZK_INLINE void store_scale(const ScaleType type, void* scales, int64_t at, const Scale& s) {
  if (type == ScaleType::kFp32) static_cast<float*>(scales)[at] = s.value;
  if (type == ScaleType::kE8m0) static_cast<uint8_t*>(scales)[at] = s.e8m0;
  if (type == ScaleType::kBf16) static_cast<uint16_t*>(scales)[at] = to_bf16(s.value);
}

ZK_INLINE float load_scale(const ScaleType type, const void* scales, int64_t at) {
  if (type == ScaleType::kFp32) return static_cast<const float*>(scales)[at];
  if (type == ScaleType::kE8m0) return power_of_two(static_cast<const uint8_t*>(scales)[at]);
  return from_bf16(static_cast<const uint16_t*>(scales)[at]);
}

// e4m3 of fp32: nearest even, saturating, sign kept, every NaN to 0x7f.
ZK_INLINE vi to_e4m3(vf x) {
  const vi magnitude = bits(x) & 0x7fffffff, sign = (bits(x) >> 24) & 0x80;
  const vf a = min(as_float(magnitude), set1(kE4m3Max));
  // normal: round away 20 mantissa bits, then move the exponent's bias from 127 to 7
  const vi normal = ((bits(a) + 0x7ffff + ((bits(a) >> 20) & 1)) >> 20) - (120 << 3);
  // below 2^-6: an ulp of 2^14 is 2^-9, the spacing of e4m3 subnormals
  const vi subnormal = bits(a + set1(0x1p14f)) - bits(set1(0x1p14f));
  const vi code = (a < set1(0x1p-6f) ? subnormal : normal) | sign;
  return magnitude > 0x7f800000 ? set1i(0x7f) : code;
}

typedef uint8_t vb __attribute__((vector_size(W), may_alias));
typedef vb vb_u __attribute__((aligned(1)));

ZK_INLINE vb load_bytes_n(const uint8_t* p, int n) {
  if (n == W) return *reinterpret_cast<const vb_u*>(p);
  vb t = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return t;
}

// e4m3 codes as bf16, exact; 0x7f and 0xff are NaN. The seven subnormals by cases: there are no 16-bit floats to do it.
ZK_INLINE vh as_bf16(vb code) {
  const vh c = __builtin_convertvector(code, vh), a = c & 0x7f;
  const vh high = (120 << 7) | ((a & 3) << 5), low = a >= 2 ? (119 << 7) | ((a & 1) << 6) : (a & 1) * (118 << 7);
  const vh subnormal = a >= 4 ? high : low, number = a < 8 ? subnormal : (a << 4) + (120 << 7);
  return (a == 0x7f ? vh{} + 0x7fc0 : number) | ((c & 0x80) << 8);
}
ZK_INLINE vf from_e4m3(vb code) {
  uint16_t t[W];
  *reinterpret_cast<vh_u*>(t) = as_bf16(code);
  return load_bf16(t);
}

ZK_INLINE void store_bytes_n(uint8_t* p, vi x, int n) {
  const vb narrow = __builtin_convertvector(x, vb);
  if (n == W) {
    *reinterpret_cast<vb_u*>(p) = narrow;
    return;
  }
  for (int i = 0; i < n; i++) p[i] = narrow[i];
}

ZK_INLINE int shorter(int64_t a, int64_t b) { return int(a < b ? a : b); }

// body(j, n) for W-wide pieces of `columns` columns; n < W only in the last.
template <class Body>
ZK_INLINE void pieces(int columns, Body body) {
  for (int j = 0; j < columns; j += W) body(j, columns - j < W ? columns - j : W);
}

// The bits of the largest magnitude of a block: as integers, so that NaN is above Inf is above every number.
ZK_INLINE int block_amax(const uint16_t* x, int64_t stride, int rows, int columns) {
  vi top = {};
  for (int r = 0; r < rows; r++)
    pieces(columns, [&](int j, int n) {
      const vi a = widen_n(x + r * stride + j, n) & 0x7fff;
      top = a > top ? a : top;
    });
  int amax = 0;
  for (int i = 0; i < W; i++) amax = top[i] > amax ? top[i] : amax;
  return amax;
}

// A byte holds two neighbours: the lanes of a 64-bit word.
typedef uint64_t vq __attribute__((vector_size(4 * W), may_alias));
typedef uint8_t vb_half __attribute__((vector_size(W / 2), may_alias));
typedef vb_half vb_half_u __attribute__((aligned(1)));

// Eight nibbles a word, the first lowest. Codes are x / scale to the nearest even integer, in [-8, 7], stored plus 8; NaN,
// which only a NaN scale brings, becomes 0.
ZK_INLINE void pack_int4(const uint16_t* x, int columns, float scale, uint8_t* codes) {
  const vf s = set1(scale);
  for (int j = 0; j < columns; j += W) {
    const vf q = round_even(load_bf16(x + j) / s), clamped = max(min(q, set1(7.0f)), set1(-8.0f));
    const vi nibble = __builtin_convertvector(q == q ? clamped : vf{}, vi) + 8;
    const vq pair = reinterpret_cast<const vq&>(nibble);
    *reinterpret_cast<vb_half_u*>(codes + j / 2) = __builtin_convertvector(pair | (pair >> 28), vb_half);
  }
}

ZK_INLINE vf unpack_int4(const uint8_t* codes, int j) {
  const vq byte = __builtin_convertvector(*reinterpret_cast<const vb_half_u*>(codes + j / 2), vq), pair = (byte & 15) | (byte >> 4 << 32);
  return __builtin_convertvector(reinterpret_cast<const vi&>(pair) - 8, vf);
}

void quantize(const Format& f, int64_t count, const Stripe* stripes) {
  parallel_for(count, [&](int64_t task) {
    const Stripe& s = stripes[task];
    const int64_t blocks = (s.k + f.columns - 1) / f.columns;
    for (int64_t row = 0; row < s.rows; row += f.rows) {
      const int rows = shorter(f.rows, s.rows - row);
      for (int64_t b = 0; b < blocks; b++) {
        const int columns = shorter(f.columns, s.k - b * f.columns);
        const uint16_t* x = s.x + row * s.k + b * f.columns;
        const Scale scale = scale_of(f.quantizer, block_amax(x, s.k, rows, columns));
        store_scale(f.scale, s.scales, row / f.rows * blocks + b, scale);
        if (f.quantizer == Quantizer::kInt4) {
          pack_int4(x, columns, scale.value, s.codes + (row * s.k + b * f.columns) / 2);
          continue;
        }
        const vf inverse = set1(scale.inverse);
        for (int r = 0; r < rows; r++)
          pieces(columns, [&](int j, int n) {
            store_bytes_n(s.codes + (row + r) * s.k + b * f.columns + j, to_e4m3(load_bf16_n(x + r * s.k + j, n) * inverse), n);
          });
      }
    }
  });
}

void dequantize(const Format& f, int64_t count, const Stripe* stripes) {
  parallel_for(count, [&](int64_t task) {
    const Stripe& s = stripes[task];
    const int64_t blocks = (s.k + f.columns - 1) / f.columns;
    for (int64_t row = 0; row < s.rows; row++)
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = row * s.k + b * f.columns;
        const vf scale = set1(load_scale(f.scale, s.scales, row / f.rows * blocks + b));
        pieces(shorter(f.columns, s.k - b * f.columns), [&](int j, int n) {
          const vf code = f.quantizer == Quantizer::kInt4 ? unpack_int4(s.codes + at / 2, j) : from_e4m3(load_bytes_n(s.codes + at + j, n));
          store_bf16_n(s.x + at + j, code * scale, n);
        });
      }
  });
}

void cast_e4m3(int64_t n, const float* x, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += W) store_bytes_n(codes + i, to_e4m3(load_n(x + i, shorter(W, n - i), 0.0f)), shorter(W, n - i));
}

static void widen_codes(const uint8_t* codes, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += W) {
    const vh x = as_bf16(load_bytes_n(codes + i, shorter(W, n - i)));
    if (n - i >= W)
      *reinterpret_cast<vh_u*>(out + i) = x;
    else
      for (int64_t j = i; j < n; j++) out[j] = x[j - i];
  }
}

// acc[r][j] += (sa(r) sb[j]) partial[r][j], each of the three operations rounded
template <class ScaleOf>
ZK_INLINE void promote(int rows, ScaleOf sa, const float* sb, const float* partial, float* acc) {
  for (int r = 0; r < rows; r++) {
    const vf a = set1(sa(r));
    for (int v = 0; v < kNR; v += W)
      store(acc + r * kNR + v, load(acc + r * kNR + v) + (a * load(sb + v)) * load(partial + r * kNR + v));
  }
}

// y[m, n] of codes x[m, k], w[n, k]: per block of k one R1 chain over the codes, promoted in ascending order. The flush of
// R1 is not asked for: sums of e4m3 products are multiples of 2^-18, so nothing subnormal occurs.
void scaled_linear(const ScaledLinear& s) {
  const int64_t blocks = (s.k + s.block - 1) / s.block, most = 16 * kMR;
  for (int64_t first = 0; first < s.m; first += most) {
    const int64_t rows = shorter(most, s.m - first);
    uint16_t* widened = static_cast<uint16_t*>(scratch(Slot::kWiden, size_t(rows * s.k) * sizeof(uint16_t)));
    parallel_for(rows, [&](int64_t r) { widen_codes(s.x + (first + r) * s.k, s.k, widened + r * s.k); });
    const Chunk chunk = pack_chunk({widened, s.k, 1}, 0, rows, s.k);
    parallel_for((s.n + kNR - 1) / kNR, [&](int64_t panel) {
      const int64_t j = panel * kNR, size = chunk.tiles * kMR * kNR;
      const int columns = shorter(kNR, s.n - j);
      const int64_t w_scale = j / s.w_rows * blocks, w_step = s.w_rows == 1 ? blocks : 0;  // a panel lies within 128 rows
      float* acc = static_cast<float*>(scratch(Slot::kTile, size_t(2 * size) * sizeof(float)));
      float* partial = acc + size;
      int32_t* packed = static_cast<int32_t*>(scratch(Slot::kPackB, size_t(steps_of(s.block) * kNR + W) * sizeof(int32_t)));
      uint16_t wide[kNR * kFp8Block];
      memset(acc, 0, size_t(size) * sizeof(float));
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t k = b * s.block, depth = shorter(s.block, s.k - k);
        float sb[kNR] = {};
        for (int c = 0; c < columns; c++) {
          sb[c] = load_scale(s.scale, s.w_scales, w_scale + c * w_step + b);
          widen_codes(s.w + (j + c) * s.k + k, depth, wide + c * kFp8Block);
        }
        pack_lines([&](int c) { return wide + c * kFp8Block; }, columns, 0, depth, kNR, packed);
        for (int64_t t = 0; t < chunk.tiles; t++) {
          chains(chunk.rows_of(t), steps_of(depth), chunk.at(t, k / kStep), chunk.width, packed, partial + t * kMR * kNR, false);
          auto sa = [&](int r) { return load_scale(s.scale, s.x_scales, (first + t * kMR + r) * blocks + b); };
          promote(chunk.rows_of(t), sa, sb, partial + t * kMR * kNR, acc + t * kMR * kNR);
        }
      }
      for (int64_t t = 0; t < chunk.tiles; t++)
        store_tile({s.y, s.y_bf16, s.n, s.bias, false}, first + t * kMR, chunk.rows_of(t), j, columns, acc + t * kMR * kNR);
    });
  }
}

}  // namespace zerokl::ZEROKL_ISA
