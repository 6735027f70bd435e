// csrc/cuda/device.cuh and the host's half of launch.cuh in plain C++: kernels run on a CPU, so
// that they can be compared with a reference where there is no GPU.
//
// Modelled. Every CUDA thread is a fiber; warps take turns in a random order (the environment's
// LORA_EMULATOR_SEED chooses another), so a missing barrier shows. The blocks of a cluster run
// together, clusters one after another. Calls of a whole warp wait for all 32 lanes and fail where
// they differ. Barriers in memory count arrivals and bytes by phase. Bulk copies, warpgroup
// products and arrivals at another block's barrier are done late: up to the moment when nothing
// else can go on; accumulators hold NaN until wgmma_wait. So do shared memory at first, and that of
// a block that has ended. A launch in which no thread can go on fails, with what each of them waits
// for. Misaligned accesses, and indices outside of arrays, fail too (the build asks the compiler
// for those checks).
//
// Not modelled. Ordinary reads and writes are plain ones: their races show only where the order of
// threads makes a difference, and memory is sequentially consistent: fence_async_shared,
// barrier_init_fence and the scopes of barriers do nothing. Caches, bank conflicts, registers and
// time do not exist. Global memory is not checked for bounds. A multiple of 32 threads per block.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "emulator.h"

#define LORA_SM90A 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// --- what CUDA C++ has -----------------------------------------------------------------------

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline void __syncthreads() { emulator::sync_block(0, int(blockDim.x)); }
[[noreturn]] inline void __trap() { emulator::fail("__trap() in " + emulator::here()); }

namespace lora::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
using emulator::TensorMap;

// --- numbers ---------------------------------------------------------------------------------

inline float to_float(bf16 value) { return emulator::float_of_bf16(value.bits); }
inline float to_float(fp16 value) { return emulator::float_of_fp16(value.bits); }
inline float to_float(float value) { return value; }

template <class T>
T from_float(float value);
template <>
inline bf16 from_float<bf16>(float value) {
  return {emulator::bf16_of_float(value)};
}
template <>
inline fp16 from_float<fp16>(float value) {
  return {emulator::fp16_of_float(value)};
}

template <class T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

// --- memory ----------------------------------------------------------------------------------

template <class V>
V load_aligned(const void* from) {
  if (uintptr_t(from) % sizeof(V) || !from) {
    emulator::fail("a load of " + std::to_string(sizeof(V)) + " bytes is misaligned in " +
                   emulator::here());
  }
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
inline uint4 load_16(const void* from) { return load_aligned<uint4>(from); }
inline uint2 load_8(const void* from) { return load_aligned<uint2>(from); }
inline void prefetch_to_l2(const void*) {}

inline char* shared_memory() { return emulator::this_block().shared; }
inline uint32_t shared_address(const void* shared) {
  return emulator::WINDOW +
         uint32_t(emulator::offset_of(emulator::this_block(), shared, "shared_address"));
}

// --- warps -----------------------------------------------------------------------------------

inline void sync_warp() {
  emulator::together(emulator::Doing::SYNC_WARP, nullptr, [](emulator::Warp&) {});
}

template <class V>
V shuffle(V value, int lane) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "as __shfl_sync has it");
  struct Operand {
    V given, got;
    int from;
  } mine{value, value, lane};
  emulator::together(emulator::Doing::SHUFFLE, &mine, [](emulator::Warp& warp) {
    const auto at = [&](int i) {
      return static_cast<Operand*>(const_cast<void*>(warp.operands[i]));
    };
    for (int i = 0; i < emulator::LANES; ++i) {
      at(i)->got = at(at(i)->from & (emulator::LANES - 1))->given;
    }
  });
  return mine.got;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulator::MmaOperands mine{d, a, b};
  emulator::together(emulator::Doing::MMA, &mine, &emulator::mma<std::is_same_v<T, bf16>>);
}

// --- clusters --------------------------------------------------------------------------------

inline uint32_t cluster_size() { return uint32_t(emulator::state.launch.cluster); }
inline uint32_t cluster_rank() { return emulator::this_block().rank; }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
template <class V>
const V* of_block(const V* shared, uint32_t rank) {
  const int64_t offset = emulator::offset_of(emulator::this_block(), shared, "of_block");
  return reinterpret_cast<const V*>(emulator::block_of_cluster(rank).shared + offset);
}

// --- sm_90a ----------------------------------------------------------------------------------

typedef uint64_t Barrier;

inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
  emulator::barrier_init(barrier, arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  emulator::barrier_expect(barrier, bytes);
}
inline void barrier_arrive(Barrier* barrier, uint32_t block) {
  emulator::barrier_arrive(barrier, block);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulator::barrier_wait(barrier, parity);
}

inline void tma_load(void* shared, const TensorMap* map, int column, int row, Barrier* barrier) {
  emulator::tma_load(shared, *map, column, row, barrier, 1u << cluster_rank());
}
inline void tma_load_multicast(void* shared, const TensorMap* map, int column, int row,
                               Barrier* barrier, uint16_t blocks) {
  emulator::tma_load(shared, *map, column, row, barrier, blocks);
}
inline void tma_store(const TensorMap* map, const void* shared, int column, int row) {
  emulator::tma_store(*map, shared, column, row);
}
inline void tma_store_commit() { emulator::tma_store_commit(); }
template <int PENDING>
void tma_store_wait_read() {
  emulator::tma_store_wait_read(PENDING);
}
inline void prefetch_map(const TensorMap*) {}
inline void fence_async_shared() {}

inline void sync_named(int number, int threads) {
  if (number < 1 || number > 15) emulator::fail("sync_named numbers barriers from 1 to 15");
  emulator::sync_block(number, threads);
}

inline void set_registers(int registers) {
  emulator::needs_sm90a("setmaxnreg");
  if (registers % 8 || registers < 24 || registers > 256) {
    emulator::fail("registers: a multiple of 8 from 24 to 256");
  }
  emulator::together(emulator::Doing::REGISTERS, nullptr, [](emulator::Warp&) {});
}
template <int REGISTERS>
void registers_fewer() {
  set_registers(REGISTERS);
}
template <int REGISTERS>
void registers_more() {
  set_registers(REGISTERS);
}

inline void store_blocks(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  emulator::needs_sm90a("store_blocks");
  const emulator::BlockRow mine{row, {a, b, c, d}};
  emulator::together(emulator::Doing::STORE_BLOCKS, &mine, &emulator::store_blocks);
}

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int PENDING>
void wgmma_wait() {
  emulator::wgmma_wait(PENDING);
}
template <class T, bool TRANSPOSED, int NUM>
void wgmma(float (&d)[NUM], uint64_t a, uint64_t b, int accumulate) {
  static_assert(NUM == 64 || NUM == 128, "128 or 256 columns");
  emulator::wgmma(d, a, b, 2 * NUM, accumulate != 0, TRANSPOSED, std::is_same_v<T, bf16>);
}

// --- host ------------------------------------------------------------------------------------

inline TensorMap make_emulated_map(const void* base, int64_t columns, int64_t rows,
                                   int64_t row_stride_bytes, int box_columns, int box_rows,
                                   bool swizzle) {
  return emulator::make_map(base, columns, rows, row_stride_bytes, box_columns, box_rows, swizzle);
}

template <class Place, class What>
void use(const Place&, const What&) {}
template <class Place, class What>
int multiprocessors(const Place&, const What&) {
  return emulator::multiprocessors();
}
template <class Place, class What>
int compute_capability(const Place&, const What&) {
  return emulator::compute_capability();
}

template <class... Parameters, class What, class Grid, class Place, class... Arguments>
void launch(const What& what, void (*kernel)(Parameters...), const Grid& grid, const Place&,
            const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters{Parameters(arguments)...};
  try {
    emulator::run({grid.blocks, grid.rows, grid.threads, grid.cluster, grid.shared_bytes},
                  [&] { std::apply(kernel, parameters); });
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(what() + ": " + error.what());
  }
}

}  // namespace lora::cuda
