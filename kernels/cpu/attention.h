// Which query rows see which keys, and how key blocks are packed: shared by attention forward and backward.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "tile.h"

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

// A packed block of keys starting at absolute position `start`: k [panel][dim][kNR], v [dim panel][key][kNR].
struct KeyBlock {
  int64_t start;
  int count;
  const float *k, *v;
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
  const uint16_t* q;
  int64_t group, kv, heads, dim;
  QuerySpan span;
  int64_t keys;

  int64_t offset(int64_t row) const { return ((span.row + row / group) * heads + kv * group + row % group) * dim; }
  int64_t lse_index(int64_t row) const { return offset(row) / dim; }
  const uint16_t* query(int64_t row) const { return q + offset(row); }
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

// out[panel][dim][kNR]: keys across the lanes
template <class Line>
static void pack_keys(int keys, int64_t dim, Line line, float* out) {
  for (int n = 0; n < kAttentionBlock; n += kNR)
    pack_across([&](int j) { return line(n + j); }, keys - n < 0 ? 0 : keys - n < kNR ? keys - n : kNR, dim, kNR,
                out + n * dim);
}

// out[dim panel][key][kNR]: dimensions across the lanes
template <class Line>
static void pack_values(int keys, int64_t dim, Line line, float* out) {
  for (int j = 0; j < keys; j++) {
    const uint16_t* p = line(j);
    for (int64_t d = 0; d < dim; d += W) store(out + ((d / kNR) * kAttentionBlock + j) * kNR + d % kNR, load_bf16_n(p + d, dim - d < W ? int(dim - d) : W));
    // an odd number of vectors leaves half a panel: zero it
    if (dim % kNR && dim % kNR <= W) store(out + ((dim / kNR) * kAttentionBlock + j) * kNR + W, vf{});
  }
}

}  // namespace zerokl::ZEROKL_ISA
