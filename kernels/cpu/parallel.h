// Tasks over lambdas, on the host's thread pool.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace zerokl::ZEROKL_ISA {

template <class F>
static void parallel_for(int64_t tasks, F f) {
  parallel(tasks, [](int64_t task, void* context) { (*static_cast<F*>(context))(task); }, &f);
}

constexpr int64_t kMostParts = 64;  // more threads than that share parts

// item(i) for every i. Each thread walks a part of its own in ascending order, as memory is read best, then helps others.
template <class Item>
static void for_parts(int64_t items, Item item) {
  struct alignas(64) Part { int64_t next, end; } part[kMostParts];
  const int64_t workers = threads() < items ? threads() : items, parts = workers < kMostParts ? workers : kMostParts;
  for (int64_t p = 0; p < parts; p++) part[p] = {items * p / parts, items * (p + 1) / parts};
  parallel_for(workers, [&](int64_t worker) {
    for (int64_t p = 0; p < parts; p++) {
      Part& from = part[(worker + p) % parts];
      for (int64_t i; (i = __atomic_fetch_add(&from.next, 1, __ATOMIC_RELAXED)) < from.end;) item(i);
    }
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
