#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace zerokl::cuda {

// In the order of contract.MATRIX_STEPS.
enum class MatrixInstruction : int64_t { kMmaBf16 = 0, kWgmmaBf16 = 1, kWgmmaE4m3 = 2 };

// One instruction a tile; a, b, c, d as in zerokl::matrix_step, device memory, contiguous.
cudaError_t matrix_step(MatrixInstruction instruction, int64_t tiles, const void* a, const void* b, const float* c, float* d, cudaStream_t stream);

}  // namespace zerokl::cuda
