// Attention, forward (R5): keys in blocks of 64 at absolute positions, online softmax inside segments of 1,024, segments
// merged in ascending order. Milakov and Gimelshein, 2018; Dao et al., 2022. One code for full sequences and pages.
#include "attention.h"
#include "kernels.h"

namespace zerokl::ZEROKL_ISA {

// Running softmax of a group of rows: maximum, sum and accumulators, all relative to exp2.
struct Running {
  float *m, *l, *acc;
};

constexpr int kGroupTiles = 8;  // tiles of query rows that share one packed key block

static void fill(float* p, int64_t n, float x) {
  for (int64_t i = 0; i < n; i++) p[i] = x;
}

// The halving tree of R3 over a block.
ZK_INLINE float fold_block(const float* p) {
  vf v[kAttentionBlock / W];
#pragma GCC unroll 16
  for (int i = 0; i < kAttentionBlock / W; i++) v[i] = load(p + i * W);
#pragma GCC unroll 16
  for (int half = kAttentionBlock / W / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; i++) v[i] = v[i] + v[i + half];
  return fold_vector(v[0]);
}

// One key block for one row: scores to probabilities p [kAttentionBlock], relative to the maximum so far. Returns what
// shrinks the accumulators.
static float update_row(const float* score, Span span, float c, float* m, float* l, float* p) {
  constexpr int kVectors = kAttentionBlock / W;
  vf t[kVectors], top = set1(*m);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) t[i] = load(score + (i * W / kNR) * kMR * kNR + i * W % kNR) * set1(c);
  if (span.end - span.begin < kAttentionBlock) {
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      const vi at = lane + i * W, seen = (at >= span.begin) & (at < span.end);
      t[i] = seen ? t[i] : set1(-__builtin_inff());
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) top = max(t[i], top);
  const float highest = highest_of(top);
  // exp2(0) is 1 exactly; -inf less -inf is NaN and stays one
  const float shrink = *m == highest && highest > -__builtin_inff() ? 1.0f : exp2_1(*m - highest);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) store(p + i * W, exp2(t[i] - set1(highest)));
  *m = highest;
  *l = fma1(*l, shrink, fold_block(p));
  return shrink;
}

// One key block for one row tile: scores, softmax update, p v. k holds the packed keys, value(j) value j of the block;
// score [panel][kMR][kNR] and p [kMR][kAttentionBlock] are scratch.
template <class Value>
static void update_tile(const Rows& rows, const int32_t* q, const KeyBlock& keys, const int32_t* k, Value value, const AttentionShape& s,
                        float c, const Running& state, float* score, float* p) {
  const int64_t dim = s.v_dim;
  products(rows.count, s.dim, q, keys.panels(), k, score);
  for (int r = 0; r < rows.count; r++) {
    const Span span = rows.span(r, keys);
    if (span.empty()) continue;
    const float shrink = update_row(score + r * kNR, span, c, state.m + r, state.l + r, p + r * kAttentionBlock);
    for (int64_t d = 0; d < dim && shrink != 1.0f; d += W) {
      float* a = state.acc + ((d / kNR) * kMR + r) * kNR + d % kNR;
      store(a, load(a) * set1(shrink));
    }
  }
  for_equal_spans(rows, keys, [&](int r, int count, Span span) {
    add_weighted<kAttentionBlock>(count, span.end - span.begin, p + r * kAttentionBlock + span.begin, 1, dim,
                                  [&](int64_t j) { return value(int(span.begin + j)); }, state.acc + r * kNR);
  });
}

// total = total + segment: L = fma(L, a, l b), O = fma(O, a, o b)
static void merge_segment(int rows, int64_t dim, const Running& total, const Running& segment) {
  const int64_t d_panels = (dim + kNR - 1) / kNR;
  for (int r = 0; r < rows; r++) {
    if (segment.m[r] == -__builtin_inff() && segment.l[r] == 0.0f) continue;
    float m = total.m[r] > segment.m[r] ? total.m[r] : segment.m[r];
    float a = exp2_1(total.m[r] - m), b = exp2_1(segment.m[r] - m);
    total.m[r] = m;
    total.l[r] = fma1(total.l[r], a, segment.l[r] * b);
    for (int64_t n = 0; n < d_panels; n++)
      for (int v = 0; v < kNR; v += W) {
        const int64_t at = (n * kMR + r) * kNR + v;
        store(total.acc + at, fma(load(total.acc + at), set1(a), load(segment.acc + at) * set1(b)));
      }
  }
}

// The sink's logit joins the sum, with no value: what merge_segment does with l' = 1 and O' = 0.
static void add_sink(float sink, int64_t dim, int r, const Running& total) {
  const float t = sink * kLog2e, m = total.m[r] > t ? total.m[r] : t, a = exp2_1(total.m[r] - m);
  total.m[r] = m;
  total.l[r] = fma1(total.l[r], a, exp2_1(t - m));
  for (int64_t d = 0; d < dim; d += W) {
    float* o = total.acc + ((d / kNR) * kMR + r) * kNR + d % kNR;
    store(o, load(o) * set1(a));
  }
}

// Query rows [first, first + count) of one sequence and kv head; row r is head r % G of query r / G.
// locate(begin, n, row): the rows of k and v that hold keys [begin, begin + n).
template <class Locate>
static void attend_group(const AttentionShape& s, const Heads& head, int64_t first, int64_t count, const uint16_t* q_rows,
                         const uint16_t* k_rows, const uint16_t* v_rows, Locate locate, uint16_t* out, float* lse) {
  const int64_t dim = s.dim, v_dim = s.v_dim, d_panels = (v_dim + kNR - 1) / kNR, tiles = (count + kMR - 1) / kMR;
  const int64_t acc = d_panels * kMR * kNR, state = 2 * kMR + acc, panels = kAttentionBlock / kNR;
  const int64_t q_words = words_of(tiles, dim, kMR), k_words = words_of(panels, dim, kNR), q_tile = steps_of(dim) * kMR;
  float* at = static_cast<float*>(scratch(Slot::kAttention, sizeof(float) * size_t(q_words + k_words + 2 * tiles * state +
                                                           panels * kMR * kNR + kAttentionBlock * kMR)));
  auto take = [&](int64_t n) { float* p = at; at += n; return p; };
  int32_t *q = reinterpret_cast<int32_t*>(take(q_words)), *k = reinterpret_cast<int32_t*>(take(k_words));
  float *segment_state = take(tiles * state), *total_state = take(tiles * state);
  float *score = take(panels * kMR * kNR), *p = take(kAttentionBlock * kMR);
  auto running = [&](float* base, int64_t t) { return Running{base + t * state, base + t * state + kMR, base + t * state + 2 * kMR}; };
  auto tile_rows = [&](int64_t t) { return head.rows(first + t * kMR, count - t * kMR < kMR ? int(count - t * kMR) : kMR, s); };
  auto reset = [&](float* base) {
    for (int64_t t = 0; t < tiles; t++) {
      fill(base + t * state, kMR, -__builtin_inff());
      fill(base + t * state + kMR, kMR + acc, 0.0f);
    }
  };
  for (int64_t t = 0; t < tiles; t++) {
    // spills W - kMR words into the next tile, which is packed after it
    Rows rows = tile_rows(t);
    pack_lines([&](int r) { return q_rows + head.index(rows.first + r) * dim; }, rows.count, 0, dim, kMR, q + t * q_tile);
  }
  const float c = s.scale * kLog2e;
  const int64_t last_key = tile_rows(tiles - 1).last_key(), first_key = tile_rows(0).first_key();
  reset(total_state);
  for (int64_t segment = first_key / kAttentionSegment; segment * kAttentionSegment <= last_key; segment++) {
    reset(segment_state);
    for (int64_t block = segment * kAttentionSegment; block < (segment + 1) * kAttentionSegment && block <= last_key; block += kAttentionBlock) {
      if (block + kAttentionBlock <= first_key) continue;
      const int low = first_key > block ? int(first_key - block) : 0;  // no row sees the keys before: they are not read
      const KeyBlock keys{block, last_key + 1 - block < kAttentionBlock ? int(last_key + 1 - block) : kAttentionBlock};
      int64_t row[kAttentionBlock];
      locate(block + low, keys.count - low, row + low);
      for (int j = 0; j < low; j++) row[j] = row[low];
      pack_keys(keys.count, dim, [&](int j) { return k_rows + (row[j] * s.kv_heads + head.kv) * dim; }, k);
      auto value = [&](int j) { return v_rows + (row[j] * s.kv_heads + head.kv) * v_dim; };
      for (int64_t t = 0; t < tiles; t++)
        update_tile(tile_rows(t), q + t * q_tile, keys, k, value, s, c, running(segment_state, t), score, p);
    }
    for (int64_t t = 0; t < tiles; t++) merge_segment(tile_rows(t).count, v_dim, running(total_state, t), running(segment_state, t));
  }
  for (int64_t t = 0; t < tiles; t++) {
    const Running total = running(total_state, t);
    for (int r = 0; r < tile_rows(t).count; r++) {
      const int64_t row = first + t * kMR + r;
      if (s.sinks) add_sink(s.sinks[head.head(row)], v_dim, r, total);
      if (lse) lse[head.index(row)] = total.m[r] + log2_1(total.l[r]);
      for (int64_t d = 0; d < v_dim; d += W) {
        const int n = v_dim - d < W ? int(v_dim - d) : W;
        vf o = load(total.acc + ((d / kNR) * kMR + r) * kNR + d % kNR) / set1(total.l[r]);
        store_bf16_n(out + head.index(row) * v_dim + d, o, n);
      }
    }
  }
}

// Tasks: (sequence, kv head, group of row tiles). `queries(b)`: first packed row, count, keys before the first query.
template <class Queries, class Body>
static void for_groups(const AttentionShape& s, int64_t sequences, Queries queries, Body body) {
  constexpr int64_t kGroup = kGroupTiles * kMR;
  const int64_t G = s.heads / s.kv_heads;
  int64_t* begin = static_cast<int64_t*>(scratch(Slot::kRow, sizeof(int64_t) * size_t(sequences + 1)));
  begin[0] = 0;
  for (int64_t b = 0; b < sequences; b++) begin[b + 1] = begin[b] + s.kv_heads * ((queries(b).count * G + kGroup - 1) / kGroup);
  parallel_for(begin[sequences], [&](int64_t task) {
    int64_t low = 0, high = sequences;  // the sequence with begin[b] <= task < begin[b + 1]
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (begin[middle] <= task ? low : high) = middle;
    }
    const int64_t index = task - begin[low], groups = (begin[low + 1] - begin[low]) / s.kv_heads;
    const int64_t first = (index % groups) * kGroup, rows = queries(low).count * G;
    body(low, index / groups, first, rows - first < kGroup ? rows - first : kGroup);
  });
}

void attention_varlen(const AttentionShape& s, int64_t sequences, const int32_t* cu_seqlens, const uint16_t* q, const uint16_t* k,
                      const uint16_t* v, uint16_t* out, float* lse) {
  auto queries = [&](int64_t b) { return QuerySpan{cu_seqlens[b], cu_seqlens[b + 1] - cu_seqlens[b], 0}; };
  for_groups(s, sequences, queries, [&](int64_t b, int64_t kv, int64_t first, int64_t count) {
    const Heads head{s.heads / s.kv_heads, kv, s.heads, queries(b), queries(b).count};
    auto locate = [&](int64_t begin, int n, int64_t* row) {
      for (int j = 0; j < n; j++) row[j] = cu_seqlens[b] + begin + j;
    };
    attend_group(s, head, first, count, q, k, v, locate, out, lse);
  });
}

void attention_paged(const AttentionShape& s, int64_t sequences, const PageTable& pages, const int32_t* seq_lens, const int32_t* q_lens,
                     const uint16_t* q, const uint16_t* k_cache, const uint16_t* v_cache, uint16_t* out) {
  int64_t* start = static_cast<int64_t*>(scratch(Slot::kPackA, sizeof(int64_t) * size_t(sequences + 1)));
  start[0] = 0;
  for (int64_t b = 0; b < sequences; b++) start[b + 1] = start[b] + q_lens[b];
  auto queries = [&](int64_t b) { return QuerySpan{start[b], q_lens[b], seq_lens[b] - q_lens[b]}; };
  for_groups(s, sequences, queries, [&](int64_t b, int64_t kv, int64_t first, int64_t count) {
    const int32_t* table = pages.table + b * pages.max_pages;
    auto locate = [&](int64_t begin, int n, int64_t* row) {
      int64_t page = begin / pages.page, slot = begin % pages.page;
      for (int j = 0; j < n; j++) {
        row[j] = table[page] * pages.page + slot;
        if (++slot == pages.page) slot = 0, page++;
      }
    };
    const Heads head{s.heads / s.kv_heads, kv, s.heads, queries(b), seq_lens[b]};
    attend_group(s, head, first, count, q, k_cache, v_cache, locate, out, nullptr);
  });
}

}  // namespace zerokl::ZEROKL_ISA
