// One matrix instruction per tile: what matrix_step is on a GPU (R1). The CPU's model of it is cpu/tensor_core.cpp.
//
// bf16 tiles 16 deep and e4m3 tiles 32 deep are the same 32 bytes a row, and their fragments lie alike: thread t of a
// group of four holds bytes 4t .. 4t + 3 and 16 + 4t .. 16 + 4t + 3 of its row (PTX ISA, matrix fragments of mma.m16n8k16
// and wgmma.m64nNk16 and their e4m3 forms). Accumulators: columns 2t and 2t + 1 of rows g and g + 8.
#include <cstdint>

#include "tensor_core.h"

namespace zerokl::cuda {
namespace {

constexpr int kWords = 8, kColumns = 8;  // words a row of a or b has; columns of a tile

struct Fragment {
  uint32_t a[4];
  float d[4];
};

// Rows `first` and `first + 8` of a and c, for this thread of its warp.
__device__ Fragment load(const uint32_t* a, const float* c, int first) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t *low = a + (first + g) * kWords, *high = low + 8 * kWords;
  const float *c_low = c + (first + g) * kColumns + 2 * t, *c_high = c_low + 8 * kColumns;
  return {{low[t], high[t], low[4 + t], high[4 + t]}, {c_low[0], c_low[1], c_high[0], c_high[1]}};
}

__device__ void store(const Fragment& f, float* d, int first) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float *low = d + (first + g) * kColumns + 2 * t, *high = low + 8 * kColumns;
  low[0] = f.d[0], low[1] = f.d[1], high[0] = f.d[2], high[1] = f.d[3];
}

__global__ void __launch_bounds__(32) mma_bf16(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int64_t tile = blockIdx.x;
  Fragment f = load(a + tile * 16 * kWords, c + tile * 16 * kColumns, 0);
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t* column = b + (tile * kColumns + g) * kWords;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(f.d[0]), "+f"(f.d[1]), "+f"(f.d[2]), "+f"(f.d[3])
      : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(column[t]), "r"(column[4 + t]));
  store(f, d + tile * 16 * kColumns, 0);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Start address and the byte distance of the two cores along k, both in units of 16 bytes; no swizzle.
__device__ uint64_t descriptor(const void* shared, int core_bytes) {
  const uint64_t address = __cvta_generic_to_shared(shared);
  return (address & 0x3ffff) >> 4 | uint64_t(core_bytes >> 4) << 16 | uint64_t(2 * core_bytes >> 4) << 32;
}
#endif

template <bool kE4m3>
__global__ void __launch_bounds__(128) wgmma(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // b as two cores of 8 columns x 16 bytes, one behind the other along k
  constexpr int kCore = 8 * 4;
  __shared__ alignas(128) uint32_t shared[2 * kCore];
  const int64_t tile = blockIdx.x;
  if (threadIdx.x < 2 * kCore) {
    const int column = threadIdx.x / kWords, word = threadIdx.x % kWords;
    shared[word / 4 * kCore + column * 4 + word % 4] = b[tile * 2 * kCore + threadIdx.x];
  }
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
  __syncthreads();
  const int first = threadIdx.x / 32 * 16;
  Fragment f = load(a + tile * 64 * kWords, c + tile * 64 * kColumns, first);
  const uint64_t columns = descriptor(shared, kCore * 4);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
  if constexpr (kE4m3) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1;\n"
                 : "+f"(f.d[0]), "+f"(f.d[1]), "+f"(f.d[2]), "+f"(f.d[3])
                 : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "l"(columns));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;\n"
                 : "+f"(f.d[0]), "+f"(f.d[1]), "+f"(f.d[2]), "+f"(f.d[3])
                 : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "l"(columns));
  }
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" ::: "memory");
  store(f, d + tile * 64 * kColumns, first);
#else
  __trap();  // the host refuses other chips
#endif
}

}  // namespace

cudaError_t matrix_step(MatrixInstruction instruction, int64_t tiles, const void* a, const void* b, const float* c, float* d, cudaStream_t stream) {
  const auto* left = static_cast<const uint32_t*>(a);
  const auto* right = static_cast<const uint32_t*>(b);
  const dim3 grid(static_cast<unsigned>(tiles));
  switch (instruction) {
    case MatrixInstruction::kMmaBf16: mma_bf16<<<grid, 32, 0, stream>>>(left, right, c, d); break;
    case MatrixInstruction::kWgmmaBf16: wgmma<false><<<grid, 128, 0, stream>>>(left, right, c, d); break;
    case MatrixInstruction::kWgmmaE4m3: wgmma<true><<<grid, 128, 0, stream>>>(left, right, c, d); break;
  }
  return cudaGetLastError();
}

}  // namespace zerokl::cuda
