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

// One call: lives on the caller's stack, so the caller outlasts every worker that may look at it (Pool::looking_).
struct Job {
  int64_t tasks;
  Body body;
  void* context;
  std::atomic<int64_t> places;  // for workers beside the caller
  std::atomic<int64_t> next{0};
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

// Calls and joins take no lock while workers spin: a lock held for the length of a store still puts a worker that
// arrives then to sleep, which costs more than a small product.
class Pool {
 public:
  // False if another thread is using the pool.
  bool run(Job& job) {
    std::unique_lock<std::mutex> use(use_, std::try_to_lock);
    if (!use.owns_lock()) return false;
    for (const int64_t wanted = job.places.load(); workers_ < wanted; workers_++) std::thread([this] { loop(); }).detach();
    job_.store(&job);
    call_.fetch_add(1);
    if (sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> hold(lock_); }  // whoever counts as sleeping has seen this call or waits to be woken
      wake_.notify_all();
    }
    job.work();
    job_.store(nullptr);  // from here on nobody joins
    while (looking_.load() > 0) pause();
    return true;
  }

 private:
  // Either a worker counts as looking before the caller asks whether anybody is, or it finds no job: both sides store,
  // then load, and all four are sequentially consistent. The same holds for call_ and sleeping_.
  void loop() {
    for (uint64_t seen = 0;;) {
      seen = wait_for_call(seen);
      looking_.fetch_add(1);
      if (Job* job = job_.load(); job && job->places.fetch_sub(1) > 0) job->work();
      looking_.fetch_sub(1);
    }
  }

  // The number of the latest call, once it is not `seen`.
  uint64_t wait_for_call(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (std::chrono::steady_clock::now() < until)
      for (int i = 0; i < 32; i++) {
        if (const uint64_t call = call_.load(); call != seen) return call;
        pause();
      }
    std::unique_lock<std::mutex> hold(lock_);
    sleeping_.fetch_add(1);
    wake_.wait(hold, [&] { return call_.load() != seen; });
    sleeping_.fetch_sub(1);
    return call_.load();
  }

  std::mutex use_, lock_;
  std::condition_variable wake_;
  std::atomic<uint64_t> call_{0};
  std::atomic<Job*> job_{nullptr};
  std::atomic<int> looking_{0}, sleeping_{0};
  int64_t workers_ = 0;
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
  Job job{tasks, body, context, workers};
  if (workers <= 0 || !pool().run(job)) job.work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace zerokl
