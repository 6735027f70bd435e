// Launches, and who goes on when.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulated_device.h"

namespace emulator {

State state;

namespace {

constexpr int64_t SHARED_LIMIT = 232448, SHARED_PITCH = 262144, CANARY = 1024;
constexpr int CLUSTER_LIMIT = 8, POISON = 0xff;  // NaN in every type

int device_multiprocessors = 4, device_capability = 90;

char* shared_of(int rank) {
  static char* const memory =
      static_cast<char*>(std::aligned_alloc(size_t(WINDOW), CLUSTER_LIMIT * SHARED_PITCH));
  return memory + rank * SHARED_PITCH;
}

void check(const Launch& launch) {
  const auto demand = [](bool holds, const char* text) {
    if (!holds) throw std::runtime_error(std::string("invalid launch: ") + text);
  };
  demand(launch.blocks >= 1 && launch.blocks <= INT32_MAX, "1 to 2^31 - 1 blocks in x");
  demand(launch.rows >= 1 && launch.rows <= 65535, "1 to 65535 blocks in y");
  demand(launch.threads >= LANES && launch.threads <= 1024, "32 to 1024 threads");
  demand(launch.threads % LANES == 0, "the emulator has whole warps only");
  demand(launch.shared_bytes >= 0 && launch.shared_bytes <= SHARED_LIMIT,
         "at most 232448 bytes of shared memory");
  demand(launch.cluster >= 1 && launch.cluster <= CLUSTER_LIMIT, "a cluster has 1 to 8 blocks");
  demand(launch.cluster == 1 || device_capability >= 90, "no clusters before capability 9.0");
  demand(launch.blocks % launch.cluster == 0, "blocks in x must be a multiple of the cluster");
}

void end_of_block(Block& block) {
  for (const Task& task : state.tasks) {
    if (task.block == &block) {
      fail(name_of(block) + " returned while " + task.what + " still needs its shared memory");
    }
  }
  const char* const end = block.shared + state.launch.shared_bytes;
  if (std::any_of(end, end + CANARY, [](char byte) { return uint8_t(byte) != POISON; })) {
    fail(name_of(block) + " wrote beyond its shared memory");
  }
  check_overwritten(block);
  for (const Warp& warp : block.warps) {
    if (warp.products.first != int64_t(block.issued[size_t(warp.number / 4)].size())) {
      fail(name_of(block) + ": the warps of a warpgroup did not ask for the same products");
    }
  }
  std::memset(block.shared, POISON, size_t(state.launch.shared_bytes));
  block.ended = true;
}

void end_of_thread() {
  Fiber& fiber = *state.current;
  Warp& warp = *fiber.warp;
  if (warp.arrived) fail(here() + " returned while others of its warp wait for it\n" + report());
  if (!warp.products.queue.empty()) fail(here() + " returned while products are under way");
  fiber.doing = Doing::RETURNED;
  warp.returned++;
  state.threads_left--;
  if (warp.at_cluster && warp.cluster_phase == state.cluster_phase) state.cluster_arrived--;
  cluster_complete();
  if (--warp.block->threads_left == 0) end_of_block(*warp.block);
}

void entry() {
  std::string thrown;
  try {
    (*state.kernel)();
  } catch (const std::exception& error) {
    thrown = std::string("the kernel threw: ") + error.what();
  }
  if (!thrown.empty()) fail(thrown);
  end_of_thread();
  swap(state.current->context, state.scheduler);
  std::abort();
}

void resume(Fiber& fiber) {
  state.current = &fiber;
  threadIdx.x = unsigned(fiber.thread);
  blockIdx.x = unsigned(fiber.warp->block->x);
  blockIdx.y = unsigned(fiber.warp->block->y);
  swap(state.scheduler, fiber.context);
  state.current = nullptr;
  if (!state.error.empty()) fail(state.error);
}

void do_task() {
  const size_t which = random_below(uint32_t(state.tasks.size()));
  const Task task = std::move(state.tasks[which]);
  state.tasks.erase(state.tasks.begin() + ptrdiff_t(which));
  task.work();
}

// Which warp is next: moods in which some get far ahead of others.
enum Order { ANY, NEWEST, OLDEST, WITHOUT_A_BLOCK, WITHOUT_A_WARP, ORDERS };

size_t place_of_next() {
  const size_t count = state.ready.size();
  if (state.order == NEWEST) return count - 1;
  if (state.order == OLDEST) return 0;
  const size_t any = random_below(uint32_t(count));
  if (state.order == ANY) return any;
  for (size_t i = 0; i < count; ++i) {
    const Warp& warp = *state.ready[(any + i) % count];
    const bool starved = state.order == WITHOUT_A_BLOCK ? warp.block->rank == state.starved
                                                        : uint32_t(warp.number) == state.starved;
    if (!starved) return (any + i) % count;
  }
  return any;
}

Warp& take_warp() {
  const size_t place = place_of_next();
  Warp& warp = *state.ready[place];
  state.ready.erase(state.ready.begin() + ptrdiff_t(place));
  return warp;
}

void change_mood() {
  state.order = int(random_below(ORDERS));
  const int others =
      state.order == WITHOUT_A_BLOCK ? state.launch.cluster : state.launch.threads / LANES;
  state.starved = random_below(uint32_t(others));
  state.patience = int(random_below(3));
  state.steps_left = 8 << random_below(6);
}

void schedule() {
  while (state.threads_left) {
    if (--state.steps_left <= 0) change_mood();
    const bool task_first =
        state.patience == 0 ? random_below(2) == 0 : state.patience == 1 && random_below(16) == 0;
    if (!state.tasks.empty() && (state.ready.empty() || task_first)) {
      do_task();
      continue;
    }
    if (state.ready.empty()) fail("no thread can go on\n" + report());
    Warp& warp = take_warp();
    const uint32_t lanes = warp.ready;
    warp.ready = 0;
    warp.queued = false;
    const uint32_t turn = random_below(LANES);
    for (uint32_t i = 0; i < LANES; ++i) {
      if (lanes >> (i ^ turn) & 1) resume(warp.lanes[i ^ turn]);
    }
  }
}

void run_cluster(int64_t x, int64_t y) {
  const Launch& launch = state.launch;
  const int warps = launch.threads / LANES;
  state.tasks.clear();
  state.ready.clear();
  state.cluster_arrived = state.cluster_phase = 0;
  state.threads_left = int64_t(launch.threads) * launch.cluster;
  state.blocks = std::vector<Block>(size_t(launch.cluster));
  int stack = 0;
  for (Block& block : state.blocks) {
    block.rank = uint32_t(&block - state.blocks.data());
    block.x = x + block.rank;
    block.y = y;
    block.shared = shared_of(int(block.rank));
    std::memset(block.shared, POISON, size_t(launch.shared_bytes + CANARY));
    block.threads_left = launch.threads;
    block.warps = std::vector<Warp>(size_t(warps));
    block.issued.resize(size_t(warps + 3) / 4);
    for (Warp& warp : block.warps) {
      warp.block = &block;
      warp.number = int(&warp - block.warps.data());
      for (int lane = 0; lane < LANES; ++lane) {
        Fiber& fiber = warp.lanes[lane];
        fiber.warp = &warp;
        fiber.lane = lane;
        fiber.thread = warp.number * LANES + lane;
        begin(fiber.context, stack++, &entry);
      }
      wake(warp);
    }
  }
  for (size_t i = state.ready.size(); i > 1; --i) {
    std::swap(state.ready[i - 1], state.ready[random_below(uint32_t(i))]);
  }
  schedule();
}

}  // namespace

void configure(int multiprocessors, int capability) {
  device_multiprocessors = multiprocessors ? multiprocessors : 4;
  device_capability = capability ? capability : 90;
}
// For the tests, which load the library.
extern "C" __attribute__((visibility("default"))) void lora_emulator_configure(int multiprocessors,
                                                                               int capability) {
  configure(multiprocessors, capability);
}
int multiprocessors() { return device_multiprocessors; }
int compute_capability() { return device_capability; }

void run(const Launch& launch, const std::function<void()>& kernel) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  check(launch);
  state.launch = launch;
  state.kernel = &kernel;
  state.current = nullptr;  // an error may have left it
  state.error.clear();
  const char* const seed = std::getenv("LORA_EMULATOR_SEED");
  state.random = 0x9E3779B97F4A7C15u * (seed ? std::strtoull(seed, nullptr, 10) + 1 : 1);
  state.random ^= uint64_t(launch.blocks) << 20 ^ uint64_t(launch.threads);
  state.steps_left = 0;
  blockDim = {unsigned(launch.threads), 1, 1};
  gridDim = {unsigned(launch.blocks), unsigned(launch.rows), 1};
  std::vector<int64_t> clusters(size_t(launch.blocks / launch.cluster * launch.rows));
  std::iota(clusters.begin(), clusters.end(), 0);
  for (size_t i = clusters.size(); i > 1; --i) {
    std::swap(clusters[i - 1], clusters[random_below(uint32_t(i))]);
  }
  for (const int64_t cluster : clusters) {
    const int64_t first = cluster / launch.rows * launch.cluster;
    run_cluster(first, cluster % launch.rows);
  }
  state.blocks.clear();
}

void fail(const std::string& text) {
  if (!state.current) throw std::runtime_error(text);
  // The thread is abandoned where it is: nothing on its stack needs to be destroyed.
  state.error = text;
  swap(state.current->context, state.scheduler);
  std::abort();
}

uint32_t random_below(uint32_t bound) {
  state.random ^= state.random >> 12;
  state.random ^= state.random << 25;
  state.random ^= state.random >> 27;
  return uint32_t((state.random * 0x2545F4914F6CDD1Du >> 32) * bound >> 32);
}

bool eager() { return state.patience == 0 || (state.patience == 1 && random_below(2) == 0); }

void suspend(Doing doing, int64_t subject, int64_t number) {
  Fiber& fiber = *state.current;
  fiber.doing = doing;
  fiber.subject = subject;
  fiber.number = number;
  swap(fiber.context, state.scheduler);
}

void wake(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  fiber.doing = Doing::RUNNING;
  warp.ready |= 1u << fiber.lane;
  if (warp.queued) return;
  warp.queued = true;
  state.ready.push_back(&warp);
}

void wake(Warp& warp) {
  for (Fiber& fiber : warp.lanes) wake(fiber);
}

void maybe_yield() {
  if (random_below(8)) return;
  wake(*state.current);
  swap(state.current->context, state.scheduler);
}

void together(Doing call, const void* operands, void (*work)(Warp&), After after) {
  Fiber& fiber = *state.current;
  Warp& warp = *fiber.warp;
  if (warp.returned) {
    fiber.doing = call;
    fail(here() + " waits for lanes of its warp that have returned\n" + report());
  }
  if (warp.arrived == 0) warp.call = call;
  if (warp.call != call) {
    fiber.doing = call;
    fail("the lanes of a warp are at different calls, " + here() + "\n" + report());
  }
  warp.arrived |= 1u << fiber.lane;
  warp.operands[fiber.lane] = operands;
  if (warp.arrived != ~0u) return suspend(call);
  warp.arrived = 0;
  work(warp);
  if (after == STAY) {  // the work has said for what, or woken all
    swap(fiber.context, state.scheduler);
    return;
  }
  for (Fiber& other : warp.lanes) {
    if (&other != &fiber) wake(other);
  }
}

// --- where things are ------------------------------------------------------------------------

Block& this_block() { return *state.current->warp->block; }

int64_t offset_of(const Block& block, const void* shared, const char* what) {
  const int64_t offset = static_cast<const char*>(shared) - block.shared;
  if (offset < 0 || offset > state.launch.shared_bytes) {
    fail(std::string(what) + ": the address is not in this block's shared memory, " + here());
  }
  return offset;
}

Block& block_of_cluster(uint32_t rank) {
  if (rank >= state.blocks.size()) {
    fail("the cluster has no block " + std::to_string(rank) + ", " + here());
  }
  if (state.blocks[rank].ended) {
    fail(here() + " needs the shared memory of " + name_of(state.blocks[rank]) +
         ", which has returned");
  }
  return state.blocks[rank];
}

void needs_sm90a(const char* what) {
  if (compute_capability() == 90) return;
  fail(std::string(what) + " is for sm_90a, the device is sm_" +
       std::to_string(compute_capability()));
}

}  // namespace emulator
