// C[M, N] = A[M, K] B[K, N]: one fp32 fma chain over ascending k per output (R1), whatever the tiling. Only rows and
// columns are cut into tasks, never k.
#pragma once

#include "parallel.h"
#include "tile.h"

namespace zerokl::ZEROKL_ISA {

constexpr int kKC = 128;                  // a panel block of kKC x kNR fp32 stays in L1
constexpr int64_t kChunkBytes = 1 << 19;  // packed rows of A that stay in L2

ZK_INLINE const void* element(const Matrix& m, int64_t offset) {
  return static_cast<const char*>(m.data) + offset * (m.bf16 ? 2 : 4);
}

// Packing where the lines lie side by side: contiguous along the lines, strided along k.
static void pack_along(const Matrix& m, int64_t k_stride, int64_t first, int lines, int64_t k0, int64_t kc, int width, float* out) {
  for (int64_t k = 0; k < kc; k++)
    for (int group = 0; group < width; group += W)
      store(out + k * width + group, load_any_n(m, (k0 + k) * k_stride + first + group, lines - group));
}

ZK_INLINE void pack_a(const Matrix& a, int64_t first, int rows, int64_t kc, int width, float* out) {
  if (a.col == 1)
    pack_across(a.bf16, [&](int i) { return element(a, (first + i) * a.row); }, rows, kc, width, out);
  else
    pack_along(a, a.col, first, rows, 0, kc, width, out);
}
ZK_INLINE void pack_b(const Matrix& b, int64_t first, int columns, int64_t k0, int64_t kc, float* out) {
  if (b.row == 1)
    pack_across(b.bf16, [&](int i) { return element(b, (first + i) * b.col + k0); }, columns, kc, kNR, out);
  else
    pack_along(b, b.row, first, columns, k0, kc, kNR, out);
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
      store(tile + r * kNR + v, columns - v >= W ? load(p) : load_n(p, columns - v, 0.0f));
    }
}

static void store_tile(const Output& c, int64_t i, int rows, int64_t j, int columns, const float* tile) {
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < columns; v += W) {
      int n = columns - v < W ? columns - v : W;
      vf x = load(tile + r * kNR + v);
      if (c.bias) x = x + (n == W ? load(c.bias + j + v) : load_n(c.bias + j + v, n, 0.0f));
      int64_t at = (i + r) * c.row + j + v;
      if (c.bf16)
        n == W ? store_bf16(static_cast<uint16_t*>(c.data) + at, x) : store_bf16_n(static_cast<uint16_t*>(c.data) + at, x, n);
      else
        n == W ? store(static_cast<float*>(c.data) + at, x) : store_n(static_cast<float*>(c.data) + at, x, n);
    }
}

// R2: adds `count` (a power of two) tiles of n floats as a balanced binary tree; the sum lands in the first.
static void add_tree(float* tiles, int count, int64_t n) {
  for (int step = 1; step < count; step *= 2)
    for (int g = 0; g + step < count; g += 2 * step)
      for (int64_t i = 0; i < n; i += W) store(tiles + g * n + i, load(tiles + g * n + i) + load(tiles + (g + step) * n + i));
}

// A chunk of rows of A, packed: tile t holds rows [t * kMR, ...), [K][step] words from data + t * K * step.
struct Chunk {
  const float* data;
  int64_t rows, tiles, K;
  int step;

  int rows_of(int64_t t) const { return rows - t * kMR < kMR ? int(rows - t * kMR) : kMR; }
  const float* at(int64_t t, int64_t k) const { return data + (t * K + k) * step; }
};

static Chunk pack_chunk(const Matrix& a, int64_t first, int64_t rows, int64_t K) {
  const int64_t tiles = (rows + kMR - 1) / kMR;
  const int step = tiles == 1 ? int(rows) : kMR;
  float* packed = static_cast<float*>(scratch(Slot::kPackA, size_t(tiles * K * step + W) * sizeof(float)));
  const Chunk chunk{packed, rows, tiles, K, step};
  if (tiles <= 4) {
    // a tile's last store may spill into the next tile, which is written after it
    for (int64_t t = 0; t < tiles; t++) pack_a(a, first + t * kMR, chunk.rows_of(t), K, step, packed + t * K * step);
    return chunk;
  }
  parallel_for(tiles, [&](int64_t t) {
    // another thread may own the next tile: pack beside, then copy exactly
    float* own = static_cast<float*>(scratch(Slot::kRow, size_t(K * step + W) * sizeof(float)));
    pack_a(a, first + t * kMR, chunk.rows_of(t), K, step, own);
    memcpy(packed + t * K * step, own, size_t(K * step) * sizeof(float));
  });
  return chunk;
}

// chains[tile][kMR][kNR] += A[:, k0 : k1] B[k0 : k1, j : j + columns], in blocks of kKC
static void run_chains(const Chunk& a, const Matrix& b, int64_t j, int columns, int64_t k0, int64_t k1, float* chains, bool add) {
  float* block = static_cast<float*>(scratch(Slot::kPackB, size_t(kKC * kNR + W) * sizeof(float)));
  const bool pairs = a.tiles == 1 && b.bf16 && b.row == 1;
  for (int64_t k = k0; k < k1;) {
    int64_t kc = k1 - k < kKC ? k1 - k : kKC;
    if (pairs && kc >= 2 * W) {
      kc -= kc % (2 * W);
      int32_t* words = reinterpret_cast<int32_t*>(block);
      pack_pairs([&](int i) { return element(b, (j + i) * b.col + k); }, columns, kc, words);
      micro_pairs(a.rows_of(0), kc, a.at(0, k), a.step, words, chains, add || k > k0);
    } else {
      pack_b(b, j, columns, k, kc, block);
      for (int64_t t = 0; t < a.tiles; t++) micro(a.rows_of(t), kc, a.at(t, k), a.step, block, chains + t * kMR * kNR, add || k > k0);
    }
    k += kc;
  }
}

// segments > 1 cuts K into that many equal chains (R2); K must be divisible by it.
static void gemm(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, const Output& c, int segments = 1) {
  const int64_t depth = K / segments, tile_bytes = K * kMR * int64_t(sizeof(float));
  int64_t chunk_rows = kMR * (tile_bytes > 0 ? kChunkBytes / tile_bytes : 1);
  chunk_rows = chunk_rows < 4 * kMR ? 4 * kMR : chunk_rows;
  for (int64_t first = 0; first < M; first += chunk_rows) {
    const Chunk chunk = pack_chunk(a, first, M - first < chunk_rows ? M - first : chunk_rows, K);
    parallel_for((N + kNR - 1) / kNR, [&](int64_t panel) {
      const int64_t j = panel * kNR, sum = chunk.tiles * kMR * kNR;
      const int columns = N - j < kNR ? int(N - j) : kNR;
      float* chains = static_cast<float*>(scratch(Slot::kTile, size_t(sum * segments) * sizeof(float)));
      auto each_tile = [&](auto body) {
        for (int64_t t = 0; t < chunk.tiles; t++) body(first + t * kMR, chunk.rows_of(t), chains + t * kMR * kNR);
      };
      if (c.add) each_tile([&](int64_t i, int rows, float* tile) { load_tile(c, i, rows, j, columns, tile); });
      if (K == 0 && !c.add) memset(chains, 0, size_t(sum) * sizeof(float));
      for (int g = 0; g < segments; g++) run_chains(chunk, b, j, columns, g * depth, (g + 1) * depth, chains + g * sum, c.add);
      add_tree(chains, segments, sum);
      each_tile([&](int64_t i, int rows, const float* tile) { store_tile(c, i, rows, j, columns, tile); });
    });
  }
}

}  // namespace zerokl::ZEROKL_ISA
