// Scores of rows of hidden states under an output head.
#pragma once

#include "host.h"

namespace zerokl {

// The softmax denominator of one row, by vocabulary segment, then merged into entry 0.
struct RowSum {
  float maximum[kVocabSegments] = {}, sum[kVocabSegments] = {}, moment[kVocabSegments] = {};

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

struct Hidden {
  int64_t rows, width, vocab;
  const uint16_t *x, *w;
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
void score_backward(const Hidden& h, const float* temperature, const int64_t* targets, const RowScore* scores, const float* grad, float* dh,
                    float* dw);
void sample_rows(int64_t rows, int64_t vocab, const float* logits, const Sampling& p, const int64_t* seed, const int64_t* position,
                 int64_t* token, float* logprob, float* raw);

}  // namespace zerokl
