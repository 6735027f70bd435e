// The barriers of blocks and clusters, and those in shared memory.
#include <cstring>

#include "emulator.h"

namespace emulator {

// --- blocks and clusters ---------------------------------------------------------------------

namespace {

void wait_for(Warp& warp, Doing doing, int64_t subject) {
  for (Fiber& fiber : warp.lanes) {
    fiber.doing = doing;
    fiber.subject = subject;
  }
}

struct BarrierOperand {
  int number, threads;
};

void arrive_at_barrier(Warp& warp) {
  const BarrierOperand asked = *static_cast<const BarrierOperand*>(warp.operands[0]);
  for (const void* operands : warp.operands) {
    if (std::memcmp(operands, &asked, sizeof(asked))) {
      fail("the lanes of a warp are at different barriers, " + here());
    }
  }
  NamedBarrier& barrier = warp.block->barriers[asked.number];
  if (barrier.arrived == 0) barrier.threads = asked.threads;
  if (barrier.threads != asked.threads || asked.threads <= 0 || asked.threads % LANES ||
      asked.threads > state.launch.threads) {
    fail("barrier " + std::to_string(asked.number) + " is for " + std::to_string(asked.threads) +
         " threads, " + here());
  }
  barrier.arrived += LANES;
  barrier.waiting.push_back(&warp);
  wait_for(warp, Doing::AT_BARRIER, asked.number);
  if (barrier.arrived != barrier.threads) return;
  for (Warp* waiting : barrier.waiting) wake(*waiting);
  barrier.waiting.clear();
  barrier.arrived = 0;
}

}  // namespace

void sync_block(int number, int threads) {
  const BarrierOperand mine{number, threads};
  together(Doing::SYNC_BLOCK, &mine, &arrive_at_barrier, STAY);
}

void cluster_complete() {
  if (state.cluster_arrived == 0 || state.cluster_arrived != state.threads_left) return;
  state.cluster_arrived = 0;
  state.cluster_phase++;
  for (Block& block : state.blocks) {
    for (Warp& warp : block.warps) {
      if (warp.lanes[0].doing == Doing::AT_CLUSTER) wake(warp);
    }
  }
}

void cluster_arrive() {
  if (compute_capability() < 90) return;
  together(Doing::CLUSTER_ARRIVE, nullptr, [](Warp& warp) {
    if (warp.at_cluster) fail("cluster_arrive without a wait for the one before, " + here());
    warp.at_cluster = true;
    warp.cluster_phase = state.cluster_phase;
    state.cluster_arrived += LANES;
    cluster_complete();
  });
  maybe_yield();
}

void cluster_wait() {
  if (compute_capability() < 90) return sync_block(0, state.launch.threads);
  together(
      Doing::CLUSTER_WAIT, nullptr,
      [](Warp& warp) {
        if (!warp.at_cluster) fail("cluster_wait without cluster_arrive, " + here());
        warp.at_cluster = false;
        wait_for(warp, Doing::AT_CLUSTER, 0);
        if (state.cluster_phase > warp.cluster_phase) wake(warp);
      },
      STAY);
}

// --- in shared memory ------------------------------------------------------------------------
//
// They count arrivals and bytes. Their state is in a table of the block; the eight bytes themselves
// hold a mark, so that it shows when something else is written there.

namespace {

constexpr int64_t BYTES_LIMIT = (1 << 20) - 1, ARRIVALS_LIMIT = (1 << 20) - 1;

uint64_t mark(int64_t offset) { return 0x4C4F5241626172ull * uint64_t(offset + 9); }

MemoryBarrier& find(Block& block, int64_t offset, const char* what) {
  const auto entry = block.memory_barriers.find(offset);
  if (entry == block.memory_barriers.end()) {
    fail(std::string(what) + ": there is no initialized barrier at shared byte " +
         std::to_string(offset) + " of " + name_of(block) + ", " + here());
  }
  return entry->second;
}

// Begins the next phase if this one has all that it waits for.
void complete(MemoryBarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.expected;
  barrier.phase++;
  for (Fiber* fiber : barrier.waiting) wake(*fiber);
  barrier.waiting.clear();
}

void arrive(MemoryBarrier& barrier, const char* what) {
  if (barrier.pending == 0) {
    fail(std::string(what) + ": more arrivals than the barrier was initialized for, " + here());
  }
  barrier.pending--;
  complete(barrier);
}

void add_bytes(MemoryBarrier& barrier, int64_t bytes, const char* what) {
  barrier.bytes += bytes;
  if (barrier.bytes < -BYTES_LIMIT || barrier.bytes > BYTES_LIMIT) {
    fail(std::string(what) + ": a barrier counts less than 2^20 bytes, " + here());
  }
}

int64_t place(const void* barrier, const char* what) {
  needs_sm90a(what);
  const int64_t offset = offset_of(this_block(), barrier, what);
  if (offset % 8 || offset + 8 > state.launch.shared_bytes) {
    fail(std::string(what) + ": a barrier is 8 aligned bytes of shared memory, " + here());
  }
  return offset;
}

}  // namespace

void barrier_init(const void* barrier, uint32_t arrivals) {
  const int64_t offset = place(barrier, "barrier_init");
  if (arrivals < 1 || arrivals > ARRIVALS_LIMIT) {
    fail("barrier_init: 1 to 2^20 - 1 arrivals, " + here());
  }
  const MemoryBarrier fresh{arrivals, int64_t(arrivals), 0, 0, {}};
  if (!this_block().memory_barriers.insert({offset, fresh}).second) {
    fail("barrier_init: this barrier is initialized already, " + here());
  }
  const uint64_t bytes = mark(offset);
  std::memcpy(this_block().shared + offset, &bytes, 8);
  maybe_yield();
}

void barrier_expect(const void* barrier, uint32_t bytes) {
  MemoryBarrier& at = find(this_block(), place(barrier, "barrier_expect"), "barrier_expect");
  add_bytes(at, bytes, "barrier_expect");
  arrive(at, "barrier_expect");
  maybe_yield();
}

void barrier_arrive(const void* barrier, uint32_t rank) {
  const int64_t offset = place(barrier, "barrier_arrive");
  Block& block = block_of_cluster(rank);
  const auto work = [=, &block] {
    arrive(find(block, offset, "barrier_arrive"), "barrier_arrive");
  };
  if (&block == &this_block()) {
    work();
  } else {  // on its way: no barrier of the cluster waits for it
    state.tasks.push_back({&block, nullptr, 0, "an arrival from another block", work});
  }
  maybe_yield();
}

void barrier_wait(const void* barrier, uint32_t parity) {
  const int64_t offset = place(barrier, "barrier_wait");
  if (parity > 1) fail("barrier_wait: a parity is 0 or 1, " + here());
  MemoryBarrier& at = find(this_block(), offset, "barrier_wait");
  while ((at.phase & 1) == parity) {
    at.waiting.push_back(state.current);
    suspend(Doing::AT_MEMORY_BARRIER, offset, parity);
  }
}

void barrier_complete(Block& block, int64_t offset, int64_t bytes, const char* what) {
  MemoryBarrier& at = find(block, offset, what);
  add_bytes(at, -bytes, what);
  complete(at);
}

void check_overwritten(const Block& block) {
  for (const auto& entry : block.memory_barriers) {
    const uint64_t bytes = mark(entry.first);
    if (std::memcmp(block.shared + entry.first, &bytes, 8)) {
      fail(name_of(block) + " wrote over the barrier at shared byte " +
           std::to_string(entry.first));
    }
  }
}

}  // namespace emulator
