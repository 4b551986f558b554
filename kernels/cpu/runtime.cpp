// Scratch memory and the instruction set in use.
#include <atomic>
#include <cstdlib>
#include <new>

#include "host.h"

namespace zerokl {

namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

Isa detect() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

const Isa kBest = detect();
std::atomic<Isa> current{kBest};

}  // namespace

void* scratch(Slot slot, size_t bytes) {
  thread_local Buffer buffers[size_t(Slot::kCount)];
  Buffer& b = buffers[size_t(slot)];
  if (b.size < bytes) {
    std::free(b.data);
    b.size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    b.data = std::aligned_alloc(64, rounded);
    if (!b.data) throw std::bad_alloc();
    b.size = rounded;
  }
  return b.data;
}

Isa isa() { return current.load(std::memory_order_relaxed); }

// For tests: the same kernels on a narrower instruction set. Bits do not change, so this is no numerical setting.
void set_isa(int64_t wanted) {
  STD_TORCH_CHECK(wanted >= 0 && wanted <= int64_t(kBest), "zerokl: this CPU offers instruction sets 0 (scalar) to ", int64_t(kBest));
  current.store(Isa(wanted));
}
int64_t best_isa() { return int64_t(kBest); }

}  // namespace zerokl
