// What emulated_device.h is made of: the state of a launch, and the waits and late work that the
// scheduler carries out. Everything runs on the thread that launches.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

#include "fibers.h"

namespace emulator {

constexpr int LANES = 32;
constexpr uint32_t WINDOW = 1024;  // shared address of a block's first byte

// --- host ------------------------------------------------------------------------------------

// What the host is told about the device; a capability below 90 has no clusters, and only 90 has
// what device.cuh calls sm_90a. 0 and 0: the defaults, 4 and 90.
void configure(int multiprocessors, int capability);
int multiprocessors();
int compute_capability();

struct Launch {
  int64_t blocks, rows;
  int threads, cluster;
  int64_t shared_bytes;
};
// Calls kernel() once for every thread. Throws std::runtime_error.
void run(const Launch& launch, const std::function<void()>& kernel);

// --- threads ---------------------------------------------------------------------------------

struct Block;
struct Warp;

// What a thread is doing; the texts of a deadlock's report are in report.cpp.
enum class Doing : uint8_t {
  RUNNING,
  SYNC_WARP,  // from here to the next comment: waits until all lanes are at the same call
  SHUFFLE,
  MMA,
  STORE_BLOCKS,
  SYNC_BLOCK,
  CLUSTER_ARRIVE,
  CLUSTER_WAIT,
  REGISTERS,
  WGMMA_FENCE,
  WGMMA_WAIT,
  AT_BARRIER,  // of the block, all lanes are there
  AT_CLUSTER,
  AT_MEMORY_BARRIER,
  AT_PRODUCTS,
  AT_STORES,
  RETURNED,
};

struct Fiber {
  Context context;
  Warp* warp;
  int thread, lane;
  Doing doing = Doing::RUNNING;
  int64_t subject = 0, number = 0;  // of what it waits for: which, and which phase
  int64_t stores_committed = 0;
};

// The tasks of the copy engine and the tensor cores: done when the scheduler likes, at the latest
// when no thread can go on.
struct Task {
  Block* block;   // whose shared memory it needs
  Fiber* owner;   // of a store
  int64_t group;  // of a store
  const char* what;
  std::function<void()> work;
};

// --- warpgroup products ----------------------------------------------------------------------

// The accumulators of a warp while products on them are under way. The registers hold NaN.
struct Chain {
  float* registers[LANES] = {};
  int columns;
  int64_t open = 0;        // products not waited for
  std::vector<float> sum;  // [16, columns]
};

struct Product {
  uint64_t a, b;
  int columns;
  bool accumulate, transposed, is_bf16;
  int64_t group;
  int lanes = 0;  // that have asked for it
  bool done = false;
  Chain* chain = nullptr;
  bool same(const Product& other) const {
    return a == other.a && b == other.b && columns == other.columns &&
           accumulate == other.accumulate && transposed == other.transposed &&
           is_bf16 == other.is_bf16 && group == other.group;
  }
};

struct Products {
  std::deque<Product> queue;  // the first is number `first` of this warp
  int64_t first = 0;
  int64_t issued[LANES] = {}, committed[LANES] = {};
  bool fenced[LANES] = {};
  std::list<Chain> chains;
};

// --- warps, blocks, clusters -----------------------------------------------------------------

struct Warp {
  Block* block;
  int number;
  Fiber lanes[LANES];
  uint32_t ready = 0;  // lanes that can go on
  bool queued = false;
  uint32_t arrived = 0;  // lanes at the call that they wait at together
  Doing call;
  int returned = 0;
  const void* operands[LANES];
  bool at_cluster = false;  // arrived at the cluster's barrier, has not waited
  int64_t cluster_phase = 0;
  Products products;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<Warp*> waiting;
};

struct MemoryBarrier {
  uint32_t expected;              // arrivals per phase
  int64_t pending, bytes, phase;  // what this phase lacks, and its number
  std::vector<Fiber*> waiting;
};

struct Block {
  int64_t x, y;
  uint32_t rank;  // in its cluster
  char* shared;
  std::vector<Warp> warps;
  int threads_left;
  NamedBarrier barriers[16];
  std::unordered_map<int64_t, MemoryBarrier> memory_barriers;  // by offset
  std::vector<std::vector<Product>> issued;                    // by warpgroup
  bool ended = false;
};

struct State {
  Launch launch;
  const std::function<void()>* kernel;
  std::vector<Block> blocks;  // of the cluster that runs
  int64_t threads_left, cluster_arrived, cluster_phase;
  std::vector<Warp*> ready;
  std::vector<Task> tasks;
  Fiber* current = nullptr;  // null: the scheduler itself
  Context scheduler;
  std::string error;
  uint64_t random;
  int order, patience, steps_left;  // the scheduler's mood
  uint32_t starved;
};
extern State state;

// Ends the launch with this error, from a thread or from the scheduler.
[[noreturn]] void fail(const std::string& text);
// "block 3, thread 65": the current thread.
std::string here();
std::string name_of(const Block& block);
// What everyone waits for.
std::string report();

uint32_t random_below(uint32_t bound);
// Whether late work should be done now rather than later.
bool eager();
// Lets the current thread wait for what `doing` says until someone wakes it.
void suspend(Doing doing, int64_t subject = 0, int64_t number = 0);
void wake(Fiber& fiber);
void wake(Warp& warp);
// Maybe lets others go first.
void maybe_yield();

// Waits until all lanes of the warp are here with their operands; then one of them does the work
// for all and they go on, except that with STAY all but that one go on waiting, to be woken by
// someone.
enum After { GO_ON, STAY };
void together(Doing call, const void* operands, void (*work)(Warp&), After after = GO_ON);

// The current thread's block, and the offset of an address in its shared memory.
Block& this_block();
int64_t offset_of(const Block& block, const void* shared, const char* what);
Block& block_of_cluster(uint32_t rank);
// Fails where the device that was configured has no sm_90a.
void needs_sm90a(const char* what);

void sync_block(int number, int threads);
void cluster_arrive();
void cluster_wait();
void cluster_complete();  // if all threads that have not returned have arrived

// --- sm_90a ----------------------------------------------------------------------------------

void barrier_init(const void* barrier, uint32_t arrivals);
void barrier_expect(const void* barrier, uint32_t bytes);
void barrier_arrive(const void* barrier, uint32_t rank);
void barrier_wait(const void* barrier, uint32_t parity);
// `bytes` have been copied. What a thread says wrongly is found here as well, hence `what`.
void barrier_complete(Block& block, int64_t offset, int64_t bytes, const char* what);
void check_overwritten(const Block& block);

// How the copy engine sees a matrix of halves.
struct TensorMap {
  char* base;
  int64_t columns, rows, stride;  // stride in bytes
  int box_columns, box_rows;
  bool swizzle;
};
TensorMap make_map(const void* base, int64_t columns, int64_t rows, int64_t stride, int box_columns,
                   int box_rows, bool swizzle);
void tma_load(void* shared, const TensorMap& map, int column, int row, const void* barrier,
              uint32_t blocks);
void tma_store(const TensorMap& map, const void* shared, int column, int row);
void tma_store_commit();
void tma_store_wait_read(int pending);
// Where byte `address` of shared memory lies under the 128-byte swizzle.
inline int64_t swizzled(int64_t address) { return address ^ ((address >> 7 & 7) << 4); }

void wgmma_fence();
void wgmma(float* d, uint64_t a, uint64_t b, int columns, bool accumulate, bool transposed,
           bool is_bf16);
void wgmma_commit();
void wgmma_wait(int pending);

// --- halves ----------------------------------------------------------------------------------

float float_of_bf16(uint16_t bits);
uint16_t bf16_of_float(float value);
float float_of_fp16(uint16_t bits);
uint16_t fp16_of_float(float value);

// One warp's d += a b, see mma in device.cuh.
struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};
template <bool IS_BF16>
void mma(Warp& warp);
// What the lanes of store_blocks point at, in `operands`.
struct BlockRow {
  void* row;
  uint32_t registers[4];
};
void store_blocks(Warp& warp);

}  // namespace emulator
