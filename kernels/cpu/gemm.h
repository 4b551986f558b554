// C[M, N] = A[M, K] B[K, N] of bf16 matrices: one fp32 chain per output over ascending pairs of k (R1), whatever the
// tiling. Only rows and columns are cut into tasks, never k.
//
// A pair is two fmas, odd k first, with subnormals flushed: what one VDPBF16PS does. CPUs without that instruction do the
// two fmas on widened operands, with the flush bits of MXCSR set. A step is one word along k: a pair there, half a pair here.
#pragma once

#include "parallel.h"
#include "tile.h"

namespace zerokl::ZEROKL_ISA {

#if defined(__AVX512BF16__)
constexpr int kStep = 2;  // a word holds k and k + 1
#else
constexpr int kStep = 1;  // a word holds k widened; pairs lie odd k first
#endif
constexpr int kKC = 128;                  // steps of a panel block: kKC x kNR words stay in L1
constexpr int kAhead = 256;               // bf16 that packing prefetches ahead in each line
constexpr int64_t kChunkBytes = 1 << 19;  // packed rows of A that stay in L2

// bf16 element (i, j) at data[i * row + j * col]; one of the strides is 1.
struct Matrix {
  const uint16_t* data;
  int64_t row, col;
};

// K zero-padded to whole pairs.
ZK_INLINE int64_t steps_of(int64_t K) { return (K + 1) / 2 * 2 / kStep; }

// Flushes subnormal inputs and results to zero while it lives.
class Flush {
 public:
#if defined(__AVX512BF16__)
  Flush() {}  // VDPBF16PS always does
#elif defined(__x86_64__)
  Flush() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040u); }
  ~Flush() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
#error "the CPU kernels are written for x86-64"
#endif
};

// One step of a chain: acc + the word's products.
ZK_INLINE vf step(vi x, vi b, vf acc) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(b)));
#else
  return fma(as_float(x), as_float(b), acc);
#endif
}

// c[r][kNR] (+)= chains over `steps` words of a[s * a_step + r] and b[s][kNR]
template <int R>
static void chain_rows(int64_t steps, const int32_t* a, int64_t a_step, const int32_t* b, float* c, bool add) {
  vf acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    acc[r][0] = add ? load(c + r * kNR) : vf{};
    acc[r][1] = add ? load(c + r * kNR + W) : vf{};
  }
  for (int64_t s = 0; s < steps; s++) {
    const vi b0 = load_words(b + s * kNR), b1 = load_words(b + s * kNR + W);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const vi x = set1i(a[s * a_step + r]);
      acc[r][0] = step(x, b0, acc[r][0]);
      acc[r][1] = step(x, b1, acc[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    store(c + r * kNR, acc[r][0]);
    store(c + r * kNR + W, acc[r][1]);
  }
}

ZK_INLINE void chains(int rows, int64_t steps, const int32_t* a, int64_t a_step, const int32_t* b, float* c, bool add) {
#define ZK_CASE(R) \
  case R: return chain_rows<R>(steps, a, a_step, b, c, add);
  switch (rows) { ZK_ROWS(ZK_CASE) }
#undef ZK_CASE
}

// Writes the pair of words (k, k + 1) that `pair` holds for W neighbours to out, `width` words a step.
ZK_INLINE void store_pair(vi pair, int32_t* out, int width) {
#if defined(__AVX512BF16__)
  (void)width;
  store_words(out, pair);
#else
  store_words(out, pair & int32_t(0xffff0000));
  store_words(out + width, pair << 16);
#endif
}

// W pairs from k on of a line that is contiguous along k and ends at `end`; zero past it.
ZK_INLINE vi load_pairs(const uint16_t* line, int64_t k, int64_t end) {
  if (end - k >= 2 * W) return load_words(reinterpret_cast<const int32_t*>(line + k));
  uint16_t t[2 * W] = {};
  for (int64_t i = 0; i < end - k; i++) t[i] = line[k + i];
  return load_words(reinterpret_cast<const int32_t*>(t));
}

// Packs `lines` neighbours over k in [k0, k1), k0 even: out[step][width]. Line i is row i of A or column i of B; lines past
// `lines` read as zero. Stores W words at a time: a group narrower than W spills into the next step, written after it.
static void pack_lines(const uint16_t* data, int64_t line_stride, int64_t k_stride, int lines, int64_t k0, int64_t k1, int width, int32_t* out) {
  constexpr int kWords = 2 / kStep;  // steps of a pair
  for (int group = 0; group < width; group += W) {
    const int n = lines - group < W ? lines - group : W;
    const uint16_t* first = data + group * line_stride;
    int32_t* to = out + group;
    if (k_stride == 1) {
      int64_t k = k0;
      if (n == W)
        for (; k + 2 * W <= k1; k += 2 * W) {
          vi x[W];
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) {
            const uint16_t* p = first + i * line_stride + k;
            __builtin_prefetch(p + kAhead);
            x[i] = load_words(reinterpret_cast<const int32_t*>(p));
          }
          transpose(x);
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) store_pair(x[i], to + ((k - k0) / 2 + i) * kWords * width, width);
        }
      for (; k < k1; k += 2 * W) {
        vi x[W];
        for (int i = 0; i < W; i++) x[i] = i < n ? load_pairs(first + i * line_stride, k, k1) : vi{};
        transpose(x);
        const int pairs = k1 - k < 2 * W ? int(k1 - k + 1) / 2 : W;
        for (int i = 0; i < pairs; i++) store_pair(x[i], to + ((k - k0) / 2 + i) * kWords * width, width);
      }
    } else {
      for (int64_t k = k0; k < k1; k += 2) {
        const vi even = widen_n(first + k * k_stride, n), odd = k + 1 < k1 ? widen_n(first + (k + 1) * k_stride, n) : vi{};
        store_pair(even | (odd << 16), to + (k - k0) / 2 * kWords * width, width);
      }
    }
  }
}

// Where the chains end: fp32 or bf16 (one RNE) at data[i * row + j], after the optional fp32 bias[j].
// `add` (fp32 only) starts each chain at the value already there.
struct Output {
  void* data;
  bool bf16;
  int64_t row;
  const float* bias;
  bool add;
};

static void load_tile(const Output& c, int64_t i, int rows, int64_t j, int columns, float* tile) {
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < kNR; v += W) {
      const float* p = static_cast<const float*>(c.data) + (i + r) * c.row + j + v;
      const int n = columns - v < W ? (columns - v < 0 ? 0 : columns - v) : W;
      store(tile + r * kNR + v, load_n(p, n, 0.0f));
    }
}

static void store_tile(const Output& c, int64_t i, int rows, int64_t j, int columns, const float* tile) {
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < columns; v += W) {
      const int n = columns - v < W ? columns - v : W;
      vf x = load(tile + r * kNR + v);
      if (c.bias) x = x + load_n(c.bias + j + v, n, 0.0f);
      const int64_t at = (i + r) * c.row + j + v;
      if (c.bf16)
        store_bf16_n(static_cast<uint16_t*>(c.data) + at, x, n);
      else
        store_n(static_cast<float*>(c.data) + at, x, n);
    }
}

// R2: adds `count` (a power of two) tiles of n floats as a balanced binary tree; the sum lands in the first.
static void add_tree(float* tiles, int count, int64_t n) {
  for (int half = 1; half < count; half *= 2)
    for (int g = 0; g + half < count; g += 2 * half)
      for (int64_t i = 0; i < n; i += W) store(tiles + g * n + i, load(tiles + g * n + i) + load(tiles + (g + half) * n + i));
}

// A chunk of rows of A, packed: tile t holds rows [t * kMR, ...), [steps][width] words from data + t * steps * width.
struct Chunk {
  const int32_t* data;
  int64_t rows, tiles, steps;
  int width;

  int rows_of(int64_t t) const { return rows - t * kMR < kMR ? int(rows - t * kMR) : kMR; }
  const int32_t* at(int64_t t, int64_t s) const { return data + (t * steps + s) * width; }
};

static Chunk pack_chunk(const Matrix& a, int64_t first, int64_t rows, int64_t K) {
  const int64_t tiles = (rows + kMR - 1) / kMR, steps = steps_of(K);
  const int width = tiles == 1 ? int(rows) : kMR;
  int32_t* packed = static_cast<int32_t*>(scratch(Slot::kPackA, size_t(tiles * steps * width + W) * sizeof(int32_t)));
  const Chunk chunk{packed, rows, tiles, steps, width};
  auto pack = [&](int64_t t, int32_t* out) { pack_lines(a.data + (first + t * kMR) * a.row, a.row, a.col, chunk.rows_of(t), 0, K, width, out); };
  if (tiles <= 4) {
    for (int64_t t = 0; t < tiles; t++) pack(t, packed + t * steps * width);  // the spill of a tile is written over
    return chunk;
  }
  parallel_for(tiles, [&](int64_t t) {
    // another thread may own the next tile: pack beside, then copy exactly
    int32_t* own = static_cast<int32_t*>(scratch(Slot::kRow, size_t(steps * width + W) * sizeof(int32_t)));
    pack(t, own);
    memcpy(packed + t * steps * width, own, size_t(steps * width) * sizeof(int32_t));
  });
  return chunk;
}

// out[tile][kMR][kNR] (+)= A[:, k0 : k1] B[k0 : k1, j : j + columns], in blocks of kKC steps
static void run_chains(const Chunk& a, const Matrix& b, int64_t j, int columns, int64_t k0, int64_t k1, float* out, bool add) {
  const Flush flush;
  int32_t* block = static_cast<int32_t*>(scratch(Slot::kPackB, size_t(kKC * kNR + W) * sizeof(int32_t)));
  for (int64_t k = k0; k < k1; k += kKC * kStep) {
    const int64_t end = k1 - k < kKC * kStep ? k1 : k + kKC * kStep;
    pack_lines(b.data + j * b.col, b.col, b.row, columns, k, end, kNR, block);
    for (int64_t t = 0; t < a.tiles; t++)
      chains(a.rows_of(t), steps_of(end - k), a.at(t, k / kStep), a.width, block, out + t * kMR * kNR, add || k > k0);
  }
}

// segments > 1 cuts K into that many equal chains (R2); K must be divisible by twice that.
static void gemm(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, const Output& c, int segments = 1) {
  const int64_t depth = K / segments, tile_bytes = steps_of(K) * kMR * int64_t(sizeof(int32_t));
  int64_t chunk_rows = kMR * (tile_bytes > 0 ? kChunkBytes / tile_bytes : 1);
  chunk_rows = chunk_rows < 4 * kMR ? 4 * kMR : chunk_rows;
  for (int64_t first = 0; first < M; first += chunk_rows) {
    const Chunk chunk = pack_chunk(a, first, M - first < chunk_rows ? M - first : chunk_rows, K);
    parallel_for((N + kNR - 1) / kNR, [&](int64_t panel) {
      const int64_t j = panel * kNR, sum = chunk.tiles * kMR * kNR;
      const int columns = N - j < kNR ? int(N - j) : kNR;
      float* tiles = static_cast<float*>(scratch(Slot::kTile, size_t(sum * segments) * sizeof(float)));
      auto each_tile = [&](auto body) {
        for (int64_t t = 0; t < chunk.tiles; t++) body(first + t * kMR, chunk.rows_of(t), tiles + t * kMR * kNR);
      };
      if (c.add) each_tile([&](int64_t i, int rows, float* tile) { load_tile(c, i, rows, j, columns, tile); });
      if (K == 0 && !c.add) memset(tiles, 0, size_t(sum) * sizeof(float));
      for (int g = 0; g < segments; g++) run_chains(chunk, b, j, columns, g * depth, (g + 1) * depth, tiles + g * sum, c.add);
      add_tree(tiles, segments, sum);
      each_tile([&](int64_t i, int rows, const float* tile) { store_tile(c, i, rows, j, columns, tile); });
    });
  }
}

}  // namespace zerokl::ZEROKL_ISA
