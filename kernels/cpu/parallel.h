// Tasks over lambdas, on the host's thread pool.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace zerokl::ZEROKL_ISA {

template <class F>
static void parallel_for(int64_t tasks, F f) {
  parallel(tasks, [](int64_t task, void* context) { (*static_cast<F*>(context))(task); }, &f);
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
