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

// Floats of one [dim panel][kMR][kNR] tile.
int64_t tile_size(int64_t dim) { return (dim + kNR - 1) / kNR * kMR * kNR; }

Buffers carve(int64_t tiles, int64_t dim, int64_t v_dim) {
  constexpr int64_t panels = kAttentionBlock / kNR, score = panels * kMR * kNR;
  const int64_t rows = words_of(tiles, dim, kMR) + words_of(tiles, v_dim, kMR), keys = words_of(panels, dim, kNR) + words_of(panels, v_dim, kNR);
  const int64_t total = rows + keys + tiles * (kMR + tile_size(dim)) + kKeyTiles * (tile_size(dim) + tile_size(v_dim)) + 2 * score +
                        2 * kMR * kKeyStep;
  float* at = static_cast<float*>(scratch(Slot::kAttention, sizeof(float) * size_t(total)));
  auto take = [&](int64_t n) { float* p = at; at += n; return p; };
  auto take_words = [&](int64_t n) { return reinterpret_cast<int32_t*>(take(n)); };
  Buffers b;
  b.q = take_words(words_of(tiles, dim, kMR));
  b.g = take_words(words_of(tiles, v_dim, kMR));
  b.k = take_words(words_of(panels, dim, kNR));
  b.v = take_words(words_of(panels, v_dim, kNR));
  b.delta = take(tiles * kMR);
  b.dq = take(tiles * tile_size(dim));
  b.dk = take(kKeyTiles * tile_size(dim));
  b.dv = take(kKeyTiles * tile_size(v_dim));
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
                        [&](int64_t k) { return line(r + int(k)); }, d + tile * tile_size(dim) + s.begin * kNR);
      r = end;
    }
  }
}

}  // namespace

static void backward_of_head(const AttentionShape& s, const Heads& head, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                             const uint16_t* out, const float* lse, const uint16_t* dout, uint16_t* dq, uint16_t* dk, uint16_t* dv,
                             float* dsink_rows) {
  const int64_t dim = s.dim, v_dim = s.v_dim, count = head.span.count * head.group, tiles = (count + kMR - 1) / kMR;
  const int64_t q_tile = steps_of(dim) * kMR, g_tile = steps_of(v_dim) * kMR, dq_tile = tile_size(dim);
  const float c = s.scale * kLog2e;
  const Buffers b = carve(tiles, dim, v_dim);
  auto tile_rows = [&](int64_t t) { return head.rows(t * kMR, count - t * kMR < kMR ? int(count - t * kMR) : kMR, s); };
  auto key_row = [&](int64_t key) { return (head.span.row + key) * s.kv_heads + head.kv; };
  for (int64_t t = 0; t < tiles; t++) {
    const Rows rows = tile_rows(t);
    pack_lines([&](int r) { return q + head.index(rows.first + r) * dim; }, rows.count, 0, dim, kMR, b.q + t * q_tile);
    pack_lines([&](int r) { return dout + head.index(rows.first + r) * v_dim; }, rows.count, 0, v_dim, kMR, b.g + t * g_tile);
    for (int r = 0; r < rows.count; r++) {
      const int64_t row = rows.first + r, at = head.index(row);
      float sum = 0.0f;
      for (int64_t d = 0; d < v_dim; d++) sum = fma1(from_bf16(dout[at * v_dim + d]), from_bf16(out[at * v_dim + d]), sum);
      b.delta[t * kMR + r] = sum;
      if (dsink_rows) dsink_rows[at] = exp2_1(s.sinks[head.head(row)] * kLog2e - lse[at]) * sum;
    }
  }
  zero(b.dq, tiles * dq_tile);
  for (int64_t block = 0; block < head.keys; block += kAttentionBlock) {
    const KeyBlock keys{block, head.keys - block < kAttentionBlock ? int(head.keys - block) : kAttentionBlock};
    auto key_line = [&](int j) { return k + key_row(block + j) * dim; };
    pack_keys(keys.count, dim, key_line, b.k);
    pack_keys(keys.count, v_dim, [&](int j) { return v + key_row(block + j) * v_dim; }, b.v);
    zero(b.dk, kKeyTiles * tile_size(dim));
    zero(b.dv, kKeyTiles * tile_size(v_dim));
    for (int64_t t = 0; t < tiles; t++) {
      const Rows rows = tile_rows(t);
      if (rows.end_key(rows.count - 1) <= block || rows.begin_key(0) >= block + kAttentionBlock) continue;
      products(rows.count, dim, b.q + t * q_tile, keys.panels(), b.k, b.s);
      products(rows.count, v_dim, b.g + t * g_tile, keys.panels(), b.v, b.dp);
      float row_lse[kMR];
      int64_t index[kMR];
      for (int r = 0; r < rows.count; r++) {
        index[r] = head.index(rows.first + r);
        row_lse[r] = lse[index[r]];
      }
      gradients_of_scores(rows, keys, b, b.delta + t * kMR, row_lse, c, s.scale);
      for_equal_spans(rows, keys, [&](int r, int n_rows, Span see) {
        add_weighted<kKeyStep>(n_rows, see.end - see.begin, b.ds_row + r * kKeyStep + see.begin, 1, dim,
                               [&](int64_t j) { return key_line(int(see.begin + j)); }, b.dq + t * dq_tile + r * kNR);
      });
      add_to_keys(rows, keys, dim, b.ds_row, [&](int r) { return q + index[r] * dim; }, b.dk);
      add_to_keys(rows, keys, v_dim, b.p_row, [&](int r) { return dout + index[r] * v_dim; }, b.dv);
    }
    for (int tile = 0; tile * kMR < keys.count; tile++) {
      const int rows = keys.count - tile * kMR < kMR ? keys.count - tile * kMR : kMR;
      const int64_t first = block + tile * kMR;
      store_rows(rows, dim, b.dk + tile * tile_size(dim), [&](int r) { return dk + key_row(first + r) * dim; });
      store_rows(rows, v_dim, b.dv + tile * tile_size(v_dim), [&](int r) { return dv + key_row(first + r) * v_dim; });
    }
  }
  for (int64_t t = 0; t < tiles; t++) {
    const Rows rows = tile_rows(t);
    store_rows(rows.count, dim, b.dq + t * dq_tile, [&](int r) { return dq + head.index(rows.first + r) * dim; });
  }
}

void attention_backward(const AttentionShape& s, int64_t sequences, const int32_t* cu_seqlens, const uint16_t* q, const uint16_t* k,
                        const uint16_t* v, const uint16_t* out, const float* lse, const uint16_t* dout, uint16_t* dq, uint16_t* dk,
                        uint16_t* dv, float* dsink_rows, float* dsinks) {
  parallel_for(sequences * s.kv_heads, [&](int64_t task) {
    const int64_t sequence = task / s.kv_heads, first = cu_seqlens[sequence], count = cu_seqlens[sequence + 1] - first;
    const Heads head{s.heads / s.kv_heads, task % s.kv_heads, s.heads, {first, count, 0}, count};
    if (count > 0) backward_of_head(s, head, q, k, v, out, lse, dout, dq, dk, dv, dsink_rows);
  });
  if (!dsinks) return;
  for (int64_t h = 0; h < s.heads; h++) {
    dsinks[h] = 0.0f;
    for (int64_t t = 0; t < cu_seqlens[sequences]; t++) dsinks[h] = dsinks[h] - dsink_rows[t * s.heads + h];
  }
}

}  // namespace zerokl::ZEROKL_ISA
