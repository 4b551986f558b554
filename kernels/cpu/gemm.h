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

ZK_INLINE void pack_a(const Matrix& a, int64_t first, int rows, int64_t k0, int64_t kc, float* out) {
  if (a.col == 1)
    pack_across(a.bf16, [&](int i) { return element(a, (first + i) * a.row + k0); }, rows, kc, kMR, out);
  else
    pack_along(a, a.col, first, rows, k0, kc, kMR, out);
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

// segments > 1 cuts K into that many equal chains (R2); K must be divisible by it.
static void gemm(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, const Output& c, int segments = 1) {
  const int64_t tile_a = K * kMR, depth = K / segments;
  int64_t chunk_tiles = kChunkBytes / int64_t(sizeof(float)) / (tile_a > 0 ? tile_a : 1);
  chunk_tiles = chunk_tiles < 4 ? 4 : chunk_tiles;
  for (int64_t chunk = 0; chunk < M; chunk += chunk_tiles * kMR) {
    const int64_t rows = M - chunk < chunk_tiles * kMR ? M - chunk : chunk_tiles * kMR;
    const int64_t tiles = (rows + kMR - 1) / kMR;
    float* packed = static_cast<float*>(scratch(Slot::kPackA, size_t(tiles * tile_a + W) * sizeof(float)));
    parallel_for(tiles, [&](int64_t t) {
      int64_t left = rows - t * kMR;
      // a tile's last store may spill W - kMR words: pack it beside, then copy exactly
      float* own = static_cast<float*>(scratch(Slot::kRow, size_t(tile_a + W) * sizeof(float)));
      pack_a(a, chunk + t * kMR, left < kMR ? int(left) : kMR, 0, K, own);
      memcpy(packed + t * tile_a, own, size_t(tile_a) * sizeof(float));
    });
    parallel_for((N + kNR - 1) / kNR, [&](int64_t panel) {
      const int64_t j = panel * kNR, sum = tiles * kMR * kNR;
      const int columns = N - j < kNR ? int(N - j) : kNR;
      float* block = static_cast<float*>(scratch(Slot::kPackB, size_t(kKC * kNR + W) * sizeof(float)));
      float* chains = static_cast<float*>(scratch(Slot::kTile, size_t(sum * segments) * sizeof(float)));
      if (c.add)
        for (int64_t t = 0; t < tiles; t++) {
          int left = rows - t * kMR < kMR ? int(rows - t * kMR) : kMR;
          load_tile(c, chunk + t * kMR, left, j, columns, chains + t * kMR * kNR);
        }
      for (int g = 0; g < segments; g++)
        for (int64_t k = g * depth; k < (g + 1) * depth; k += kKC) {
          const int64_t kc = (g + 1) * depth - k < kKC ? (g + 1) * depth - k : kKC;
          pack_b(b, j, columns, k, kc, block);
          for (int64_t t = 0; t < tiles; t++) {
            int left = rows - t * kMR < kMR ? int(rows - t * kMR) : kMR;
            micro(left, kc, packed + t * tile_a + k * kMR, kMR, block, chains + g * sum + t * kMR * kNR, c.add || k > g * depth);
          }
        }
      if (K == 0 && !c.add) memset(chains, 0, size_t(sum) * sizeof(float));
      add_tree(chains, segments, sum);
      for (int64_t t = 0; t < tiles; t++) {
        int left = rows - t * kMR < kMR ? int(rows - t * kMR) : kMR;
        store_tile(c, chunk + t * kMR, left, j, columns, chains + t * kMR * kNR);
      }
    });
  }
}

}  // namespace zerokl::ZEROKL_ISA
