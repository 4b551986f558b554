// Tasks over lambdas, on the host's thread pool.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace zerokl::ZEROKL_ISA {

template <class F>
static void parallel_for(int64_t tasks, F f) {
  parallel(tasks, [](int64_t task, void* context) { (*static_cast<F*>(context))(task); }, &f);
}

// item(i) for every i, neighbours in one task where there are enough for three tasks a thread, at most `longest` of them.
template <class Item>
static void for_runs(int64_t items, int64_t longest, Item item) {
  const int64_t even = items / (3 * threads()), run = even < 1 ? 1 : even < longest ? even : longest;
  parallel_for((items + run - 1) / run, [&](int64_t task) {
    for (int64_t i = task * run; i < (task + 1) * run && i < items; i++) item(i);
  });
}

constexpr int64_t kRowsPerTask = 16;

// row(r) for every row, kRowsPerTask of them a task.
template <class Row>
static void for_rows(int64_t rows, Row row) {
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    int64_t end = (task + 1) * kRowsPerTask < rows ? (task + 1) * kRowsPerTask : rows;
    for (int64_t r = task * kRowsPerTask; r < end; r++) row(r);
  });
}

}  // namespace zerokl::ZEROKL_ISA
