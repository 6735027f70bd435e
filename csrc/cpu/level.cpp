// Which instruction set's kernels run.
#include <atomic>
#include <cstdlib>
#include <new>

#include "tasks.h"

namespace lora {

int best_level() {
#if defined(__x86_64__)
  static const int best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
      return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  }();
  return best;
#else
  return 0;
#endif
}

static std::atomic<int> current{-1};

int level() {
  const int chosen = current.load(std::memory_order_relaxed);
  return chosen < 0 ? best_level() : chosen;
}

void set_level(int level) { current = level < best_level() ? level : best_level(); }

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (level()) {
    case 3: return avx512_bf16_kernels;
    case 2: return avx512_kernels;
    case 1: return avx2_kernels;
  }
#endif
  return portable_kernels;
}

namespace {
struct Buffers {
  void* data[int(Scratch::count)] = {};
  int64_t size[int(Scratch::count)] = {};
  int64_t call[int(Scratch::count)] = {};
  ~Buffers() {
    for (void* p : data) std::free(p);
  }
};
thread_local Buffers buffers;
std::atomic<int64_t> calls{0};
}  // namespace

int64_t new_call() { return 1 + calls.fetch_add(1, std::memory_order_relaxed); }

bool packed_for(Scratch which, int64_t call) {
  int64_t& last = buffers.call[int(which)];
  const bool is = call != 0 && last == call;
  last = call;
  return is;
}

void* scratch_bytes(Scratch which, int64_t bytes) {
  const int i = int(which);
  if (buffers.size[i] < bytes || !buffers.data[i]) {
    std::free(buffers.data[i]);
    buffers.size[i] = 0;
    const int64_t size = (bytes + bytes / 4 + 4096) / 64 * 64;
    buffers.data[i] = std::aligned_alloc(64, size_t(size));
    if (!buffers.data[i]) throw std::bad_alloc();
    buffers.size[i] = size;
  }
  return buffers.data[i];
}

}  // namespace lora
