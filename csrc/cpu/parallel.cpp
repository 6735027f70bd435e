// torch's own OpenMP threads where they can be used: a second pool beside them would fight over the
// cores with threads that spin. The runtime is found among the libraries that torch has loaded;
// nothing is linked. Without it, and in a forked child, whose pool died with its parent's other
// threads, a call starts threads of its own.
#include "parallel.h"

#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace lora {

void out_of_memory() { throw std::bad_alloc(); }

namespace {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> in_forked_child{false};

Parallel find_runtime() {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

// At load: a fork before the first call must be seen too.
const Parallel runtime = find_runtime();

}  // namespace

void run_on_threads(int threads, void (*body)(void*), void* context) {
  if (runtime && !in_forked_child) {
    runtime(body, context, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; i++) others.emplace_back(body, context);
  } catch (...) {
    // No more threads: those that exist, and this one, do all the tasks.
  }
  body(context);
  for (std::thread& thread : others) thread.join();
}

}  // namespace lora
