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

// One block for one row tile: scores, softmax update, p v.
static void update_tile(const Rows& rows, const float* q, const KeyBlock& keys, int64_t dim, float c, const Running& state, float* score,
                        float* p) {
  const int panels = kAttentionBlock / kNR;
  for (int n = 0; n < panels; n++)
    micro(rows.count, dim, q, kMR, keys.k + n * dim * kNR, score + n * kMR * kNR, false);
  const int64_t d_panels = (dim + kNR - 1) / kNR;
  for (int r = 0; r < rows.count; r++) {
    const Span span = rows.span(r, keys);
    if (span.empty()) continue;
    float t[kAttentionBlock];
    fill(t, kAttentionBlock, -__builtin_inff());
    for (int j = span.begin; j < span.end; j++) t[j] = score[(j / kNR) * kMR * kNR + r * kNR + j % kNR] * c;
    vf top = set1(state.m[r]);
    for (int j = 0; j < kAttentionBlock; j += W) top = max(load(t + j), top);
    float m = top[0];
    for (int i = 1; i < W; i++) m = top[i] > m ? top[i] : m;
    const float shrink = exp2_1(state.m[r] - m);
    for (int j = 0; j < kAttentionBlock; j += W) store(t + j, exp2(load(t + j) - set1(m)));
    for (int j = 0; j < kAttentionBlock; j++) p[j * kMR + r] = t[j];
    for (int half = kAttentionBlock / 2; half > 0; half /= 2)
      for (int j = 0; j < half; j++) t[j] = t[j] + t[j + half];
    state.m[r] = m;
    state.l[r] = fma1(state.l[r], shrink, t[0]);
    for (int64_t n = 0; n < d_panels; n++)
      for (int v = 0; v < kNR; v += W) {
        float* a = state.acc + (n * kMR + r) * kNR + v;
        store(a, load(a) * set1(shrink));
      }
  }
  for_equal_spans(rows, keys, [&](int r, int count, Span span) {
    for (int64_t n = 0; n < d_panels; n++)
      micro(count, span.end - span.begin, p + span.begin * kMR + r, kMR, keys.v + (n * kAttentionBlock + span.begin) * kNR,
            state.acc + (n * kMR + r) * kNR, true);
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

// Query rows [first, first + count) of one sequence and kv head; row r is head r % G of query r / G.
template <class KeyRow, class ValueRow>
static void attend_group(const AttentionShape& s, const Heads& head, int64_t first, int64_t count, KeyRow key_row, ValueRow value_row,
                         uint16_t* out, float* lse) {
  const int64_t dim = s.dim, d_panels = (dim + kNR - 1) / kNR, tiles = (count + kMR - 1) / kMR;
  const int64_t acc = d_panels * kMR * kNR, state = 2 * kMR + acc, panels = kAttentionBlock / kNR;
  float* at = static_cast<float*>(scratch(Slot::kAttention, sizeof(float) * size_t(tiles * (dim * kMR + W + 2 * state) +
                                                           (panels * dim + d_panels * kAttentionBlock) * kNR +
                                                           panels * kMR * kNR + kAttentionBlock * kMR + 8 * W)));
  auto take = [&](int64_t n) { float* p = at; at += n; return p; };
  float* q = take(tiles * (dim * kMR) + W);
  float *segment_state = take(tiles * state), *total_state = take(tiles * state);
  float *k = take(panels * dim * kNR + W), *v = take(d_panels * kAttentionBlock * kNR);
  float *score = take(panels * kMR * kNR), *p = take(kAttentionBlock * kMR + W);
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
    pack_across([&](int r) { return head.query(rows.first + r); }, rows.count, dim, kMR, q + t * dim * kMR);
  }
  const float c = s.scale * kLog2e;
  const int64_t last_key = tile_rows(tiles - 1).last_key(), first_key = tile_rows(0).first_key();
  reset(total_state);
  for (int64_t segment = first_key / kAttentionSegment; segment * kAttentionSegment <= last_key; segment++) {
    reset(segment_state);
    for (int64_t block = segment * kAttentionSegment; block < (segment + 1) * kAttentionSegment && block <= last_key; block += kAttentionBlock) {
      if (block + kAttentionBlock <= first_key) continue;
      const int64_t low = first_key > block ? first_key - block : 0;
      const KeyBlock keys{block, last_key + 1 - block < kAttentionBlock ? int(last_key + 1 - block) : kAttentionBlock, k, v};
      pack_keys(keys.count, dim, [&](int j) { return key_row(block + (j < low ? low : j)); }, k);
      pack_values(keys.count, dim, [&](int j) { return value_row(block + (j < low ? low : j)); }, v);
      for (int64_t t = 0; t < tiles; t++) update_tile(tile_rows(t), q + t * dim * kMR, keys, dim, c, running(segment_state, t), score, p);
    }
    for (int64_t t = 0; t < tiles; t++) merge_segment(tile_rows(t).count, dim, running(total_state, t), running(segment_state, t));
  }
  for (int64_t t = 0; t < tiles; t++) {
    const Running total = running(total_state, t);
    for (int r = 0; r < tile_rows(t).count; r++) {
      const int64_t row = first + t * kMR + r;
      if (lse) lse[head.lse_index(row)] = total.m[r] + log2_1(total.l[r]);
      for (int64_t d = 0; d < dim; d += W) {
        const int n = dim - d < W ? int(dim - d) : W;
        vf o = load(total.acc + ((d / kNR) * kMR + r) * kNR + d % kNR) / set1(total.l[r]);
        store_bf16_n(out + head.offset(row) + d, o, n);
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
    const int64_t row = s.kv_heads * s.dim, base = cu_seqlens[b] * row + kv * s.dim;
    const Heads head{q, s.heads / s.kv_heads, kv, s.heads, s.dim, queries(b), queries(b).count};
    attend_group(s, head, first, count, [&](int64_t p) { return k + base + p * row; }, [&](int64_t p) { return v + base + p * row; }, out, lse);
  });
}

void attention_paged(const AttentionShape& s, int64_t sequences, const PageTable& pages, const int32_t* seq_lens, const int32_t* q_lens,
                     const uint16_t* q, const uint16_t* k_cache, const uint16_t* v_cache, uint16_t* out) {
  int64_t* start = static_cast<int64_t*>(scratch(Slot::kPackA, sizeof(int64_t) * size_t(sequences + 1)));
  start[0] = 0;
  for (int64_t b = 0; b < sequences; b++) start[b + 1] = start[b] + q_lens[b];
  auto queries = [&](int64_t b) { return QuerySpan{start[b], q_lens[b], seq_lens[b] - q_lens[b]}; };
  for_groups(s, sequences, queries, [&](int64_t b, int64_t kv, int64_t first, int64_t count) {
    const int64_t row = s.kv_heads * s.dim;
    const int32_t* table = pages.table + b * pages.max_pages;
    auto at = [&](int64_t p) { return (int64_t(table[p / pages.page]) * pages.page + p % pages.page) * row + kv * s.dim; };
    const Heads head{q, s.heads / s.kv_heads, kv, s.heads, s.dim, queries(b), seq_lens[b]};
    attend_group(s, head, first, count, [&](int64_t p) { return k_cache + at(p); }, [&](int64_t p) { return v_cache + at(p); }, out, nullptr);
  });
}

}  // namespace zerokl::ZEROKL_ISA
