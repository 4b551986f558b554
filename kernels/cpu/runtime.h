// What the kernels need from their host: threads and scratch memory. Compiled once, for the baseline instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace zerokl {

using Body = void (*)(int64_t task, void* context);

// Runs body(0..tasks-1) on as many threads as torch is set to; each takes the next task as it comes free. Which thread
// runs a task never changes a bit: tasks write disjoint outputs. An exception of a task is raised here.
void parallel(int64_t tasks, Body body, void* context);

// The number of threads torch is set to.
int64_t threads();

// A 64-byte aligned buffer of this thread, kept between calls; one per slot. Raises std::bad_alloc.
enum class Slot { kPackA, kPackB, kTile, kRow, kAttention, kWiden, kCount };
void* scratch(Slot slot, size_t bytes);

}  // namespace zerokl
