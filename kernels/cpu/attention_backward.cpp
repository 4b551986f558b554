// Attention, backward (R9): no atomics; dQ walks keys, dK and dV walk query rows, each in ascending order.
#include "attention.h"
#include "kernels.h"

namespace zerokl::ZEROKL_ISA {

namespace {

// Everything one (sequence, kv head) keeps. Rows are query-major, then head.
struct Buffers {
  int32_t *q, *g;        // [tile][step][kMR]: pairs of queries and output gradients
  int32_t *k, *v;        // [panel][step][kNR]: pairs of a key block
  float* delta;          // [row]: sum over d of dO O
  float* dq;             // [tile][dim panel][kMR][kNR]
  float *dk, *dv;        // [key tile][dim panel][kMR][kNR] of the block
  float *s, *dp;         // [panel][kMR][kNR]
  float *p_row, *ds_row; // [row][kKeyStep]: probabilities and score gradients
};

constexpr int kKeyTiles = (kAttentionBlock + kMR - 1) / kMR;
constexpr int kKeyStep = kAttentionBlock + W;  // a row of p or ds; key tiles may read past 64

Buffers carve(int64_t tiles, int64_t dim) {
  const int64_t along = (dim + kNR - 1) / kNR * kMR * kNR, score = (kAttentionBlock / kNR) * kMR * kNR;
  const int64_t rows = words_of(tiles, dim, kMR), keys = words_of(kAttentionBlock / kNR, dim, kNR);
  const int64_t total = 2 * rows + 2 * keys + tiles * (kMR + along) + 2 * kKeyTiles * along + 2 * score + 2 * kMR * kKeyStep;
  float* at = static_cast<float*>(scratch(Slot::kAttention, sizeof(float) * size_t(total)));
  auto take = [&](int64_t n) { float* p = at; at += n; return p; };
  auto take_words = [&](int64_t n) { return reinterpret_cast<int32_t*>(take(n)); };
  Buffers b;
  b.q = take_words(rows);
  b.g = take_words(rows);
  b.k = take_words(keys);
  b.v = take_words(keys);
  b.delta = take(tiles * kMR);
  b.dq = take(tiles * along);
  b.dk = take(kKeyTiles * along);
  b.dv = take(kKeyTiles * along);
  b.s = take(score);
  b.dp = take(score);
  b.p_row = take(kMR * kKeyStep);
  b.ds_row = take(kMR * kKeyStep);
  return b;
}

void zero(float* p, int64_t n) { memset(p, 0, sizeof(float) * size_t(n)); }

// rows [count] of [dim panel][kMR][kNR], each rounded once to line(r)
template <class Line>
void store_rows(int rows, int64_t dim, const float* in, Line line) {
  for (int r = 0; r < rows; r++)
    for (int64_t d = 0; d < dim; d += W)
      store_bf16_n(line(r) + d, load(in + ((d / kNR) * kMR + r) * kNR + d % kNR), dim - d < W ? int(dim - d) : W);
}

// p = exp2(s c - lse), ds = (p (dp - delta)) scale, over the keys each row sees; zero elsewhere.
void gradients_of_scores(const Rows& rows, const KeyBlock& keys, const Buffers& b, const float* delta, const float* lse, float c, float scale) {
  for (int r = 0; r < rows.count; r++) {
    float *p = b.p_row + r * kKeyStep, *ds = b.ds_row + r * kKeyStep;
    zero(p, kKeyStep);
    zero(ds, kKeyStep);
    const Span span = rows.span(r, keys);
    if (span.empty()) continue;
    for (int j = 0; j < kAttentionBlock; j += W) {
      const int64_t at = (j / kNR) * kMR * kNR + r * kNR + j % kNR;
      vf w = exp2(load(b.s + at) * set1(c) - set1(lse[r]));
      store(p + j, w);
      store(ds + j, (w * (load(b.dp + at) - set1(delta[r]))) * set1(scale));
    }
    for (int j = 0; j < kAttentionBlock; j++)
      if (j < span.begin || j >= span.end) p[j] = ds[j] = 0.0f;
  }
}

// d[key tile] += sum over ascending rows of weight[row][key] line(row), only over the rows that see the key.
template <class Line>
void add_to_keys(const Rows& rows, const KeyBlock& keys, int64_t dim, const float* weight, Line line, float* d) {
  const int64_t along = (dim + kNR - 1) / kNR * kMR * kNR;
  for (int tile = 0; tile * kMR < keys.count; tile++) {
    const int first = tile * kMR;
    auto part = [&](int r) {
      Span s = rows.span(r, keys);
      s.begin = s.begin < first ? 0 : s.begin - first;
      s.end = s.end - first < kMR ? s.end - first : kMR;
      return s;
    };
    for (int r = 0; r < rows.count;) {
      const Span s = part(r);
      int end = r + 1;
      while (end < rows.count && part(end).begin == s.begin && part(end).end == s.end) end++;
      if (!s.empty())
        add_weighted<1>(s.end - s.begin, end - r, weight + r * kKeyStep + first + s.begin, kKeyStep, dim,
                        [&](int64_t k) { return line(r + int(k)); }, d + tile * along + s.begin * kNR);
      r = end;
    }
  }
}

}  // namespace

void attention_backward(const AttentionShape& s, int64_t sequences, const int32_t* cu_seqlens, const uint16_t* q, const uint16_t* k,
                        const uint16_t* v, const uint16_t* out, const float* lse, const uint16_t* dout, uint16_t* dq, uint16_t* dk,
                        uint16_t* dv) {
  parallel_for(sequences * s.kv_heads, [&](int64_t task) {
    const int64_t sequence = task / s.kv_heads, kv = task % s.kv_heads, dim = s.dim, G = s.heads / s.kv_heads;
    const QuerySpan span{cu_seqlens[sequence], cu_seqlens[sequence + 1] - cu_seqlens[sequence], 0};
    const Heads head{q, G, kv, s.heads, dim, span, span.count};
    const int64_t count = span.count * G, tiles = (count + kMR - 1) / kMR, along = (dim + kNR - 1) / kNR * kMR * kNR;
    const int64_t across = steps_of(dim) * kMR;
    const int64_t key_row = s.kv_heads * dim, base = span.row * key_row + kv * dim;
    const float c = s.scale * kLog2e;
    if (count == 0) return;
    const Buffers b = carve(tiles, dim);
    auto tile_rows = [&](int64_t t) { return head.rows(t * kMR, count - t * kMR < kMR ? int(count - t * kMR) : kMR, s); };
    for (int64_t t = 0; t < tiles; t++) {
      const Rows rows = tile_rows(t);
      auto query = [&](int r) { return head.query(rows.first + r); };
      auto grad = [&](int r) { return dout + head.offset(rows.first + r); };
      pack_lines(query, rows.count, 0, dim, kMR, b.q + t * across);
      pack_lines(grad, rows.count, 0, dim, kMR, b.g + t * across);
      for (int r = 0; r < rows.count; r++) {
        const int64_t at = head.offset(rows.first + r);
        float sum = 0.0f;
        for (int64_t d = 0; d < dim; d++) sum = fma1(from_bf16(dout[at + d]), from_bf16(out[at + d]), sum);
        b.delta[t * kMR + r] = sum;
      }
    }
    zero(b.dq, tiles * along);
    for (int64_t block = 0; block < span.count; block += kAttentionBlock) {
      const KeyBlock keys{block, span.count - block < kAttentionBlock ? int(span.count - block) : kAttentionBlock};
      auto key_line = [&](int j) { return k + base + (block + j) * key_row; };
      pack_keys(keys.count, dim, key_line, b.k);
      pack_keys(keys.count, dim, [&](int j) { return v + base + (block + j) * key_row; }, b.v);
      zero(b.dk, kKeyTiles * along);
      zero(b.dv, kKeyTiles * along);
      for (int64_t t = 0; t < tiles; t++) {
        const Rows rows = tile_rows(t);
        if (rows.end_key(rows.count - 1) <= block || rows.begin_key(0) >= block + kAttentionBlock) continue;
        products(rows.count, dim, b.q + t * across, keys.panels(), b.k, b.s);
        products(rows.count, dim, b.g + t * across, keys.panels(), b.v, b.dp);
        float row_lse[kMR];
        int64_t offset[kMR];
        for (int r = 0; r < rows.count; r++) {
          offset[r] = head.offset(rows.first + r);
          row_lse[r] = lse[offset[r] / dim];
        }
        gradients_of_scores(rows, keys, b, b.delta + t * kMR, row_lse, c, s.scale);
        for_equal_spans(rows, keys, [&](int r, int n_rows, Span see) {
          add_weighted<kKeyStep>(n_rows, see.end - see.begin, b.ds_row + r * kKeyStep + see.begin, 1, dim,
                                 [&](int64_t j) { return key_line(int(see.begin + j)); }, b.dq + t * along + r * kNR);
        });
        add_to_keys(rows, keys, dim, b.ds_row, [&](int r) { return q + offset[r]; }, b.dk);
        add_to_keys(rows, keys, dim, b.p_row, [&](int r) { return dout + offset[r]; }, b.dv);
      }
      for (int tile = 0; tile * kMR < keys.count; tile++) {
        const int rows = keys.count - tile * kMR < kMR ? keys.count - tile * kMR : kMR;
        const int64_t at = base + (block + tile * kMR) * key_row;
        store_rows(rows, dim, b.dk + tile * along, [&](int r) { return dk + at + r * key_row; });
        store_rows(rows, dim, b.dv + tile * along, [&](int r) { return dv + at + r * key_row; });
      }
    }
    for (int64_t t = 0; t < tiles; t++) {
      const Rows rows = tile_rows(t);
      store_rows(rows.count, dim, b.dq + t * along, [&](int r) { return dq + head.offset(rows.first + r); });
    }
  });
}

}  // namespace zerokl::ZEROKL_ISA
