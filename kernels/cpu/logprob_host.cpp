// Selected log-probabilities over blocks of the vocabulary, their gradient, and sampling: row kernels put in order.
// No [tokens, vocabulary] tensor is ever stored, only blocks of a few hundred rows.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "logprob_host.h"

namespace zerokl {

namespace {

constexpr int64_t kRowBlock = 288;                    // rows that share one pass over a vocabulary segment
constexpr int64_t kFullRowBytes = int64_t(16) << 20;  // top-p / top-k need whole rows: this much of them at a time
constexpr int64_t kFewEntries = 256;                  // entries a top-p mass usually ends within
constexpr float kInf = std::numeric_limits<float>::infinity();

// Buffers that live as long as a call.
using Floats = std::vector<float>;

RowSum sum_of(int64_t vocab, const float* z, bool moment) {
  RowSum s;
  const Vocabulary v{vocab, 0, kVocabSegments};
  for (int64_t g = 0; g < kVocabSegments; g++) s.segment(g, v.size(g), z + v.column(g), moment);
  s.merge();
  return s;
}

}  // namespace

RowSum::RowSum() { std::fill(maximum, maximum + kVocabSegments, -kInf); }

void RowSum::segment(int64_t g, int64_t n, const float* z, bool with_moment) {
  ZEROKL_CALL(row_sum, n, z, maximum + g, sum + g, with_moment ? moment + g : nullptr);
}

void RowSum::merge() { ZEROKL_CALL(merge_sums, kVocabSegments, maximum, sum, moment); }

// Indices by (z descending, index ascending), no NaN among z: a stable radix sort of the bits, turned so that they descend.
void sort_descending(int64_t n, const float* z, std::vector<int32_t>& order) {
  constexpr int kBits = 11, kPasses = 3;
  struct Entry { uint32_t key; int32_t index; };
  std::vector<Entry> entries(static_cast<size_t>(n)), next(entries.size());
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = std::bit_cast<uint32_t>(z[i] + 0.0f);  // both zeros are equal
    entries[size_t(i)] = {bits >> 31 ? bits : ~bits & 0x7fffffffu, int32_t(i)};
  }
  for (int pass = 0; pass < kPasses; pass++) {
    const auto digit = [&](const Entry& e) { return e.key >> (pass * kBits) & ((1u << kBits) - 1); };
    uint32_t start[(1 << kBits) + 1] = {};
    for (const Entry& e : entries) start[digit(e) + 1]++;
    for (int d = 0; d < 1 << kBits; d++) start[d + 1] += start[d];
    for (const Entry& e : entries) next[start[digit(e)]++] = e;
    entries.swap(next);
  }
  for (size_t i = 0; i < entries.size(); i++) order[i] = entries[i].index;
}

// The last entry kept, in the order (z descending, index ascending): rank < top_k, and the mass before it < top_p of all.
// Mass is added in that order in fp32; rank 0 is always kept.
Cut find_cut(int64_t vocab, const float* z, float top_p, int64_t top_k) {
  if (top_p >= 1.0f && (top_k <= 0 || top_k >= vocab)) return {-kInf, vocab};
  const RowSum all = sum_of(vocab, z, false);
  if (std::isnan(all.sum[0])) return {-kInf, vocab};
  Floats e(static_cast<size_t>(vocab));
  ZEROKL_CALL(row_weights, vocab, z, all.maximum[0], e.data());
  std::vector<int32_t> order(static_cast<size_t>(vocab));
  std::iota(order.begin(), order.end(), 0);
  auto before = [&](int32_t a, int32_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); };
  const float limit = top_p * all.sum[0];
  const int64_t most = top_k > 0 ? std::min(top_k, vocab) : vocab;
  float mass = 0.0f;
  int64_t rank = 0, sorted = 0;
  for (; rank < most && (rank == 0 || top_p >= 1.0f || mass < limit); rank++) {
    if (rank == sorted) {
      // the mass usually ends within a few hundred entries; what does not is sorted as a whole
      sorted = rank == 0 ? std::min(kFewEntries, vocab) : vocab;
      if (rank == 0)
        std::partial_sort(order.begin(), order.begin() + sorted, order.end(), before);
      else
        sort_descending(vocab, z, order);
    }
    mass += e[static_cast<size_t>(order[static_cast<size_t>(rank)])];
  }
  const int32_t last = order[static_cast<size_t>(rank - 1)];
  return {z[last], last};
}

void score_row(int64_t vocab, float* z, const Cut& cut, int64_t target, bool entropy, RowScore& out) {
  if (cut.value > -kInf) ZEROKL_CALL(row_keep, vocab, z, 0, cut.value, cut.index);
  const RowSum s = sum_of(vocab, z, entropy);
  out = {ZEROKL_CALL(selected, z[target], s.maximum[0], s.sum[0]), s.maximum[0], s.sum[0],
         entropy ? ZEROKL_CALL(entropy, s.sum[0], s.moment[0]) : 0.0f, cut};
}

// Whole rows at once: needed as soon as one row of the call filters.
static void score_filtered(const Hidden& h, const Sampling& p, const int64_t* targets, bool entropy, RowScore* out) {
  const int64_t block = std::max<int64_t>(12, kFullRowBytes / 4 / h.vocab);
  Floats logits(static_cast<size_t>(std::min(block, h.rows) * h.vocab));
  for (int64_t first = 0; first < h.rows; first += block) {
    const int64_t rows = std::min(block, h.rows - first);
    ZEROKL_CALL(fp32_gemm, rows, h.vocab, h.width, h.x + first * h.width, h.w, logits.data());
    parallel_for(rows, [&](int64_t r) {
      float* z = logits.data() + r * h.vocab;
      const int64_t row = first + r;
      ZEROKL_CALL(row_scale, h.vocab, z, p.temperature[row], z);
      score_row(h.vocab, z, find_cut(h.vocab, z, p.top_p[row], p.top_k[row]), targets[row], entropy, out[row]);
    });
  }
}

void score_segments(const Hidden& h, const float* temperature, const int64_t* targets, bool entropy, RowSum* sums, float* hit) {
  const Vocabulary& v = h.vocabulary;
  Floats logits(static_cast<size_t>(std::min(kRowBlock, h.rows) * v.width()));
  std::fill(hit, hit + h.rows, 0.0f);
  for (int64_t first = 0; first < h.rows; first += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, h.rows - first);
    for (int64_t g = v.first; g < v.end(); g++) {
      const int64_t n = v.size(g);
      if (n > 0) ZEROKL_CALL(fp32_gemm, rows, n, h.width, h.x + first * h.width, h.head(g), logits.data());
      parallel_for(rows, [&](int64_t r) {
        float* z = logits.data() + r * n;
        const int64_t row = first + r, target = targets[row] - v.column(g);
        ZEROKL_CALL(row_scale, n, z, temperature[row], z);
        sums[row].segment(g, n, z, entropy);
        if (target >= 0 && target < n) hit[row] = z[target];
      });
    }
  }
}

RowScore finish_score(RowSum s, float hit, bool entropy) {
  s.merge();
  return {ZEROKL_CALL(selected, hit, s.maximum[0], s.sum[0]), s.maximum[0], s.sum[0],
          entropy ? ZEROKL_CALL(entropy, s.sum[0], s.moment[0]) : 0.0f, Cut{-kInf, 0}};
}

void score(const Hidden& h, const Sampling& p, const int64_t* targets, bool entropy, RowScore* out) {
  if (p.filters(h.rows, h.vocab)) return score_filtered(h, p, targets, entropy, out);
  std::vector<RowSum> sums(static_cast<size_t>(h.rows));
  Floats hit(static_cast<size_t>(h.rows));
  score_segments(h, p.temperature, targets, entropy, sums.data(), hit.data());
  for (int64_t r = 0; r < h.rows; r++) out[r] = finish_score(sums[static_cast<size_t>(r)], hit[static_cast<size_t>(r)], entropy);
}

// out = the balanced fp32 tree over `count` (a power of two) neighbouring parts of n numbers each.
static void add_parts(int64_t count, int64_t n, float* parts, float* out) {
  for (int64_t half = 1; half < count; half *= 2)
    for (int64_t g = 0; g + half < count; g += 2 * half) {
      float *a = parts + g * n, *b = parts + (g + half) * n;
      for (int64_t i = 0; i < n; i++) a[i] = a[i] + b[i];
    }
  std::copy(parts, parts + n, out);
}

// Recomputes the logits segment by segment, turns them into their bf16 gradient, and multiplies on: dw over ascending
// tokens, dh over each segment's ascending vocabulary, the segments added as a tree.
void score_backward(const Hidden& h, const float* temperature, const int64_t* targets, const RowScore* scores, const float* grad, float* dh,
                    float* dw) {
  const Vocabulary& v = h.vocabulary;
  const int64_t most = std::min(kRowBlock, h.rows);
  Floats logits(static_cast<size_t>(most * v.width())), parts(dh ? static_cast<size_t>(v.count * most * h.width) : 0);
  std::vector<uint16_t> gradient(logits.size());
  for (int64_t first = 0; first < h.rows; first += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, h.rows - first);
    const uint16_t* x = h.x + first * h.width;
    for (int64_t g = v.first; g < v.end(); g++) {
      const int64_t n = v.size(g);
      const uint16_t* w = h.head(g);
      if (n > 0) ZEROKL_CALL(fp32_gemm, rows, n, h.width, x, w, logits.data());
      parallel_for(rows, [&](int64_t r) {
        float* z = logits.data() + r * n;
        const int64_t row = first + r;
        const RowScore& s = scores[row];
        ZEROKL_CALL(row_scale, n, z, temperature[row], z);
        ZEROKL_CALL(row_grad, n, z, v.column(g), s.maximum, s.sum, targets[row], grad[row], temperature[row], s.cut.value, s.cut.index,
                    gradient.data() + r * n);
      });
      if (dh) ZEROKL_CALL(linear_dx, rows, n, h.width, gradient.data(), w, parts.data() + (g - v.first) * rows * h.width, false, false);
      if (dw && n > 0) ZEROKL_CALL(linear_dw, rows, n, h.width, gradient.data(), x, dw + (w - h.w));
    }
    if (dh) add_parts(v.count, rows * h.width, parts.data(), dh + first * h.width);
  }
}

void sample_rows(int64_t rows, int64_t vocab, const float* logits, const Sampling& p, const int64_t* seed, const int64_t* position,
                 int64_t* token, float* logprob, float* raw) {
  parallel_for(rows, [&](int64_t r) {
    const float* z = logits + r * vocab;
    const RowSum plain = sum_of(vocab, z, false);
    if (p.temperature[r] == 0.0f) {
      token[r] = ZEROKL_CALL(argmax, vocab, z);
      logprob[r] = raw[r] = ZEROKL_CALL(selected, z[token[r]], plain.maximum[0], plain.sum[0]);
      return;
    }
    float* scaled = static_cast<float*>(scratch(Slot::kRow, size_t(vocab) * sizeof(float)));
    ZEROKL_CALL(row_scale, vocab, z, p.temperature[r], scaled);
    const Cut cut = find_cut(vocab, scaled, p.top_p[r], p.top_k[r]);
    if (cut.value > -kInf) ZEROKL_CALL(row_keep, vocab, scaled, 0, cut.value, cut.index);
    token[r] = ZEROKL_CALL(gumbel_argmax, vocab, scaled, seed[r], position[r]);
    raw[r] = ZEROKL_CALL(selected, z[token[r]], plain.maximum[0], plain.sum[0]);
    const RowSum s = sum_of(vocab, scaled, false);
    logprob[r] = ZEROKL_CALL(selected, scaled[token[r]], s.maximum[0], s.sum[0]);
  });
}

}  // namespace zerokl
