// Every kernel, declared once per instruction set. Pointers are to contiguous, row-major data; bf16 travels as uint16.
#pragma once

#include <stdint.h>

namespace zerokl {

struct AttentionShape {
  int64_t heads, kv_heads;
  int64_t dim, v_dim;  // of queries and keys, of values and outputs
  float scale;         // multiplies q.k, fp32
  bool causal;
  int64_t window;      // keys a query may look back to, itself included; 0 = all
  const float* sinks;  // [heads], or none
};

// Where the keys of sequence b lie: position p is row table[b * max_pages + p / page] * page + p % page of the cache.
struct PageTable {
  const int32_t* table;
  int64_t max_pages, page;
};

struct RouterShape {
  int64_t experts, k;
  bool sigmoid;             // else softmax
  int64_t groups, keep_groups, judges;  // only experts of the keep_groups best groups, judged by their best scores' sum
  bool renormalize;
  float scale;
};
constexpr int64_t kMaxGroups = 64;

enum class Quantizer : int64_t { kFp8, kFp8PowerOfTwo, kMxRceil, kMxFloor, kInt4 };
enum class ScaleType { kFp32, kE8m0, kBf16 };

// A quantiser over blocks of rows x columns.
struct Format {
  Quantizer quantizer;
  ScaleType scale;
  int rows, columns;
};

// Whole blocks' rows of a matrix [rows, k]: one task. Codes take a byte an element, int4 half a byte.
struct Stripe {
  uint16_t* x;
  uint8_t* codes;
  void* scales;  // [ceil(rows / Format::rows), ceil(k / Format::columns)]
  int64_t rows, k;
};

// y [m, n] of e4m3 codes x [m, k], w [n, k]; a scale per `block` of k and per row of x, per w_rows (1 or 128) rows of w.
struct ScaledLinear {
  int64_t m, n, k, block, w_rows;
  const uint8_t *x, *w;
  ScaleType scale;  // kFp32 or kE8m0
  const void *x_scales, *w_scales;
  const float* bias;  // [n], or none
  void* y;
  bool y_bf16;
};

}  // namespace zerokl

#define ZEROKL_DECLARE(ISA)                                                                                                     \
  namespace zerokl::ISA {                                                                                                       \
  void linear(int64_t m, int64_t n, int64_t k, const uint16_t* x, const uint16_t* w, const float* bias, void* y, bool y_bf16,   \
              int segments);                                                                                                    \
  void read(int64_t n, const int32_t* w, int32_t* sum);                                                                         \
  void linear_dx(int64_t m, int64_t n, int64_t k, const uint16_t* dy, const uint16_t* w, void* dx, bool dx_bf16, bool add);     \
  void linear_dw(int64_t m, int64_t n, int64_t k, const uint16_t* dy, const uint16_t* x, float* dw);                            \
  void bias_grad(int64_t m, int64_t n, const uint16_t* dy, float* db);                                                          \
  void embedding(int64_t tokens, int64_t h, const int64_t* ids, const uint16_t* w, uint16_t* y);                                \
  void embedding_dw(int64_t tokens, int64_t h, const int64_t* ids, const uint16_t* dy, float* dw);                              \
  void rms_norm(int64_t rows, int64_t n, const uint16_t* x, const uint16_t* residual, const uint16_t* w, float eps, uint16_t* y, \
                uint16_t* sum);                                                                                                 \
  void rms_norm_backward(int64_t rows, int64_t n, const uint16_t* x, const uint16_t* w, float eps, const uint16_t* dy,          \
                         const uint16_t* dsum, uint16_t* dx, float* dw);                                                        \
  void rotary(int64_t tokens, int64_t heads, int64_t dim, int64_t rotary_dim, const uint16_t* x, int64_t x_row,                 \
              int64_t x_head, const int64_t* positions, const float* table, bool interleaved, bool inverse, uint16_t* y);       \
  void silu_and_mul(int64_t rows, int64_t n, const uint16_t* x, const float* row_weight, uint16_t* y);                          \
  void silu_and_mul_backward(int64_t rows, int64_t n, const uint16_t* x, const float* row_weight, const uint16_t* dy,           \
                             uint16_t* dx, float* drow_weight);                                                                 \
  void attention_varlen(const AttentionShape& s, int64_t sequences, const int32_t* cu_seqlens, const uint16_t* q,               \
                        const uint16_t* k, const uint16_t* v, uint16_t* out, float* lse);                                       \
  void attention_paged(const AttentionShape& s, int64_t sequences, const PageTable& pages, const int32_t* seq_lens,             \
                       const int32_t* q_lens, const uint16_t* q, const uint16_t* k_cache, const uint16_t* v_cache,              \
                       uint16_t* out);                                                                                          \
  void attention_backward(const AttentionShape& s, int64_t sequences, const int32_t* cu_seqlens, const uint16_t* q,             \
                          const uint16_t* k, const uint16_t* v, const uint16_t* out, const float* lse, const uint16_t* dout,    \
                          uint16_t* dq, uint16_t* dk, uint16_t* dv, float* dsink_rows, float* dsinks);                          \
  void row_scale(int64_t vocab, const float* z, float temperature, float* out);                                                  \
  void row_sum(int64_t vocab, const float* z, float* maximum, float* sum, float* moment);                                       \
  void merge_sums(int count, float* maximum, float* sum, float* moment);                                                        \
  void row_weights(int64_t vocab, const float* z, float maximum, float* e);                                                     \
  void row_keep(int64_t vocab, float* z, int64_t first, float cut, int64_t cut_index);                                          \
  void row_grad(int64_t vocab, float* z, int64_t first, float maximum, float sum, int64_t target, float grad,                   \
                float temperature, float cut, int64_t cut_index, uint16_t* out);                                                \
  float selected(float z, float maximum, float sum);                                                                            \
  float entropy(float sum, float moment);                                                                                       \
  int64_t argmax(int64_t vocab, const float* z);                                                                                \
  int64_t gumbel_argmax(int64_t vocab, const float* z, int64_t seed, int64_t position);                                         \
  void fp32_gemm(int64_t m, int64_t n, int64_t k, const uint16_t* x, const uint16_t* w, float* y);                              \
  void router_topk(const RouterShape& s, int64_t rows, const float* logits, const float* bias, bool replay, float* weight,       \
                   int64_t* index);                                                                                             \
  void router_topk_backward(const RouterShape& s, int64_t rows, const float* logits, const int64_t* index, const float* dweight, \
                            float* dlogits);                                                                                    \
  void moe_gather(int64_t rows, int64_t n, int64_t slots, const uint16_t* x, const int64_t* source, uint16_t* y);               \
  void moe_combine(int64_t tokens, int64_t n, int64_t slots, const uint16_t* y, const int64_t* position, const float* weight,   \
                   const uint16_t* shared, uint16_t* out);                                                                      \
  void moe_combine_backward(int64_t tokens, int64_t n, int64_t slots, const uint16_t* y, const int64_t* position,               \
                            const float* weight, const uint16_t* dout, uint16_t* dy, float* dweight);                           \
  void grouped_linear(int64_t experts, const int64_t* offsets, int64_t n, int64_t k, const uint16_t* x, const uint16_t* w,      \
                      void* y, bool y_bf16, int segments);                                                                      \
  void grouped_linear_dx(int64_t experts, const int64_t* offsets, int64_t n, int64_t k, const uint16_t* dy, const uint16_t* w,  \
                         uint16_t* dx);                                                                                         \
  void grouped_linear_dw(int64_t experts, const int64_t* offsets, int64_t n, int64_t k, const uint16_t* dy, const uint16_t* x,  \
                         float* dw);                                                                                            \
  void quantize(const Format& f, int64_t count, const Stripe* stripes);                                                         \
  void dequantize(const Format& f, int64_t count, const Stripe* stripes);                                                       \
  void cast_e4m3(int64_t n, const float* x, uint8_t* codes);                                                                    \
  void scaled_linear(const ScaledLinear& s);                                                                                    \
  void log2_vector(int64_t n, const float* x, float* y);                                                                        \
  void exp2_vector(int64_t n, const float* x, float* y);                                                                        \
  }

ZEROKL_DECLARE(scalar)
ZEROKL_DECLARE(avx2)
ZEROKL_DECLARE(avx512)
ZEROKL_DECLARE(avx512bf16)
#undef ZEROKL_DECLARE
