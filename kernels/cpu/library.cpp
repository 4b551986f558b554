// The operators: schemas under zerokl::, CPU implementations. Outputs are allocated by the caller (kernels/ops), so the
// schemas say what is written. Shapes are checked there too; here only what memory safety needs.
#include <memory>
#include <vector>

#include "host.h"
#include "logprob_host.h"

namespace zerokl {

void set_isa(int64_t wanted);
int64_t best_isa();

namespace {

using Optional = std::optional<Tensor>;

void op_linear(const Tensor x, const Tensor w, const Optional bias, int64_t segments, const Tensor y) {
  const int64_t n = w.size(0), k = w.size(1);
  const int64_t m = k ? x.numel() / k : 0;
  STD_TORCH_CHECK(segments >= 1 && (segments & (segments - 1)) == 0 && (segments == 1 || k % (2 * segments) == 0),
                  "zerokl::linear: segments must be a power of two that cuts K into even parts");
  STD_TORCH_CHECK(y.numel() == m * n, "zerokl::linear: y has the wrong size");
  void* out = is_bf16(y) ? static_cast<void*>(data<uint16_t>(y)) : data<float>(y);
  ZEROKL_CALL(linear, m, n, k, data<uint16_t>(x), data<uint16_t>(w), data<float>(bias), out, is_bf16(y), int(segments));
}

void op_read(const Tensor w, const Tensor sum) {
  STD_TORCH_CHECK(w.numel() % 2 == 0 && sum.numel() == 1, "zerokl::read: w must be whole words, sum one");
  ZEROKL_CALL(read, w.numel() / 2, reinterpret_cast<const int32_t*>(data<uint16_t>(w)), data<int32_t>(sum));
}

void op_linear_dx(const Tensor dy, const Tensor w, const Tensor dx) {
  const int64_t n = w.size(0), k = w.size(1), m = dy.numel() / n;
  STD_TORCH_CHECK(dx.numel() == m * k, "zerokl::linear_dx: dx has the wrong size");
  ZEROKL_CALL(linear_dx, m, n, k, data<uint16_t>(dy), data<uint16_t>(w), data<uint16_t>(dx), true, false);
}

void op_linear_dw(const Tensor dy, const Tensor x, const Tensor dw) {
  const int64_t n = dw.size(0), k = dw.size(1), m = dy.numel() / n;
  STD_TORCH_CHECK(x.numel() == m * k, "zerokl::linear_dw: x and dy disagree");
  ZEROKL_CALL(linear_dw, m, n, k, data<uint16_t>(dy), data<uint16_t>(x), data<float>(dw));
}

void op_bias_grad(const Tensor dy, const Tensor db) {
  const int64_t n = db.numel();
  ZEROKL_CALL(bias_grad, dy.numel() / n, n, data<uint16_t>(dy), data<float>(db));
}

void check_ids(const Tensor& ids, int64_t rows) {
  const int64_t* p = data<int64_t>(ids);
  for (int64_t i = 0; i < ids.numel(); i++)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < rows, "zerokl: index ", p[i], " at ", i, " lies outside [0, ", rows, ")");
}

void op_embedding(const Tensor ids, const Tensor w, const Tensor y) {
  check_ids(ids, w.size(0));
  ZEROKL_CALL(embedding, ids.numel(), w.size(1), data<int64_t>(ids), data<uint16_t>(w), data<uint16_t>(y));
}

void op_embedding_dw(const Tensor ids, const Tensor dy, const Tensor dw) {
  check_ids(ids, dw.size(0));
  ZEROKL_CALL(embedding_dw, ids.numel(), dw.size(1), data<int64_t>(ids), data<uint16_t>(dy), data<float>(dw));
}

void op_rms_norm(const Tensor x, const Optional residual, const Tensor w, double eps, const Tensor y, const Optional sum) {
  const int64_t n = w.numel();
  ZEROKL_CALL(rms_norm, x.numel() / n, n, data<uint16_t>(x), data<uint16_t>(residual), data<uint16_t>(w), float(eps), data<uint16_t>(y),
              data<uint16_t>(sum));
}

void op_rms_norm_backward(const Tensor x, const Tensor w, double eps, const Tensor dy, const Optional dsum, const Tensor dx, const Optional dw) {
  const int64_t n = w.numel();
  ZEROKL_CALL(rms_norm_backward, x.numel() / n, n, data<uint16_t>(x), data<uint16_t>(w), float(eps), data<uint16_t>(dy),
              data<uint16_t>(dsum), data<uint16_t>(dx), data<float>(dw));
}

void op_rotary(const Tensor x, const Tensor positions, const Tensor table, bool interleaved, bool inverse, const Tensor y) {
  STD_TORCH_CHECK(x.stride(2) == 1, "zerokl::rotary: the head dimension must be contiguous");
  check_ids(positions, table.size(0));
  ZEROKL_CALL(rotary, x.size(0), x.size(1), x.size(2), table.size(1), data<uint16_t>(x, true), x.stride(0), x.stride(1),
              data<int64_t>(positions), data<float>(table), interleaved, inverse, data<uint16_t>(y));
}

void op_silu_and_mul(const Tensor x, const Optional row_weight, const Tensor y) {
  const int64_t n = x.size(x.dim() - 1) / 2;
  ZEROKL_CALL(silu_and_mul, y.numel() / n, n, data<uint16_t>(x), data<float>(row_weight), data<uint16_t>(y));
}

void op_silu_and_mul_backward(const Tensor x, const Optional row_weight, const Tensor dy, const Tensor dx, const Optional drow_weight) {
  const int64_t n = x.size(x.dim() - 1) / 2;
  ZEROKL_CALL(silu_and_mul_backward, dy.numel() / n, n, data<uint16_t>(x), data<float>(row_weight), data<uint16_t>(dy), data<uint16_t>(dx),
              data<float>(drow_weight));
}

AttentionShape shape_of(const Tensor& q, int64_t kv_heads, int64_t v_dim, double scale, bool causal, int64_t window, const Optional& sinks) {
  return {q.size(1), kv_heads, q.size(2), v_dim, float(scale), causal, window, data<float>(sinks)};
}

// The number of sequences that cu_seqlens cuts `tokens` into.
int64_t sequences_of(const Tensor& cu_seqlens, int64_t tokens) {
  const int32_t* ends = data<int32_t>(cu_seqlens);
  const int64_t count = cu_seqlens.numel() - 1;
  bool ascending = ends[0] == 0 && ends[count] == tokens;
  for (int64_t b = 0; b < count; b++) ascending = ascending && ends[b] <= ends[b + 1];
  STD_TORCH_CHECK(ascending, "zerokl.kernels.attention_varlen: cu_seqlens must ascend from 0 to ", tokens);
  return count;
}

void op_attention_varlen(const Tensor q, const Tensor k, const Tensor v, const Tensor cu_seqlens, double scale, bool causal, int64_t window,
                         const Optional sinks, const Tensor out, const Tensor lse) {
  ZEROKL_CALL(attention_varlen, shape_of(q, k.size(1), v.size(2), scale, causal, window, sinks), sequences_of(cu_seqlens, q.size(0)), data<int32_t>(cu_seqlens),
              data<uint16_t>(q), data<uint16_t>(k), data<uint16_t>(v), data<uint16_t>(out), data<float>(lse));
}

void op_attention_backward(const Tensor q, const Tensor k, const Tensor v, const Tensor cu_seqlens, double scale, bool causal, int64_t window,
                           const Optional sinks, const Tensor out, const Tensor lse, const Tensor dout, const Tensor dq, const Tensor dk,
                           const Tensor dv, const Optional dsink_rows, const Optional dsinks) {
  ZEROKL_CALL(attention_backward, shape_of(q, k.size(1), v.size(2), scale, causal, window, sinks), sequences_of(cu_seqlens, q.size(0)), data<int32_t>(cu_seqlens),
              data<uint16_t>(q), data<uint16_t>(k), data<uint16_t>(v), data<uint16_t>(out), data<float>(lse), data<uint16_t>(dout),
              data<uint16_t>(dq), data<uint16_t>(dk), data<uint16_t>(dv), data<float>(dsink_rows), data<float>(dsinks));
}

void op_attention_paged(const Tensor q, const Tensor k_cache, const Tensor v_cache, const Tensor page_table, const Tensor seq_lens,
                        const Tensor q_lens, double scale, int64_t window, const Optional sinks, const Tensor out) {
  const PageTable pages{data<int32_t>(page_table), page_table.size(1), k_cache.size(1)};
  const int32_t *lens = data<int32_t>(seq_lens), *queries = data<int32_t>(q_lens);
  int64_t total = 0;
  for (int64_t b = 0; b < seq_lens.numel(); b++) {
    STD_TORCH_CHECK(queries[b] >= 0 && lens[b] >= queries[b], "zerokl::attention_paged: sequence ", b, " has more queries than keys");
    const int64_t used = (lens[b] + pages.page - 1) / pages.page;
    STD_TORCH_CHECK(used <= pages.max_pages, "zerokl::attention_paged: sequence ", b, " is longer than its page table");
    for (int64_t i = 0; i < used; i++) {
      const int32_t page = pages.table[b * pages.max_pages + i];
      STD_TORCH_CHECK(page >= 0 && page < k_cache.size(0), "zerokl::attention_paged: sequence ", b, " names page ", page, " of ", k_cache.size(0));
    }
    total += queries[b];
  }
  STD_TORCH_CHECK(total == q.size(0), "zerokl::attention_paged: q_lens add up to ", total, ", q has ", q.size(0), " rows");
  ZEROKL_CALL(attention_paged, shape_of(q, k_cache.size(2), v_cache.size(3), scale, true, window, sinks), seq_lens.numel(), pages, lens, queries, data<uint16_t>(q),
              data<uint16_t>(k_cache), data<uint16_t>(v_cache), data<uint16_t>(out));
}

Sampling sampling_of(const Tensor& temperature, const Tensor& top_p, const Tensor& top_k) {
  return {data<float>(temperature), data<float>(top_p), data<int32_t>(top_k)};
}

// `greedy`: temperature 0 is allowed.
void check_sampling(const char* op, const Sampling& p, int64_t rows, bool greedy) {
  for (int64_t r = 0; r < rows; r++) {
    STD_TORCH_CHECK(p.temperature[r] > 0 || (greedy && p.temperature[r] == 0), "zerokl.kernels.", op, ": temperature ", p.temperature[r],
                    " of row ", r, greedy ? " must not be negative" : " must be positive; score greedy tokens at temperature 1");
    STD_TORCH_CHECK(p.top_p[r] > 0 && p.top_p[r] <= 1, "zerokl.kernels.", op, ": top_p ", p.top_p[r], " of row ", r, " must lie in (0, 1]");
  }
}

// state [rows, 2] fp32 (maximum, sum), cut [rows] fp32, cut_index [rows]: what the backward needs.
void write_scores(const std::vector<RowScore>& scores, const Tensor& logprob, const Optional& entropy, const Optional& state,
                  const Optional& cut, const Optional& cut_index) {
  float *lp = data<float>(logprob), *h = data<float>(entropy), *s = data<float>(state), *c = data<float>(cut);
  int64_t* i = data<int64_t>(cut_index);
  for (size_t r = 0; r < scores.size(); r++) {
    lp[r] = scores[r].logprob;
    if (h) h[r] = scores[r].entropy;
    if (s) s[2 * r] = scores[r].maximum, s[2 * r + 1] = scores[r].sum;
    if (c) c[r] = scores[r].cut.value;
    if (i) i[r] = scores[r].cut.index;
  }
}

// The head of rank `rank` of `ranks` that share a vocabulary of `total`.
Hidden hidden_of(const Tensor& x, const Tensor& w, int64_t total, int64_t rank, int64_t ranks) {
  STD_TORCH_CHECK(ranks > 0 && kVocabSegments % ranks == 0 && rank >= 0 && rank < ranks, "zerokl.kernels.selected_logprob: rank ", rank, " of ",
                  ranks, "; supported: 1, 2, 4 or ", kVocabSegments, " ranks");
  const Vocabulary v{total, rank * (kVocabSegments / ranks), kVocabSegments / ranks};
  STD_TORCH_CHECK(v.column(v.end()) - v.column(v.first) == w.size(0), "zerokl.kernels.selected_logprob: w has ", w.size(0), " rows, rank ", rank,
                  " of ", ranks, " holds ", v.column(v.end()) - v.column(v.first), " of a vocabulary of ", total);
  return {x.size(0), x.size(1), w.size(0), data<uint16_t>(x), data<uint16_t>(w), v};
}

void op_selected_logprob(const Tensor hidden, const Tensor w, const Tensor targets, const Tensor temperature, const Tensor top_p,
                         const Tensor top_k, const Tensor logprob, const Optional entropy, const Tensor state, const Tensor cut,
                         const Tensor cut_index) {
  const Hidden h = hidden_of(hidden, w, w.size(0), 0, 1);
  const Sampling p = sampling_of(temperature, top_p, top_k);
  check_ids(targets, h.vocab);
  check_sampling("selected_logprob", p, h.rows, false);
  std::vector<RowScore> scores(static_cast<size_t>(h.rows));
  score(h, p, data<int64_t>(targets), entropy.has_value(), scores.data());
  write_scores(scores, logprob, entropy, state, cut, cut_index);
}

void op_selected_logprob_backward(const Tensor hidden, const Tensor w, const Tensor targets, const Tensor temperature, const Tensor state,
                                  const Tensor cut, const Tensor cut_index, int64_t total, int64_t rank, int64_t ranks, const Tensor grad,
                                  const Optional dhidden, const Optional dw) {
  const Hidden h = hidden_of(hidden, w, total, rank, ranks);
  std::vector<RowScore> scores(static_cast<size_t>(h.rows));
  const float *s = data<float>(state), *c = data<float>(cut);
  for (int64_t r = 0; r < h.rows; r++) scores[static_cast<size_t>(r)] = {0.0f, s[2 * r], s[2 * r + 1], 0.0f, {c[r], data<int64_t>(cut_index)[r]}};
  score_backward(h, data<float>(temperature), data<int64_t>(targets), scores.data(), data<float>(grad), data<float>(dhidden), data<float>(dw));
}

// sums [rows, segments held, 3]: maximum, sum, moment.
void op_logprob_segments(const Tensor hidden, const Tensor w, const Tensor targets, const Tensor temperature, int64_t total, int64_t rank,
                         int64_t ranks, bool moment, const Tensor sums, const Tensor hit) {
  const Hidden h = hidden_of(hidden, w, total, rank, ranks);
  check_ids(targets, total);
  for (int64_t r = 0; r < h.rows; r++)
    STD_TORCH_CHECK(data<float>(temperature)[r] > 0, "zerokl.kernels.selected_logprob: temperature of row ", r, " must be positive");
  std::vector<RowSum> rows(static_cast<size_t>(h.rows));
  score_segments(h, data<float>(temperature), data<int64_t>(targets), moment, rows.data(), data<float>(hit));
  float* out = data<float>(sums);
  for (const RowSum& row : rows)
    for (int64_t g = h.vocabulary.first; g < h.vocabulary.end(); g++) {
      *out++ = row.maximum[g];
      *out++ = row.sum[g];
      *out++ = row.moment[g];
    }
}

void op_logprob_merge(const Tensor sums, const Tensor hit, const Tensor logprob, const Optional entropy, const Tensor state) {
  const float* in = data<float>(sums);
  std::vector<RowScore> scores;
  for (int64_t r = 0; r < hit.numel(); r++) {
    RowSum row;
    for (int64_t g = 0; g < kVocabSegments; g++, in += 3) row.maximum[g] = in[0], row.sum[g] = in[1], row.moment[g] = in[2];
    scores.push_back(finish_score(row, data<float>(hit)[r], entropy.has_value()));
  }
  write_scores(scores, logprob, entropy, state, std::nullopt, std::nullopt);
}

void op_logprob_from_logits(const Tensor logits, const Tensor targets, const Tensor temperature, const Tensor top_p, const Tensor top_k,
                            const Tensor logprob, const Optional entropy) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_ids(targets, vocab);
  const Sampling p = sampling_of(temperature, top_p, top_k);
  check_sampling("logprob_from_logits", p, rows, false);
  std::vector<RowScore> scores(static_cast<size_t>(rows));
  const float* z = data<float>(logits);
  const int64_t* target = data<int64_t>(targets);
  parallel_for(rows, [&](int64_t r) {
    float* scaled = static_cast<float*>(scratch(Slot::kRow, size_t(vocab) * sizeof(float)));
    ZEROKL_CALL(row_scale, vocab, z + r * vocab, p.temperature[r], scaled);
    score_row(vocab, scaled, find_cut(vocab, scaled, p.top_p[r], p.top_k[r]), target[r], entropy.has_value(), scores[static_cast<size_t>(r)]);
  });
  write_scores(scores, logprob, entropy, std::nullopt, std::nullopt, std::nullopt);
}

void op_sample(const Tensor logits, const Tensor temperature, const Tensor top_p, const Tensor top_k, const Tensor seed, const Tensor position,
               const Tensor token, const Tensor logprob, const Tensor raw_logprob) {
  const Sampling p = sampling_of(temperature, top_p, top_k);
  check_sampling("sample", p, logits.size(0), true);
  sample_rows(logits.size(0), logits.size(1), data<float>(logits), p, data<int64_t>(seed),
              data<int64_t>(position), data<int64_t>(token), data<float>(logprob), data<float>(raw_logprob));
}

using Tensors = std::vector<Tensor>;

Format format_of(int64_t quantizer, int64_t rows, int64_t columns) {
  const Quantizer q{quantizer};
  const ScaleType scale = q == Quantizer::kInt4 ? ScaleType::kBf16
                          : q == Quantizer::kMxRceil || q == Quantizer::kMxFloor ? ScaleType::kE8m0 : ScaleType::kFp32;
  return {q, scale, int(rows), int(columns)};
}

// A matrix, cut into stripes of whole blocks.
void add_stripes(const Format& f, const Stripe& matrix, std::vector<Stripe>& stripes) {
  const int64_t k = matrix.k, height = f.rows == 1 ? 16 : f.rows, code_bytes = f.quantizer == Quantizer::kInt4 ? k / 2 : k;
  const int64_t scale_bytes = f.scale == ScaleType::kFp32 ? 4 : f.scale == ScaleType::kBf16 ? 2 : 1;
  for (int64_t r = 0; r < matrix.rows; r += height)
    stripes.push_back({matrix.x + r * k, matrix.codes + r * code_bytes,
                       static_cast<uint8_t*>(matrix.scales) + r / f.rows * ((k + f.columns - 1) / f.columns) * scale_bytes,
                       matrix.rows - r < height ? matrix.rows - r : height, k});
}

// The matrices, cut into stripes of whole blocks: one flat list of tasks whatever the number and sizes of tensors.
std::vector<Stripe> stripes_of(const Format& f, const Tensors& x, const Tensors& codes, const Tensors& scales) {
  STD_TORCH_CHECK(codes.size() == x.size() && scales.size() == x.size(), "zerokl::quantize: as many codes and scales as tensors are needed");
  std::vector<Stripe> stripes;
  for (size_t i = 0; i < x.size(); i++) {
    const int64_t k = x[i].size(x[i].dim() - 1), rows = k ? x[i].numel() / k : 0, blocks = (k + f.columns - 1) / f.columns;
    const int64_t code_bytes = f.quantizer == Quantizer::kInt4 ? k / 2 : k;
    const int64_t scale_bytes = f.scale == ScaleType::kFp32 ? 4 : f.scale == ScaleType::kBf16 ? 2 : 1;
    STD_TORCH_CHECK(codes[i].numel() == rows * code_bytes, "zerokl::quantize: codes ", i, " have the wrong size");
    STD_TORCH_CHECK(scales[i].numel() == (rows + f.rows - 1) / f.rows * blocks * scale_bytes, "zerokl::quantize: scales ", i, " have the wrong size");
    add_stripes(f, {data<uint16_t>(x[i]), data<uint8_t>(codes[i]), data<uint8_t>(scales[i]), rows, k}, stripes);
  }
  return stripes;
}

void op_quantize(const Tensors x, int64_t quantizer, int64_t rows, int64_t columns, const Tensors codes, const Tensors scales) {
  const Format f = format_of(quantizer, rows, columns);
  const std::vector<Stripe> stripes = stripes_of(f, x, codes, scales);
  ZEROKL_CALL(quantize, f, int64_t(stripes.size()), stripes.data());
}

void op_dequantize(const Tensors codes, const Tensors scales, int64_t quantizer, int64_t rows, int64_t columns, const Tensors x) {
  const Format f = format_of(quantizer, rows, columns);
  const std::vector<Stripe> stripes = stripes_of(f, x, codes, scales);
  ZEROKL_CALL(dequantize, f, int64_t(stripes.size()), stripes.data());
}

void op_cast_e4m3(const Tensor x, const Tensor codes) {
  STD_TORCH_CHECK(codes.numel() == x.numel(), "zerokl::cast_e4m3: codes have the wrong size");
  ZEROKL_CALL(cast_e4m3, x.numel(), data<float>(x), data<uint8_t>(codes));
}

void op_scaled_linear(const Tensor x, const Tensor x_scales, const Tensor w, const Tensor w_scales, int64_t block, int64_t w_rows,
                      const Optional bias, const Tensor y) {
  const int64_t n = w.size(0), k = w.size(1), m = k ? x.numel() / k : 0;
  STD_TORCH_CHECK(block > 0 && block % 2 == 0 && block <= kFp8Block && (w_rows == 1 || w_rows == kFp8Block), "zerokl::scaled_linear: unsupported block");
  const int64_t blocks = (k + block - 1) / block;
  STD_TORCH_CHECK(x_scales.numel() == m * blocks && w_scales.numel() == (n + w_rows - 1) / w_rows * blocks && y.numel() == m * n,
                  "zerokl::scaled_linear: scales or y have the wrong size");
  const bool e8m0 = x_scales.scalar_type() == ScalarType::Byte;
  auto scales = [&](const Tensor& t) { return e8m0 ? static_cast<const void*>(data<uint8_t>(t)) : data<float>(t); };
  void* out = is_bf16(y) ? static_cast<void*>(data<uint16_t>(y)) : data<float>(y);
  const ScaledLinear s{m, n, k, block, w_rows, data<uint8_t>(x), data<uint8_t>(w), e8m0 ? ScaleType::kE8m0 : ScaleType::kFp32,
                       scales(x_scales), scales(w_scales), data<float>(bias), out, is_bf16(y)};
  ZEROKL_CALL(scaled_linear, s);
}

// The weight is dequantised whole: it is read once per chunk of rows of x.
void op_int4_linear(const Tensor x, const Tensor w, const Tensor w_scales, const Optional bias, const Tensor y) {
  const int64_t n = w.size(0), k = w.size(1) * 8, groups = w_scales.size(1), m = k ? x.numel() / k : 0;
  STD_TORCH_CHECK(groups > 0 && k % groups == 0 && w_scales.size(0) == n && y.numel() == m * n, "zerokl::int4_linear: scales or y have the wrong size");
  const Format f = format_of(int64_t(Quantizer::kInt4), 1, k / groups);
  const std::unique_ptr<uint16_t[]> value(new uint16_t[size_t(n * k)]);
  std::vector<Stripe> stripes;
  add_stripes(f, {value.get(), reinterpret_cast<uint8_t*>(data<int32_t>(w)), data<uint16_t>(w_scales), n, k}, stripes);
  ZEROKL_CALL(dequantize, f, int64_t(stripes.size()), stripes.data());
  void* out = is_bf16(y) ? static_cast<void*>(data<uint16_t>(y)) : data<float>(y);
  ZEROKL_CALL(linear, m, n, k, data<uint16_t>(x), value.get(), data<float>(bias), out, is_bf16(y), 1);
}

void op_exp2(const Tensor x, const Tensor y) { ZEROKL_CALL(exp2_vector, x.numel(), data<float>(x), data<float>(y)); }
void op_log2(const Tensor x, const Tensor y) { ZEROKL_CALL(log2_vector, x.numel(), data<float>(x), data<float>(y)); }

int64_t op_set_isa(int64_t wanted) {
  if (wanted >= 0) set_isa(wanted);
  return best_isa();
}

}  // namespace

STABLE_TORCH_LIBRARY(zerokl, m) {
  m.def("linear(Tensor x, Tensor w, Tensor? bias, int segments, Tensor(a!) y) -> ()");
  m.def("read(Tensor w, Tensor(a!) sum) -> ()");
  m.def("linear_dx(Tensor dy, Tensor w, Tensor(a!) dx) -> ()");
  m.def("linear_dw(Tensor dy, Tensor x, Tensor(a!) dw) -> ()");
  m.def("bias_grad(Tensor dy, Tensor(a!) db) -> ()");
  m.def("embedding(Tensor ids, Tensor w, Tensor(a!) y) -> ()");
  m.def("embedding_dw(Tensor ids, Tensor dy, Tensor(a!) dw) -> ()");
  m.def("rms_norm(Tensor x, Tensor? residual, Tensor w, float eps, Tensor(a!) y, Tensor(b!)? sum) -> ()");
  m.def("rms_norm_backward(Tensor x, Tensor w, float eps, Tensor dy, Tensor? dsum, Tensor(a!) dx, Tensor(b!)? dw) -> ()");
  m.def("rotary(Tensor x, Tensor positions, Tensor table, bool interleaved, bool inverse, Tensor(a!) y) -> ()");
  m.def("silu_and_mul(Tensor x, Tensor? row_weight, Tensor(a!) y) -> ()");
  m.def("silu_and_mul_backward(Tensor x, Tensor? row_weight, Tensor dy, Tensor(a!) dx, Tensor(b!)? drow_weight) -> ()");
  m.def("attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, bool causal, int window, Tensor? sinks, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_backward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, bool causal, int window, Tensor? sinks, Tensor out, Tensor lse, Tensor dout, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dsink_rows, Tensor(e!)? dsinks) -> ()");
  m.def("attention_paged(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, Tensor q_lens, float scale, int window, Tensor? sinks, Tensor(a!) out) -> ()");
  m.def("selected_logprob(Tensor hidden, Tensor w, Tensor targets, Tensor temperature, Tensor top_p, Tensor top_k, Tensor(a!) logprob, Tensor(b!)? entropy, Tensor(c!) state, Tensor(d!) cut, Tensor(e!) cut_index) -> ()");
  m.def("selected_logprob_backward(Tensor hidden, Tensor w, Tensor targets, Tensor temperature, Tensor state, Tensor cut, Tensor cut_index, int total, int rank, int ranks, Tensor grad, Tensor(a!)? dhidden, Tensor(b!)? dw) -> ()");
  m.def("logprob_segments(Tensor hidden, Tensor w, Tensor targets, Tensor temperature, int total, int rank, int ranks, bool moment, Tensor(a!) sums, Tensor(b!) hit) -> ()");
  m.def("logprob_merge(Tensor sums, Tensor hit, Tensor(a!) logprob, Tensor(b!)? entropy, Tensor(c!) state) -> ()");
  m.def("logprob_from_logits(Tensor logits, Tensor targets, Tensor temperature, Tensor top_p, Tensor top_k, Tensor(a!) logprob, Tensor(b!)? entropy) -> ()");
  m.def("sample(Tensor logits, Tensor temperature, Tensor top_p, Tensor top_k, Tensor seed, Tensor position, Tensor(a!) token, Tensor(b!) logprob, Tensor(c!) raw_logprob) -> ()");
  m.def("quantize(Tensor[] x, int quantizer, int rows, int columns, Tensor(a!)[] codes, Tensor(b!)[] scales) -> ()");
  m.def("dequantize(Tensor[] codes, Tensor[] scales, int quantizer, int rows, int columns, Tensor(a!)[] x) -> ()");
  m.def("cast_e4m3(Tensor x, Tensor(a!) codes) -> ()");
  m.def("scaled_linear(Tensor x, Tensor x_scales, Tensor w, Tensor w_scales, int block, int w_rows, Tensor? bias, Tensor(a!) y) -> ()");
  m.def("int4_linear(Tensor x, Tensor w, Tensor w_scales, Tensor? bias, Tensor(a!) y) -> ()");
  m.def("exp2(Tensor x, Tensor(a!) y) -> ()");
  m.def("log2(Tensor x, Tensor(a!) y) -> ()");
  m.def("set_isa(int wanted) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(zerokl, CPU, m) {
  m.impl("linear", TORCH_BOX(&op_linear));
  m.impl("read", TORCH_BOX(&op_read));
  m.impl("linear_dx", TORCH_BOX(&op_linear_dx));
  m.impl("linear_dw", TORCH_BOX(&op_linear_dw));
  m.impl("bias_grad", TORCH_BOX(&op_bias_grad));
  m.impl("embedding", TORCH_BOX(&op_embedding));
  m.impl("embedding_dw", TORCH_BOX(&op_embedding_dw));
  m.impl("rms_norm", TORCH_BOX(&op_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&op_rms_norm_backward));
  m.impl("rotary", TORCH_BOX(&op_rotary));
  m.impl("silu_and_mul", TORCH_BOX(&op_silu_and_mul));
  m.impl("silu_and_mul_backward", TORCH_BOX(&op_silu_and_mul_backward));
  m.impl("attention_varlen", TORCH_BOX(&op_attention_varlen));
  m.impl("attention_backward", TORCH_BOX(&op_attention_backward));
  m.impl("attention_paged", TORCH_BOX(&op_attention_paged));
  m.impl("selected_logprob", TORCH_BOX(&op_selected_logprob));
  m.impl("selected_logprob_backward", TORCH_BOX(&op_selected_logprob_backward));
  m.impl("logprob_segments", TORCH_BOX(&op_logprob_segments));
  m.impl("logprob_merge", TORCH_BOX(&op_logprob_merge));
  m.impl("logprob_from_logits", TORCH_BOX(&op_logprob_from_logits));
  m.impl("sample", TORCH_BOX(&op_sample));
  m.impl("quantize", TORCH_BOX(&op_quantize));
  m.impl("dequantize", TORCH_BOX(&op_dequantize));
  m.impl("cast_e4m3", TORCH_BOX(&op_cast_e4m3));
  m.impl("scaled_linear", TORCH_BOX(&op_scaled_linear));
  m.impl("int4_linear", TORCH_BOX(&op_int4_linear));
  m.impl("exp2", TORCH_BOX(&op_exp2));
  m.impl("log2", TORCH_BOX(&op_log2));
}

STABLE_TORCH_LIBRARY_IMPL(zerokl, CompositeExplicitAutograd, m) { m.impl("set_isa", TORCH_BOX(&op_set_isa)); }

}  // namespace zerokl
