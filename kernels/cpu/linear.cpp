// Linear layers, forward and backward (R1, R2, R9), and the embedding.
#include "gemm.h"
#include "kernels.h"

namespace zerokl::ZEROKL_ISA {

void linear(int64_t m, int64_t n, int64_t k, const uint16_t* x, const uint16_t* w, const float* bias, void* y, bool y_bf16, int segments) {
  gemm(m, n, k, {x, k, 1}, {w, 1, k}, {y, y_bf16, n, bias, false}, segments);
}

// *sum = the words of w, n of them, combined by exclusive or. On the same threads, in the same order and as often as
// `linear` reads a weight, with nothing else to do: what the benchmark holds it to.
void read(int64_t n, const int32_t* w, int32_t* sum) {
  constexpr int64_t kWordsPerItem = 1 << 13, kAhead = 1 << 11;  // hardware prefetchers stop at the end of a page
  *sum = 0;
  for_parts((n + kWordsPerItem - 1) / kWordsPerItem, [&](int64_t item) {
    const int64_t end = (item + 1) * kWordsPerItem < n ? (item + 1) * kWordsPerItem : n;
    vi vector[4] = {};
    int64_t i = item * kWordsPerItem;
    for (; i + 4 * W <= end; i += 4 * W)
      for (int v = 0; v < 4; v++) {
        __builtin_prefetch(w + i + v * W + kAhead, 0, 2);
        vector[v] ^= load_words(w + i + v * W);
      }
    const vi folded = vector[0] ^ vector[1] ^ vector[2] ^ vector[3];
    int32_t word = 0;
    for (int lane = 0; lane < W; lane++) word ^= folded[lane];
    for (; i < end; i++) word ^= w[i];
    __atomic_fetch_xor(sum, word, __ATOMIC_RELAXED);
  });
}

// dx[m, k] = dy[m, n] w[n, k], chain over ascending n
void linear_dx(int64_t m, int64_t n, int64_t k, const uint16_t* dy, const uint16_t* w, void* dx, bool dx_bf16, bool add) {
  gemm(m, k, n, {dy, n, 1}, {w, k, 1}, {dx, dx_bf16, k, nullptr, add});
}

// dw[n, k] += dy[m, n]^T x[m, k], the chain continuing from dw over ascending tokens m
void linear_dw(int64_t m, int64_t n, int64_t k, const uint16_t* dy, const uint16_t* x, float* dw) {
  gemm(n, k, m, {dy, 1, n}, {x, k, 1}, {dw, false, k, nullptr, true});
}

// db[n] += sum over ascending tokens of dy[m, n]
void bias_grad(int64_t m, int64_t n, const uint16_t* dy, float* db) {
  parallel_for((n + W - 1) / W, [&](int64_t task) {
    int64_t j = task * W;
    int valid = n - j < W ? int(n - j) : W;
    vf sum = load_n(db + j, valid, 0.0f);
    for (int64_t i = 0; i < m; i++) sum = sum + load_bf16_n(dy + i * n + j, valid);
    store_n(db + j, sum, valid);
  });
}

void embedding(int64_t tokens, int64_t h, const int64_t* ids, const uint16_t* w, uint16_t* y) {
  for (int64_t t = 0; t < tokens; t++) memcpy(y + t * h, w + ids[t] * h, size_t(h) * 2);
}

// dw[id] += dy[t] over ascending tokens; tasks own column blocks, so the order per element is the token order.
void embedding_dw(int64_t tokens, int64_t h, const int64_t* ids, const uint16_t* dy, float* dw) {
  constexpr int64_t kColumns = 128;
  parallel_for((h + kColumns - 1) / kColumns, [&](int64_t task) {
    int64_t end = (task + 1) * kColumns < h ? (task + 1) * kColumns : h;
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t j = task * kColumns; j < end; j += W) {
        int valid = end - j < W ? int(end - j) : W;
        float* p = dw + ids[t] * h + j;
        store_n(p, load_n(p, valid, 0.0f) + load_bf16_n(dy + t * h + j, valid), valid);
      }
  });
}

}  // namespace zerokl::ZEROKL_ISA
