// The thread pool behind parallel().
//
// A call ends when its tasks are done, not when every worker has turned up, as an OpenMP barrier would have it. Rollout
// engine and trainer share the cores of a small machine: there a worker is often not scheduled for milliseconds, and a
// call must not wait for one that holds no task. Workers spin briefly for the next call, since a model is a sequence of
// short calls, then sleep.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "host.h"

namespace zerokl {

namespace {

constexpr auto kSpin = std::chrono::microseconds(60);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// One call: lives on the caller's stack, so the caller outlasts every worker that has joined it.
struct Job {
  int64_t tasks;
  Body body;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int> joined{0};
  std::mutex error_lock{};
  std::exception_ptr error{};

  void work() {
    try {
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(t, context);
    } catch (...) {
      next.store(tasks);
      std::lock_guard<std::mutex> hold(error_lock);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  // False if another thread is using the pool.
  bool run(Job& job, int64_t workers) {
    std::unique_lock<std::mutex> use(use_, std::try_to_lock);
    if (!use.owns_lock()) return false;
    while (workers_ < workers) {
      std::thread([this] { loop(); }).detach();
      workers_++;
    }
    {
      std::lock_guard<std::mutex> hold(lock_);
      job_ = &job;
      limit_ = workers;
      call_.fetch_add(1, std::memory_order_release);
      if (sleeping_ > 0) wake_.notify_all();
    }
    job.work();
    {
      std::lock_guard<std::mutex> hold(lock_);
      job_ = nullptr;  // from here on nobody joins
    }
    while (job.joined.load(std::memory_order_acquire) > 0) pause();
    return true;
  }

 private:
  void loop() {
    uint64_t seen = 0;
    for (;;) {
      wait_for_call(seen);
      Job* job = nullptr;
      {
        std::lock_guard<std::mutex> hold(lock_);
        seen = call_.load(std::memory_order_acquire);
        if (job_ && job_->joined.load() < limit_) {
          job = job_;
          job->joined.fetch_add(1);
        }
      }
      if (!job) continue;
      job->work();
      job->joined.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_call(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (std::chrono::steady_clock::now() < until)
      for (int i = 0; i < 32; i++) {
        if (call_.load(std::memory_order_acquire) != seen) return;
        pause();
      }
    std::unique_lock<std::mutex> hold(lock_);
    sleeping_++;
    wake_.wait(hold, [&] { return call_.load(std::memory_order_acquire) != seen; });
    sleeping_--;
  }

  std::mutex use_, lock_;
  std::condition_variable wake_;
  std::atomic<uint64_t> call_{0};
  Job* job_ = nullptr;
  int64_t workers_ = 0, limit_ = 0;
  int sleeping_ = 0;
};

// A forked child has none of its parent's threads: it starts a pool of its own. Pools live as long as their process.
Pool& pool() {
  static std::mutex lock;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> hold(lock);
  if (owner != getpid()) {
    current = new Pool;
    owner = getpid();
  }
  return *current;
}

}  // namespace

int64_t threads() { return int64_t(torch::stable::get_num_threads()); }

void parallel(int64_t tasks, Body body, void* context) {
  const int64_t all = threads(), workers = (tasks < all ? tasks : all) - 1;
  Job job{tasks, body, context};
  if (workers <= 0 || !pool().run(job, workers)) job.work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace zerokl
