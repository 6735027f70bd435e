// A runtime in libgomp's place, in which the thread sanitizer would see no order of its threads.
// Like there, each thread that calls keeps workers of its own from call to call, and they keep what
// the kernels keep per thread.
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Team {
 public:
  Team() = default;
  Team(const Team&) = delete;
  ~Team() {
    start(nullptr, nullptr, workers_.size());
    for (std::thread& worker : workers_) worker.join();
  }

  void run(void (*body)(void*), void* context, size_t others) {
    while (workers_.size() < others)
      workers_.emplace_back(
          [this, index = workers_.size(), round = round_] { work(index, round); });
    start(body, context, others);
    body(context);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return open_ == 0; });
  }

 private:
  void start(void (*body)(void*), void* context, size_t others) {
    const std::lock_guard<std::mutex> lock(mutex_);
    body_ = body, context_ = context, wanted_ = open_ = others, round_++;
    begin_.notify_all();
  }

  // Rounds after `seen`, until one without a body.
  void work(size_t index, int64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      begin_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (!body_) return;
      if (index >= wanted_) continue;
      const auto body = body_;
      void* const context = context_;
      lock.unlock();
      body(context);
      lock.lock();
      if (--open_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable begin_, done_;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  size_t wanted_ = 0, open_ = 0;
  int64_t round_ = 0;
};

thread_local Team team;

}  // namespace

extern "C" __attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*),
                                                                     void* context,
                                                                     unsigned threads, unsigned) {
  team.run(body, context, threads - 1);
}
