// The baseline-compiled side: tensors in, raw pointers out, and the choice of instruction set.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "kernels.h"
#include "runtime.h"
#include "zerokl_contract.h"

namespace zerokl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Isa : int64_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
Isa isa();

// Calls the kernel compiled for this CPU.
#define ZEROKL_CALL(kernel, ...)                                                                                    \
  (::zerokl::isa() == ::zerokl::Isa::kAvx512Bf16 ? ::zerokl::avx512bf16::kernel(__VA_ARGS__)                        \
   : ::zerokl::isa() == ::zerokl::Isa::kAvx512   ? ::zerokl::avx512::kernel(__VA_ARGS__)                            \
   : ::zerokl::isa() == ::zerokl::Isa::kAvx2     ? ::zerokl::avx2::kernel(__VA_ARGS__)                              \
                                                 : ::zerokl::scalar::kernel(__VA_ARGS__))

template <class T>
struct TypeOf;
template <>
struct TypeOf<uint16_t> { static constexpr ScalarType value = ScalarType::BFloat16; };
template <>
struct TypeOf<uint8_t> { static constexpr ScalarType value = ScalarType::Byte; };
template <>
struct TypeOf<float> { static constexpr ScalarType value = ScalarType::Float; };
template <>
struct TypeOf<int64_t> { static constexpr ScalarType value = ScalarType::Long; };
template <>
struct TypeOf<int32_t> { static constexpr ScalarType value = ScalarType::Int; };

// The data of a CPU tensor of the expected type; contiguous unless `strided`.
template <class T>
T* data(const Tensor& t, bool strided = false) {
  STD_TORCH_CHECK(t.is_cpu(), "zerokl: the CPU kernel got a tensor on another device");
  STD_TORCH_CHECK(t.scalar_type() == TypeOf<T>::value, "zerokl: a tensor has an unexpected dtype");
  STD_TORCH_CHECK(strided || t.is_contiguous(), "zerokl: a tensor is not contiguous");
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

inline bool is_bf16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

template <class F>
void parallel_for(int64_t tasks, F f) {
  parallel(tasks, [](int64_t task, void* context) { (*static_cast<F*>(context))(task); }, &f);
}

}  // namespace zerokl
