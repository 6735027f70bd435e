// Tasks over threads. Which thread does what changes no bit of a result.
#pragma once

#include <atomic>
#include <cstdint>

namespace lora {

// Calls body(context) on `threads` threads at once, the caller's among them.
void run_on_threads(int threads, void (*body)(void*), void* context);

[[noreturn]] void out_of_memory();

// function(i) for every i below count; the next free thread takes the next i.
template <class F>
void parallel_for(int threads, int64_t count, const F& function) {
  if (threads > count) threads = int(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) function(i);
    return;
  }
  struct Context {
    const F& function;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
  } context{function, count};
  run_on_threads(
      threads,
      [](void* p) {
        Context& c = *static_cast<Context*>(p);
        // Nothing may be thrown through a thread's first frame; the kernels only run out of memory.
        try {
          for (int64_t i; (i = c.next.fetch_add(1)) < c.count;) c.function(i);
        } catch (...) {
          c.failed = true;
        }
      },
      &context);
  if (context.failed) out_of_memory();
}

}  // namespace lora
