// Scores of rows of hidden states under an output head.
#pragma once

#include "host.h"

namespace zerokl {

// The softmax denominator of one row, by vocabulary segment, then merged into entry 0.
struct RowSum {
  float maximum[kVocabSegments], sum[kVocabSegments] = {}, moment[kVocabSegments] = {};

  RowSum();  // holds nothing: maxima are -inf

  void segment(int64_t g, int64_t n, const float* z, bool with_moment);
  void merge();
};

// Entries behind (value, index), in the order (z descending, index ascending), are dropped; value -inf drops none.
struct Cut {
  float value;
  int64_t index;
};

struct RowScore {
  float logprob, maximum, sum, entropy;
  Cut cut;
};

// Which of the vocabulary's segments an output head holds: all of them, or a rank's neighbouring ones.
struct Vocabulary {
  int64_t total, first, count;

  int64_t width() const { return (total + kVocabSegments - 1) / kVocabSegments; }
  int64_t column(int64_t g) const { return g * width() < total ? g * width() : total; }  // where segment g begins
  int64_t size(int64_t g) const { return column(g + 1) - column(g); }
  int64_t end() const { return first + count; }
};

// w holds the columns of `vocabulary`, `vocab` of them.
struct Hidden {
  int64_t rows, width, vocab;
  const uint16_t *x, *w;
  Vocabulary vocabulary;

  const uint16_t* head(int64_t g) const { return w + (vocabulary.column(g) - vocabulary.column(vocabulary.first)) * width; }
};

// One entry a row.
struct Sampling {
  const float *temperature, *top_p;
  const int32_t* top_k;

  bool filters(int64_t rows, int64_t vocab) const {
    for (int64_t r = 0; r < rows; r++)
      if (top_p[r] < 1.0f || (top_k[r] > 0 && top_k[r] < vocab)) return true;
    return false;
  }
};

Cut find_cut(int64_t vocab, const float* z, float top_p, int64_t top_k);
void score_row(int64_t vocab, float* z, const Cut& cut, int64_t target, bool entropy, RowScore& out);
void score(const Hidden& h, const Sampling& p, const int64_t* targets, bool entropy, RowScore* out);
// The sums of the segments held (the others hold nothing) and z[target] where one of them has the target, else 0.
void score_segments(const Hidden& h, const float* temperature, const int64_t* targets, bool entropy, RowSum* sums, float* hit);
RowScore finish_score(RowSum sums, float hit, bool entropy);
void score_backward(const Hidden& h, const float* temperature, const int64_t* targets, const RowScore* scores, const float* grad, float* dh,
                    float* dw);
void sample_rows(int64_t rows, int64_t vocab, const float* logits, const Sampling& p, const int64_t* seed, const int64_t* position,
                 int64_t* token, float* logprob, float* raw);

}  // namespace zerokl
