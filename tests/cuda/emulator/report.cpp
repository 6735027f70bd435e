// What the errors of a launch say.
#include <map>

#include "emulator.h"

namespace emulator {

std::string name_of(const Block& block) {
  std::string name = "block " + std::to_string(block.x);
  if (state.launch.rows > 1) name += ", " + std::to_string(block.y);
  return name;
}

std::string here() {
  if (!state.current) return "the scheduler";
  return name_of(*state.current->warp->block) + ", thread " + std::to_string(state.current->thread);
}

namespace {

std::string doing(const Fiber& fiber) {
  const Block& block = *fiber.warp->block;
  switch (fiber.doing) {
    case Doing::RUNNING: return "can go on";
    case Doing::RETURNED: return "have returned";
    case Doing::SYNC_WARP: return "wait for their warp in sync_warp";
    case Doing::SHUFFLE: return "wait for their warp in shuffle";
    case Doing::MMA: return "wait for their warp in mma";
    case Doing::STORE_BLOCKS: return "wait for their warp in store_blocks";
    case Doing::SYNC_BLOCK: return "wait for their warp at a barrier of the block";
    case Doing::CLUSTER_ARRIVE: return "wait for their warp in cluster_arrive";
    case Doing::CLUSTER_WAIT: return "wait for their warp in cluster_wait";
    case Doing::REGISTERS: return "wait for their warp in registers_fewer or registers_more";
    case Doing::WGMMA_FENCE: return "wait for their warp in wgmma_fence";
    case Doing::WGMMA_WAIT: return "wait for their warp in wgmma_wait";
    case Doing::AT_PRODUCTS: return "wait for products";
    case Doing::AT_STORES: return "wait for bulk stores";
    case Doing::AT_CLUSTER:
      return "wait for the cluster's barrier, where " + std::to_string(state.cluster_arrived) +
             " of " + std::to_string(state.threads_left) + " threads are";
    case Doing::AT_BARRIER: {
      const NamedBarrier& barrier = block.barriers[fiber.subject];
      const std::string name = fiber.subject ? "sync_named " + std::to_string(fiber.subject)
                                             : std::string("__syncthreads");
      return "wait at " + name + ", where " + std::to_string(barrier.arrived) + " of " +
             std::to_string(barrier.threads) + " threads are";
    }
    case Doing::AT_MEMORY_BARRIER: {
      const MemoryBarrier& barrier = block.memory_barriers.at(fiber.subject);
      return "wait for parity " + std::to_string(fiber.number) + " of the barrier at shared byte " +
             std::to_string(fiber.subject) + ", whose phase " + std::to_string(barrier.phase) +
             " lacks " + std::to_string(barrier.pending) + " arrivals and " +
             std::to_string(barrier.bytes) + " bytes";
    }
  }
  return "?";
}

}  // namespace

std::string report() {
  std::string text;
  for (const Block& block : state.blocks) {
    std::map<std::string, std::pair<int, int>> count;  // and the first thread
    for (const Warp& warp : block.warps) {
      for (const Fiber& fiber : warp.lanes) {
        const auto entry = count.insert({doing(fiber), {0, fiber.thread}}).first;
        entry->second.first++;
      }
    }
    text += name_of(block) + ":";
    const char* separator = " ";
    for (const auto& entry : count) {
      text += separator + std::to_string(entry.second.first) + " threads from thread " +
              std::to_string(entry.second.second) + " on " + entry.first;
      separator = "; ";
    }
    text += "\n";
  }
  return text;
}

}  // namespace emulator
