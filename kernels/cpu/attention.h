// Which query rows see which keys, and how key blocks are packed: shared by attention forward and backward.
#pragma once

#include "kernels.h"
#include "pairs.h"
#include "parallel.h"

namespace zerokl::ZEROKL_ISA {

// The queries of one sequence: their first packed row, how many, and how many keys precede the first of them.
struct QuerySpan {
  int64_t row, count, before;
};

// Keys [begin, end) of a block.
struct Span {
  int begin, end;
  bool empty() const { return end <= begin; }
};

// A block of keys starting at absolute position `start`.
struct KeyBlock {
  int64_t start;
  int count;

  int panels() const { return (count + kNR - 1) / kNR; }
};

// Consecutive query rows (query-major, then head) and the keys each may see.
struct Rows {
  int64_t first;
  int count;
  int64_t group, before, keys, window;
  bool causal;

  int64_t position(int r) const { return before + (first + r) / group; }
  int64_t end_key(int r) const { return causal ? position(r) + 1 : keys; }
  int64_t begin_key(int r) const { return window > 0 && position(r) + 1 > window ? position(r) + 1 - window : 0; }
  int64_t last_key() const { return end_key(count - 1) - 1; }
  int64_t first_key() const { return begin_key(0); }
  Span span(int r, const KeyBlock& block) const {
    int64_t begin = begin_key(r) - block.start, end = end_key(r) - block.start;
    return {int(begin < 0 ? 0 : begin > block.count ? block.count : begin), int(end > block.count ? block.count : end < 0 ? 0 : end)};
  }
};

// One sequence and kv head: where its query rows lie.
struct Heads {
  int64_t group, kv, heads;
  QuerySpan span;
  int64_t keys;

  int64_t head(int64_t row) const { return kv * group + row % group; }
  int64_t index(int64_t row) const { return (span.row + row / group) * heads + head(row); }
  Rows rows(int64_t first, int count, const AttentionShape& s) const {
    return {first, count, group, span.before, keys, s.window, s.causal};
  }
};

// body(first row, rows, span) for runs of neighbouring rows that see the same keys of the block.
template <class Body>
static void for_equal_spans(const Rows& rows, const KeyBlock& block, Body body) {
  for (int r = 0; r < rows.count;) {
    const Span span = rows.span(r, block);
    int end = r + 1;
    while (end < rows.count) {
      const Span next = rows.span(end, block);
      if (next.begin != span.begin || next.end != span.end) break;
      end++;
    }
    if (!span.empty()) body(r, end - r, span);
    r = end;
  }
}

// Words that `tiles` tiles of `width` lines of `dim` elements take when packed, spill included.
ZK_INLINE int64_t words_of(int64_t tiles, int64_t dim, int width) { return tiles * steps_of(dim) * width + W; }

// out[panel][step][kNR]: keys across the lanes
template <class Line>
static void pack_keys(int keys, int64_t dim, Line line, int32_t* out) {
  for (int n = 0; n < keys; n += kNR)
    pack_lines([&](int j) { return line(n + j); }, keys - n < kNR ? keys - n : kNR, 0, dim, kNR, out + n * steps_of(dim));
}

// out[panel][kMR][kNR] = lines . keys by R1, for rows packed in a tile of width kMR
static void products(int rows, int64_t dim, const int32_t* lines, int panels, const int32_t* keys, float* out) {
  const Flush flush;
  for (int n = 0; n < panels; n++) chains(rows, steps_of(dim), lines, kMR, keys + n * steps_of(dim) * kNR, out + n * kMR * kNR, false);
}

// acc[dim panel][kMR][kNR] (its first `rows` rows) += weight[r][k] line(k), chains over ascending k, for rows that lie kRow
// apart in `weight` and k that lie `step` apart.
template <int kRow, class Line>
static void add_weighted(int rows, int64_t count, const float* weight, int64_t step, int64_t dim, Line line, float* acc) {
  for (int64_t d = 0; d < dim; d += kNR)
    micro<kRow>(rows, count, weight, step, [&](int64_t k) { return line(k) + d; }, dim - d < kNR ? int(dim - d) : kNR, acc + d * kMR);
}

}  // namespace zerokl::ZEROKL_ISA
