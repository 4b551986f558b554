// C[M, N] = A[M, K] B[K, N] of bf16 matrices: one fp32 chain per output (R1), whatever the tiling. Only rows and columns
// are cut into tasks, never k.
#pragma once

#include "few_rows.h"
#include "parallel.h"

namespace zerokl::ZEROKL_ISA {

constexpr int kKC = 128;                  // steps of a panel block: kKC x kNR words stay in L1
constexpr int64_t kChunkBytes = 1 << 19;  // packed rows of A that stay in L2

// bf16 element (i, j) at data[i * row + j * col]; one of the strides is 1.
struct Matrix {
  const uint16_t* data;
  int64_t row, col;
};

// What pack_lines writes, of lines that are neighbours in memory: element k of line i at data[k * stride + i].
static void pack_columns(const uint16_t* data, int64_t stride, int lines, int64_t k0, int64_t k1, int width, int32_t* out) {
  for (int group = 0; group < width; group += W) {
    const int n = lines - group < W ? lines - group : W;
    const uint16_t* first = data + group;
    for (int64_t k = k0; k < k1; k += 2) {
      const vi even = widen_n(first + k * stride, n), odd = k + 1 < k1 ? widen_n(first + (k + 1) * stride, n) : vi{};
      store_pair(even | (odd << 16), out + group + (k - k0) / 2 * kWords * width, width);
    }
  }
}

// Packs lines at `data`, `line` apart, whose elements along k lie `k_stride` apart. `coming` walks through what will be read
// after these lines, a cache line for each one read: in the order of addresses, which hardware prefetchers follow, while the
// lines themselves are read side by side, which they do not.
static void pack(const uint16_t* data, int64_t line, int64_t k_stride, int lines, int64_t k0, int64_t k1, int width, int32_t* out,
                 const uint16_t*& coming) {
  if (k_stride == 1)
    pack_lines([&](int i) { return data + i * line; }, lines, k0, k1, width, out, [&] { return coming += 2 * W; });
  else
    pack_columns(data, k_stride, lines, k0, k1, width, out);
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
  auto pack_tile = [&](int64_t t, int32_t* out) {
    const uint16_t* coming = a.data + (first + (t + 1) * kMR) * a.row;
    pack(a.data + (first + t * kMR) * a.row, a.row, a.col, chunk.rows_of(t), 0, K, width, out, coming);
  };
  if (tiles <= 4) {
    for (int64_t t = 0; t < tiles; t++) pack_tile(t, packed + t * steps * width);  // the spill of a tile is written over
    return chunk;
  }
  parallel_for(tiles, [&](int64_t t) {
    // another thread may own the next tile: pack beside, then copy exactly
    int32_t* own = static_cast<int32_t*>(scratch(Slot::kRow, size_t(steps * width + W) * sizeof(int32_t)));
    pack_tile(t, own);
    memcpy(packed + t * steps * width, own, size_t(steps * width) * sizeof(int32_t));
  });
  return chunk;
}

// out[tile][kMR][kNR] (+)= A[:, k0 : k1] B[k0 : k1, j : j + columns], in blocks of kKC steps unless the rows are few
static void run_chains(const Chunk& a, const Matrix& b, int64_t j, int columns, int64_t k0, int64_t k1, float* out, bool add,
                       const uint16_t*& coming) {
  const Flush flush;
  if (a.rows <= kFewRows && b.row == 1) {
    auto line = [&](int i) { return b.data + (j + (i < columns ? i : columns - 1)) * b.col; };  // the last again: not stored
    return few_rows(int(a.rows), line, k0, k1, a.at(0, k0 / kStep), out, add, [&] { return coming += 2 * W; });
  }
  int32_t* block = static_cast<int32_t*>(scratch(Slot::kPackB, size_t(kKC * kNR + W) * sizeof(int32_t)));
  for (int64_t k = k0; k < k1; k += kKC * kStep) {
    const int64_t end = k1 - k < kKC * kStep ? k1 : k + kKC * kStep;
    pack(b.data + j * b.col, b.col, b.row, columns, k, end, kNR, block, coming);
    for (int64_t t = 0; t < a.tiles; t++)
      chains(a.rows_of(t), steps_of(end - k), a.at(t, k / kStep), a.width, block, out + t * kMR * kNR, add || k > k0);
  }
}

// segments > 1 cuts K into that many equal chains (R2); K must be divisible by twice that.
// quantize.cpp takes the parts above, not the whole.
[[maybe_unused]] static void gemm(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, const Output& c, int segments = 1) {
  const int64_t depth = K / segments, tile_bytes = steps_of(K) * kMR * int64_t(sizeof(int32_t));
  int64_t chunk_rows = kMR * (tile_bytes > 0 ? kChunkBytes / tile_bytes : 1);
  chunk_rows = chunk_rows < 4 * kMR ? 4 * kMR : chunk_rows;
  for (int64_t first = 0; first < M; first += chunk_rows) {
    const Chunk chunk = pack_chunk(a, first, M - first < chunk_rows ? M - first : chunk_rows, K);
    for_parts((N + kNR - 1) / kNR, [&](int64_t panel) {
      const int64_t j = panel * kNR, sum = chunk.tiles * kMR * kNR;
      const int columns = N - j < kNR ? int(N - j) : kNR;
      const uint16_t* coming = b.data + (j + kNR) * b.col;
      float* tiles = static_cast<float*>(scratch(Slot::kTile, size_t(sum * segments) * sizeof(float)));
      auto each_tile = [&](auto body) {
        for (int64_t t = 0; t < chunk.tiles; t++) body(first + t * kMR, chunk.rows_of(t), tiles + t * kMR * kNR);
      };
      if (c.add) each_tile([&](int64_t i, int rows, float* tile) { load_tile(c, i, rows, j, columns, tile); });
      if (K == 0 && !c.add) memset(tiles, 0, size_t(sum) * sizeof(float));
      for (int g = 0; g < segments; g++) run_chains(chunk, b, j, columns, g * depth, (g + 1) * depth, tiles + g * sum, c.add, coming);
      add_tree(tiles, segments, sum);
      each_tile([&](int64_t i, int rows, const float* tile) { store_tile(c, i, rows, j, columns, tile); });
    });
  }
}

}  // namespace zerokl::ZEROKL_ISA
