// Mixture of experts (R8, R9): the router's choice and weights, rows moved to their experts and back, without atomics.
// Shazeer et al., 2017; group-limited choice: DeepSeek-V3 technical report, 2024.
#include "gemm.h"
#include "kernels.h"

namespace zerokl::ZEROKL_ISA {

namespace {

// p [experts]: softmax with an R3 sum, or sigmoid.
void scores(const RouterShape& s, const float* logits, float* p) {
  const int64_t n = s.experts;
  auto count = [&](int64_t i) { return n - i < W ? int(n - i) : W; };
  if (s.sigmoid) {
    for (int64_t i = 0; i < n; i += W)
      store_n(p + i, set1(1.0f) / (set1(1.0f) + exp2(load_n(logits + i, count(i), 0.0f) * set1(-kLog2e))), count(i));
    return;
  }
  vf top = set1(-__builtin_inff());
  for (int64_t i = 0; i < n; i += W) top = max(load_n(logits + i, count(i), -__builtin_inff()), top);
  const vf m = set1(highest_of(top));
  Lanes sum;
  over_lanes(n, sum, [&](int64_t i, vf& lane, int valid) {
    const vf e = exp2((load_n(logits + i, valid, 0.0f) - m) * set1(kLog2e));
    store_n(p + i, e, valid);
    lane = keep(lane, lane + e, valid);
  });
  const vf total = set1(fold(sum));
  for (int64_t i = 0; i < n; i += W) store_n(p + i, load_n(p + i, count(i), 0.0f) / total, count(i));
}

// Integers in the order of the floats, both zeros equal, NaN below every number, kNever below NaN.
constexpr int32_t kNever = INT32_MIN;
ZK_INLINE int32_t key_of(float x) {
  if (x != x) return kNever + 1;
  x = x + 0.0f;
  int32_t b;
  memcpy(&b, &x, 4);
  return b ^ ((b >> 31) & 0x7fffffff);
}

// The lowest index of the largest of n keys; -1 if all are kNever.
int64_t largest(int64_t n, const int32_t* key) {
  vi best = set1i(kNever), where = set1i(-1), lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vi x = load_words(key + i), better = x > best;
    best = better ? x : best;
    where = better ? lane + int32_t(i) : where;
  }
  int32_t value = kNever;
  int64_t index = -1;
  for (int j = 0; j < W; j++)
    if (best[j] > value || (best[j] == value && where[j] >= 0 && where[j] < index)) value = best[j], index = where[j];
  for (; i < n; i++)
    if (key[i] > value) value = key[i], index = i;
  return index;
}

// Drops (to kNever) the experts of all but the `keep_groups` best groups; a group is judged by the sum of its best scores.
void limit_groups(const RouterShape& s, const float* chosen, int32_t* key) {
  const int64_t size = s.experts / s.groups;
  int32_t judged[kMaxGroups];
  for (int64_t g = 0; g < s.groups; g++) {
    int32_t* part = key + g * size;
    float sum = 0.0f;
    for (int64_t j = 0; j < s.judges && j < size; j++) {
      const int64_t best = largest(size, part);
      sum = sum + chosen[g * size + best];
      part[best] = kNever;
    }
    for (int64_t i = 0; i < size; i++) part[i] = key_of(chosen[g * size + i]);
    judged[g] = key_of(sum);
  }
  bool kept[kMaxGroups] = {};
  for (int64_t i = 0; i < s.keep_groups; i++) {
    const int64_t best = largest(s.groups, judged);
    kept[best] = true;
    judged[best] = kNever;
  }
  for (int64_t i = 0; i < s.experts; i++)
    if (!kept[i / size]) key[i] = kNever;
}

float* row_scratch(const RouterShape& s) { return static_cast<float*>(scratch(Slot::kRow, size_t(3 * s.experts) * sizeof(float))); }

float chain_sum(int64_t k, const float* p, const int64_t* index) {
  float total = 0.0f;
  for (int64_t i = 0; i < k; i++) total = total + p[index[i]];
  return total;
}

}  // namespace

// `replay`: index is given, not chosen.
void router_topk(const RouterShape& s, int64_t rows, const float* logits, const float* bias, bool replay, float* weight, int64_t* index) {
  for_rows(rows, [&](int64_t r) {
    float *p = row_scratch(s), *chosen = p + s.experts, *w = weight + r * s.k;
    int32_t* key = reinterpret_cast<int32_t*>(chosen + s.experts);
    int64_t* choice = index + r * s.k;
    scores(s, logits + r * s.experts, p);
    if (!replay) {
      for (int64_t i = 0; i < s.experts; i++) chosen[i] = bias ? p[i] + bias[i] : p[i];
      for (int64_t i = 0; i < s.experts; i++) key[i] = key_of(chosen[i]);
      if (s.groups > 1) limit_groups(s, chosen, key);
      for (int64_t i = 0; i < s.k; i++) {
        choice[i] = largest(s.experts, key);
        key[choice[i]] = kNever;
      }
    }
    const float total = s.renormalize ? chain_sum(s.k, p, choice) : 1.0f;
    for (int64_t i = 0; i < s.k; i++) w[i] = (s.renormalize ? p[choice[i]] / total : p[choice[i]]) * s.scale;
  });
}

// With the choice held constant; dlogits [rows, experts].
void router_topk_backward(const RouterShape& s, int64_t rows, const float* logits, const int64_t* index, const float* dweight, float* dlogits) {
  for_rows(rows, [&](int64_t r) {
    float *p = row_scratch(s), *dp = p + s.experts, *out = dlogits + r * s.experts;
    const int64_t* choice = index + r * s.k;
    scores(s, logits + r * s.experts, p);
    const float total = chain_sum(s.k, p, choice);
    float dot = 0.0f;
    for (int64_t i = 0; i < s.k; i++) {
      dp[i] = dweight[r * s.k + i] * s.scale;
      dot = fma1(dp[i], p[choice[i]] / total, dot);
    }
    if (s.renormalize)
      for (int64_t i = 0; i < s.k; i++) dp[i] = (dp[i] - dot) / total;
    if (s.sigmoid) {
      for (int64_t j = 0; j < s.experts; j++) out[j] = 0.0f;
      for (int64_t i = 0; i < s.k; i++) out[choice[i]] = dp[i] * (p[choice[i]] * (1.0f - p[choice[i]]));
      return;
    }
    dot = 0.0f;
    for (int64_t i = 0; i < s.k; i++) dot = fma1(dp[i], p[choice[i]], dot);
    for (int64_t j = 0; j < s.experts; j++) out[j] = p[j] * (0.0f - dot);
    for (int64_t i = 0; i < s.k; i++) out[choice[i]] = p[choice[i]] * (dp[i] - dot);
  });
}

// y[r] = x[source[r] / slots]
void moe_gather(int64_t rows, int64_t n, int64_t slots, const uint16_t* x, const int64_t* source, uint16_t* y) {
  for_rows(rows, [&](int64_t r) { memcpy(y + r * n, x + source[r] / slots * n, size_t(n) * 2); });
}

// out[t] = chain over slots of fma(weight, y[position], .), `shared` last; without weights plain additions.
void moe_combine(int64_t tokens, int64_t n, int64_t slots, const uint16_t* y, const int64_t* position, const float* weight,
                 const uint16_t* shared, uint16_t* out) {
  for_rows(tokens, [&](int64_t t) {
    for (int64_t i = 0; i < n; i += W) {
      const int valid = n - i < W ? int(n - i) : W;
      vf sum = {};
      for (int64_t s = 0; s < slots; s++) {
        const vf row = load_bf16_n(y + position[t * slots + s] * n + i, valid);
        sum = weight ? fma(set1(weight[t * slots + s]), row, sum) : sum + row;
      }
      if (shared) sum = sum + load_bf16_n(shared + t * n + i, valid);
      store_bf16_n(out + t * n + i, sum, valid);
    }
  });
}

// dy[position] = weight dout,  dweight = R3 sum of fma(dout, y, lane)
void moe_combine_backward(int64_t tokens, int64_t n, int64_t slots, const uint16_t* y, const int64_t* position, const float* weight,
                          const uint16_t* dout, uint16_t* dy, float* dweight) {
  for_rows(tokens, [&](int64_t t) {
    for (int64_t s = 0; s < slots; s++) {
      const int64_t at = position[t * slots + s] * n;
      const vf w = set1(weight[t * slots + s]);
      Lanes l;
      over_lanes(n, l, [&](int64_t i, vf& lane, int valid) {
        const vf g = load_bf16_n(dout + t * n + i, valid);
        store_bf16_n(dy + at + i, w * g, valid);
        lane = keep(lane, fma(g, load_bf16_n(y + at + i, valid), lane), valid);
      });
      dweight[t * slots + s] = fold(l);
    }
  });
}

// Expert e owns rows [offsets[e], offsets[e + 1]) of x and y, and w[e].
void grouped_linear(int64_t experts, const int64_t* offsets, int64_t n, int64_t k, const uint16_t* x, const uint16_t* w, void* y, bool y_bf16,
                    int segments) {
  for (int64_t e = 0; e < experts; e++) {
    const int64_t first = offsets[e], rows = offsets[e + 1] - first;
    char* own = static_cast<char*>(y) + first * n * (y_bf16 ? 2 : 4);
    if (rows > 0) gemm(rows, n, k, {x + first * k, k, 1}, {w + e * n * k, 1, k}, {own, y_bf16, n, nullptr, false}, segments);
  }
}

void grouped_linear_dx(int64_t experts, const int64_t* offsets, int64_t n, int64_t k, const uint16_t* dy, const uint16_t* w, uint16_t* dx) {
  for (int64_t e = 0; e < experts; e++) {
    const int64_t first = offsets[e], rows = offsets[e + 1] - first;
    if (rows > 0) gemm(rows, k, n, {dy + first * n, n, 1}, {w + e * n * k, k, 1}, {dx + first * k, true, k, nullptr, false});
  }
}

void grouped_linear_dw(int64_t experts, const int64_t* offsets, int64_t n, int64_t k, const uint16_t* dy, const uint16_t* x, float* dw) {
  for (int64_t e = 0; e < experts; e++) {
    const int64_t first = offsets[e], rows = offsets[e + 1] - first;
    if (rows > 0) gemm(n, k, rows, {dy + first * n, 1, n}, {x + first * k, k, 1}, {dw + e * n * k, false, k, nullptr, true});
  }
}

}  // namespace zerokl::ZEROKL_ISA
