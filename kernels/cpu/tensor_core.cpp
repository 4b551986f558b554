// The model of one tensor-core step (R1): what matrix_step is on the CPU. Integers only, so one build serves every CPU.
//
// Terms (the products and c) are aligned to the largest exponent, cut below `fraction` bits toward zero, added exactly,
// and the sum is cut toward zero to `result` bits. A product's exponent is the sum of its factors', not normalised.
// Source: the model of PyPI mmasim for Hopper and Blackwell, which the tests compare with.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "host.h"

namespace zerokl {
namespace {

// A number as significand 2^(exponent - bits): `bits` of fraction, subnormals at the smallest exponent.
struct Number {
  int64_t significand;
  int exponent;
  bool infinite = false, nan = false;
};

template <int kBits, int kExponentBits>
Number unpack(uint32_t code) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  const int biased = int(code >> kBits) & ((1 << kExponentBits) - 1);
  const int64_t fraction = code & ((1u << kBits) - 1);
  const int64_t size = biased ? fraction | int64_t(1) << kBits : fraction;
  const bool negative = code >> (kBits + kExponentBits) & 1;
  return {negative ? -size : size, std::max(biased, 1) - kBias};
}

template <int kBits, int kExponentBits>
Number unpack_ieee(uint32_t code) {
  Number n = unpack<kBits, kExponentBits>(code);
  const bool top = ((code >> kBits) & ((1u << kExponentBits) - 1)) == (1u << kExponentBits) - 1;
  n.infinite = top && !(code & ((1u << kBits) - 1));
  n.nan = top && !n.infinite;
  return n;
}

struct Bf16 {
  using Code = uint16_t;
  static constexpr int kBits = 7;
  static Number read(Code code) { return unpack_ieee<kBits, 8>(code); }
};

struct E4m3 {
  using Code = uint8_t;
  static constexpr int kBits = 3;
  static Number read(Code code) {
    Number n = unpack<kBits, 4>(code);
    n.nan = (code & 0x7f) == 0x7f;
    return n;
  }
};

int64_t shifted_toward_zero(int64_t value, int left) {
  if (left >= 0) return value * (int64_t(1) << left);
  return left <= -63 ? 0 : value / (int64_t(1) << -left);
}

// value 2^scale, cut toward zero to `bits` of fraction; Inf past fp32's range
float pack(int64_t value, int scale, int bits) {
  if (!value) return 0.0f;
  const uint64_t size = uint64_t(value < 0 ? -value : value);
  const int exponent = std::max(int(std::bit_width(size)) - 1 + scale, -126);
  const int64_t kept = shifted_toward_zero(value, scale - (exponent - bits));
  return float(std::ldexp(double(kept), exponent - bits));
}

constexpr int kMaxDepth = 32, kFp32Bits = 23;

struct Special {
  bool nan = false, plus = false, minus = false;
  void infinity(bool negative) { (negative ? minus : plus) = true; }
  bool any() const { return nan || plus || minus; }
  float value() const {
    if (nan || (plus && minus)) return std::bit_cast<float>(0x7fffffffu);
    return plus ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity();
  }
};

template <class Element>
float dot(int64_t depth, const typename Element::Code* a, const typename Element::Code* b, float start, int fraction, int result) {
  int64_t product[kMaxDepth];
  int exponent[kMaxDepth];
  Special special;
  const Number c = unpack_ieee<kFp32Bits, 8>(std::bit_cast<uint32_t>(start));
  special.nan = c.nan;
  if (c.infinite) special.infinity(c.significand < 0);
  const int c_exponent = c.significand ? c.exponent : kMatrixStepZero;
  int largest = c_exponent;
  for (int64_t k = 0; k < depth; k++) {
    const Number x = Element::read(a[k]), y = Element::read(b[k]);
    product[k] = x.significand * y.significand;
    exponent[k] = product[k] ? x.exponent + y.exponent : kMatrixStepZero;
    largest = std::max(largest, exponent[k]);
    special.nan |= x.nan || y.nan || ((x.infinite || y.infinite) && !product[k]);
    if (x.infinite || y.infinite) special.infinity(product[k] < 0);
  }
  if (special.any()) return special.value();
  int64_t sum = shifted_toward_zero(c.significand, fraction + c_exponent - largest - kFp32Bits);
  for (int64_t k = 0; k < depth; k++) sum += shifted_toward_zero(product[k], fraction + exponent[k] - largest - 2 * Element::kBits);
  return pack(sum, largest - fraction, result);
}

template <class Element>
void steps(const Tensor& a, const Tensor& b, const Tensor& c, int fraction, int result, const Tensor& d) {
  using Code = typename Element::Code;
  const int64_t rows = a.size(1), columns = b.size(1), depth = a.size(2);
  const Code *left = data<Code>(a), *right = data<Code>(b);
  const float* start = data<float>(c);
  float* out = data<float>(d);
  parallel_for(a.size(0), [&](int64_t tile) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) {
        const int64_t at = (tile * rows + i) * columns + j;
        out[at] = dot<Element>(depth, left + (tile * rows + i) * depth, right + (tile * columns + j) * depth, start[at], fraction, result);
      }
  });
}

// a [tiles, rows, depth], b [tiles, columns, depth], c and d [tiles, rows, columns]; e4m3 travels as bytes
void op_matrix_step(const Tensor a, const Tensor b, const Tensor c, int64_t /*instruction*/, int64_t fraction, int64_t result, const Tensor d) {
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(2) && a.size(2) <= kMaxDepth,
                  "zerokl::matrix_step: a and b disagree");
  STD_TORCH_CHECK(c.numel() == a.size(0) * a.size(1) * b.size(1) && d.numel() == c.numel(), "zerokl::matrix_step: c or d has the wrong size");
  (is_bf16(a) ? steps<Bf16> : steps<E4m3>)(a, b, c, int(fraction), int(result), d);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zerokl, m) {
  m.def("matrix_step(Tensor a, Tensor b, Tensor c, int instruction, int fraction, int result, Tensor(a!) d) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(zerokl, CPU, m) { m.impl("matrix_step", TORCH_BOX(&op_matrix_step)); }

}  // namespace zerokl
