// The operators of moe.cpp: schemas, memory safety, and the order of permuted rows.
#include <vector>

#include "host.h"

namespace zerokl {

namespace {

using Optional = std::optional<Tensor>;

void op_router_topk(const Tensor logits, const Optional bias, bool sigmoid, int64_t groups, int64_t keep_groups, int64_t judges, bool renormalize,
                    double scale, bool replay, const Tensor weight, const Tensor index) {
  const int64_t rows = logits.size(0), experts = logits.size(1), k = index.size(1);
  STD_TORCH_CHECK(k >= 1 && groups >= 1 && groups <= kMaxGroups && experts % groups == 0 && keep_groups >= 1 && keep_groups <= groups &&
                      keep_groups * (experts / groups) >= k,
                  "zerokl::router_topk: ", k, " of ", experts, " experts cannot be chosen from ", keep_groups, " of ", groups, " groups");
  int64_t* choice = data<int64_t>(index);
  if (replay)
    for (int64_t i = 0; i < rows * k; i++) {
      STD_TORCH_CHECK(choice[i] >= 0 && choice[i] < experts, "zerokl::router_topk: replay row ", i / k, " names expert ", choice[i], " of ", experts);
      for (int64_t j = i / k * k; j < i; j++)
        STD_TORCH_CHECK(choice[j] != choice[i], "zerokl::router_topk: replay row ", i / k, " names expert ", choice[i], " twice");
    }
  const RouterShape shape{experts, k, sigmoid, groups, keep_groups, judges, renormalize, float(scale)};
  ZEROKL_CALL(router_topk, shape, rows, data<float>(logits), data<float>(bias), replay, data<float>(weight), choice);
}

void op_router_topk_backward(const Tensor logits, const Tensor index, const Tensor dweight, bool sigmoid, bool renormalize, double scale,
                             const Tensor dlogits) {
  const RouterShape shape{logits.size(1), index.size(1), sigmoid, 1, 1, 1, renormalize, float(scale)};
  ZEROKL_CALL(router_topk_backward, shape, logits.size(0), data<float>(logits), data<int64_t>(index), data<float>(dweight), data<float>(dlogits));
}

// Rows ordered by (expert, token, slot): offsets [E + 1], source [T k] (token k + slot of a row), position [T, k] (its inverse).
void op_moe_order(const Tensor index, const Tensor offsets, const Tensor source, const Tensor position) {
  const int64_t n = index.numel(), experts = offsets.numel() - 1;
  const int64_t* expert = data<int64_t>(index);
  int64_t *begin = data<int64_t>(offsets), *from = data<int64_t>(source), *to = data<int64_t>(position);
  std::vector<int64_t> next(static_cast<size_t>(experts) + 1, 0);
  for (int64_t i = 0; i < n; i++) {
    STD_TORCH_CHECK(expert[i] >= 0 && expert[i] < experts, "zerokl::moe_permute: index ", expert[i], " lies outside [0, ", experts, ")");
    next[static_cast<size_t>(expert[i]) + 1]++;
  }
  for (size_t e = 0; e < static_cast<size_t>(experts); e++) next[e + 1] += next[e];
  for (size_t e = 0; e <= static_cast<size_t>(experts); e++) begin[e] = next[e];
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = next[static_cast<size_t>(expert[i])]++;
    from[row] = i;
    to[i] = row;
  }
}

void op_moe_gather(const Tensor x, const Tensor source, int64_t slots, const Tensor y) {
  ZEROKL_CALL(moe_gather, source.numel(), x.size(1), slots, data<uint16_t>(x), data<int64_t>(source), data<uint16_t>(y));
}

void op_moe_combine(const Tensor y, const Tensor position, const Optional weight, const Optional shared, const Tensor out) {
  STD_TORCH_CHECK(y.size(0) == position.numel(), "zerokl::moe_combine: ", y.size(0), " rows for ", position.numel(), " positions");
  ZEROKL_CALL(moe_combine, position.size(0), out.size(1), position.size(1), data<uint16_t>(y), data<int64_t>(position), data<float>(weight),
              data<uint16_t>(shared), data<uint16_t>(out));
}

void op_moe_combine_backward(const Tensor y, const Tensor position, const Tensor weight, const Tensor dout, const Tensor dy, const Tensor dweight) {
  ZEROKL_CALL(moe_combine_backward, position.size(0), y.size(1), position.size(1), data<uint16_t>(y), data<int64_t>(position),
              data<float>(weight), data<uint16_t>(dout), data<uint16_t>(dy), data<float>(dweight));
}

const int64_t* checked(const Tensor& offsets, int64_t experts, int64_t rows) {
  const int64_t* at = data<int64_t>(offsets);
  STD_TORCH_CHECK(offsets.numel() == experts + 1 && at[0] == 0 && at[experts] == rows, "zerokl::grouped_linear: offsets must run from 0 to ", rows,
                  " over ", experts, " experts");
  for (int64_t e = 0; e < experts; e++) STD_TORCH_CHECK(at[e] <= at[e + 1], "zerokl::grouped_linear: offsets fall at expert ", e);
  return at;
}

void op_grouped_linear(const Tensor x, const Tensor w, const Tensor offsets, int64_t segments, const Tensor y) {
  const int64_t *at = checked(offsets, w.size(0), x.size(0)), n = w.size(1), k = w.size(2);
  void* out = is_bf16(y) ? static_cast<void*>(data<uint16_t>(y)) : data<float>(y);
  ZEROKL_CALL(grouped_linear, w.size(0), at, n, k, data<uint16_t>(x), data<uint16_t>(w), out, is_bf16(y), int(segments));
}

void op_grouped_linear_dx(const Tensor dy, const Tensor w, const Tensor offsets, const Tensor dx) {
  const int64_t *at = checked(offsets, w.size(0), dy.size(0)), n = w.size(1), k = w.size(2);
  ZEROKL_CALL(grouped_linear_dx, w.size(0), at, n, k, data<uint16_t>(dy), data<uint16_t>(w), data<uint16_t>(dx));
}

void op_grouped_linear_dw(const Tensor dy, const Tensor x, const Tensor offsets, const Tensor dw) {
  const int64_t *at = checked(offsets, dw.size(0), dy.size(0)), n = dw.size(1), k = dw.size(2);
  ZEROKL_CALL(grouped_linear_dw, dw.size(0), at, n, k, data<uint16_t>(dy), data<uint16_t>(x), data<float>(dw));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(zerokl, m) {
  m.def("router_topk(Tensor logits, Tensor? bias, bool sigmoid, int groups, int keep_groups, int judges, bool renormalize, float scale, bool replay, Tensor(a!) weight, Tensor(b!) index) -> ()");
  m.def("router_topk_backward(Tensor logits, Tensor index, Tensor dweight, bool sigmoid, bool renormalize, float scale, Tensor(a!) dlogits) -> ()");
  m.def("moe_order(Tensor index, Tensor(a!) offsets, Tensor(b!) source, Tensor(c!) position) -> ()");
  m.def("moe_gather(Tensor x, Tensor source, int slots, Tensor(a!) y) -> ()");
  m.def("moe_combine(Tensor y, Tensor position, Tensor? weight, Tensor? shared, Tensor(a!) out) -> ()");
  m.def("moe_combine_backward(Tensor y, Tensor position, Tensor weight, Tensor dout, Tensor(a!) dy, Tensor(b!) dweight) -> ()");
  m.def("grouped_linear(Tensor x, Tensor w, Tensor offsets, int segments, Tensor(a!) y) -> ()");
  m.def("grouped_linear_dx(Tensor dy, Tensor w, Tensor offsets, Tensor(a!) dx) -> ()");
  m.def("grouped_linear_dw(Tensor dy, Tensor x, Tensor offsets, Tensor(a!) dw) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(zerokl, CPU, m) {
  m.impl("router_topk", TORCH_BOX(&op_router_topk));
  m.impl("router_topk_backward", TORCH_BOX(&op_router_topk_backward));
  m.impl("moe_order", TORCH_BOX(&op_moe_order));
  m.impl("moe_gather", TORCH_BOX(&op_moe_gather));
  m.impl("moe_combine", TORCH_BOX(&op_moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&op_moe_combine_backward));
  m.impl("grouped_linear", TORCH_BOX(&op_grouped_linear));
  m.impl("grouped_linear_dx", TORCH_BOX(&op_grouped_linear_dx));
  m.impl("grouped_linear_dw", TORCH_BOX(&op_grouped_linear_dw));
}

}  // namespace zerokl
