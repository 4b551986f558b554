// The operators that need CUDA C++, registered for CUDA tensors. The schemas are the CPU part's.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "tensor_core.h"

namespace zerokl::cuda {
namespace {

using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int capability_major(int device) {
  int major = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess, "zerokl: no capability of cuda:", device);
  return major;
}

void op_matrix_step(const Tensor a, const Tensor b, const Tensor c, int64_t instruction, int64_t /*fraction*/, int64_t /*result*/, const Tensor d) {
  const auto chosen = MatrixInstruction{instruction};
  const int device = a.get_device_index(), major = capability_major(device);
  STD_TORCH_CHECK(chosen == MatrixInstruction::kMmaBf16 ? major >= 9 : major == 9, "zerokl::matrix_step: cuda:", device, " has capability ", major,
                  ".x; mma needs 9.0 or newer, wgmma 9.0");
  STD_TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && c.is_contiguous() && d.is_contiguous(), "zerokl::matrix_step: a tensor is not contiguous");
  const int64_t rows = chosen == MatrixInstruction::kMmaBf16 ? 16 : 64, columns = 8, row_bytes = 32;
  const int64_t tiles = a.size(0), element = chosen == MatrixInstruction::kWgmmaE4m3 ? 1 : 2;
  STD_TORCH_CHECK(a.numel() * element == tiles * rows * row_bytes && b.numel() * element == tiles * columns * row_bytes && c.numel() == tiles * rows * columns &&
                      d.numel() == c.numel() && tiles <= std::numeric_limits<int32_t>::max(),
                  "zerokl::matrix_step: a tensor has the wrong size");
  if (tiles == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaError_t error = matrix_step(chosen, tiles, a.data_ptr(), b.data_ptr(), static_cast<const float*>(c.data_ptr()),
                                        static_cast<float*>(d.data_ptr()), current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "zerokl::matrix_step: ", cudaGetErrorString(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zerokl, CUDA, m) { m.impl("matrix_step", TORCH_BOX(&op_matrix_step)); }

}  // namespace zerokl::cuda
