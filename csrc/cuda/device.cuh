// What the kernels ask of the hardware, each instruction once. tests/cuda/emulator has the same
// functions in plain C++ (LORA_EMULATE), so that the kernels also run where there is no GPU.
#pragma once

#ifdef LORA_EMULATE
#include "emulated_device.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

// Whether this pass has what only sm_90a has: warpgroup products, bulk tensor copies.
#if __CUDA_ARCH_FEAT_SM90_ALL
#define LORA_SM90A 1
#endif

namespace lora::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using TensorMap = CUtensorMap;

// --- numbers ---------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(fp16 value) { return __half2float(value); }
__device__ __forceinline__ float to_float(float value) { return value; }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return __float2half_rn(value);
}

// Two neighbours as the matrix instructions take them: the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// --- memory ----------------------------------------------------------------------------------

// 16 or 8 aligned bytes that nothing writes while the kernel runs.
__device__ __forceinline__ uint4 load_16(const void* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}
__device__ __forceinline__ uint2 load_8(const void* from) {
  uint2 value;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(from));
  return value;
}
__device__ __forceinline__ void prefetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// All shared memory is asked for at launch and begins at a multiple of 1024 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

// --- warps -----------------------------------------------------------------------------------

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <class V>
__device__ __forceinline__ V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// d[16, 8] += a[16, 16] b[16, 8] by a warp. With g = lane / 4 and t = lane % 4 a lane holds
// a: rows g, g + 8, g, g + 8 at depths 2t, 2t + 1 (first two) and 2t + 8, 2t + 9 (last two);
// b: column g at depths 2t, 2t + 1 and 2t + 8, 2t + 9; d: rows g, g, g + 8, g + 8 in columns
// 2t, 2t + 1, 2t, 2t + 1.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define LORA_MMA(T, name)                                                     \
  template <>                                                                 \
  __device__ __forceinline__ void mma<T>(float(&d)[4], const uint32_t(&a)[4], \
                                         const uint32_t(&b)[2]) {             \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                \
        ".f32 {%0, %1, %2, %3}, "                                             \
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));  \
  }
LORA_MMA(bf16, "bf16")
LORA_MMA(fp16, "f16")
#undef LORA_MMA

// --- clusters (compute capability 9.0; before it a block is a cluster of its own)
// -----------------

__device__ __forceinline__ uint32_t cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}
__device__ __forceinline__ uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// Shared memory written before the arrival is seen by every thread of the cluster after its wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  // A plain release would also wait until L2 has seen all that this thread does in global memory.
  asm volatile(
      "fence.release.sync_restrict::shared::cta.cluster;\n"
      "barrier.cluster.arrive.relaxed.aligned;" ::
          : "memory");
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// The same variable of another block of the cluster, to be read through.
template <class V>
__device__ __forceinline__ const V* of_block(const V* shared, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<const V*>(address);
#else
  return shared;
#endif
}

// --- sm_90a: barriers in memory, bulk tensor copies, warpgroup products -----------------------

#ifdef LORA_SM90A

typedef uint64_t Barrier;

__device__ __forceinline__ void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}
// After the inits, before the cluster's barrier that publishes them.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Arrive at the barrier of a block of the cluster. What came before is not published to other
// blocks: a wider release waits for all of the warp's memory operations, in every step of a
// pipeline.
__device__ __forceinline__ void barrier_arrive(Barrier* barrier, uint32_t block) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}
// Returns once the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\nwaiting%=:\n"
      " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra waiting%=;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The box at (column, row) of a matrix; arrives with its bytes at the barrier, outside is zero.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, int column, int row,
                                         Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same into every block of the cluster that `blocks` has a bit for, at the same addresses.
__device__ __forceinline__ void tma_load_multicast(void* shared, const TensorMap* map, int column,
                                                   int row, Barrier* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* shared, int column,
                                          int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(column), "r"(row)
      : "memory");
}
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most PENDING of this thread's stores still read shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Between ordinary writes to shared memory and the copies or products that read them.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of `threads` threads that is not that of the whole block; numbers 1 to 15.
__device__ __forceinline__ void sync_named(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Four 8x8 blocks of halves: lane i gives the address of row i % 8 of block i / 8, and holds
// columns 2t, 2t + 1 of row g of each block.
__device__ __forceinline__ void store_blocks(void* row, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define LORA_8(d, i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LORA_32(d, i) LORA_8(d, i), LORA_8(d, i + 8), LORA_8(d, i + 16), LORA_8(d, i + 24)
#define LORA_D64                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define LORA_D128                                                                              \
  LORA_D64                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "         \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, " \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "   \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d[64, N] = accumulate * d + a[64, 16] b[16, N] by a warpgroup, operands in shared memory as their
// descriptors say; N is twice the registers of d. With TRANSPOSED the memory of b runs along N.
// A thread of warp w holds rows 16 w + g and 16 w + g + 8: d[4 j + 2 i + e] is row + 8 i, column
// 8 j + 2 t + e.
template <class T, bool TRANSPOSED, int NUM>
__device__ __forceinline__ void wgmma(float (&d)[NUM], uint64_t a, uint64_t b, int accumulate) {
  static_assert(NUM == 64 || NUM == 128, "128 or 256 columns");
  constexpr int transposed = TRANSPOSED;
#define LORA_WGMMA(columns, type, registers, a, b, p, t)                                     \
  "{\n .reg .pred p;\n setp.ne.b32 p, " p ", 0;\n wgmma.mma_async.sync.aligned.m64n" columns \
  "k16.f32." type "." type " {" registers "}, " a ", " b ", p, 1, 1, 0, " t ";\n}"
#define LORA_OPERANDS "l"(a), "l"(b), "r"(accumulate), "n"(transposed)
  if constexpr (NUM == 128 && std::is_same_v<T, bf16>) {
    asm volatile(LORA_WGMMA("256", "bf16", LORA_D128, "%128", "%129", "%130", "%131")
                 : LORA_32(d, 0), LORA_32(d, 32), LORA_32(d, 64), LORA_32(d, 96)
                 : LORA_OPERANDS);
  } else if constexpr (NUM == 128) {
    asm volatile(LORA_WGMMA("256", "f16", LORA_D128, "%128", "%129", "%130", "%131")
                 : LORA_32(d, 0), LORA_32(d, 32), LORA_32(d, 64), LORA_32(d, 96)
                 : LORA_OPERANDS);
  } else if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(LORA_WGMMA("128", "bf16", LORA_D64, "%64", "%65", "%66", "%67")
                 : LORA_32(d, 0), LORA_32(d, 32)
                 : LORA_OPERANDS);
  } else {
    asm volatile(LORA_WGMMA("128", "f16", LORA_D64, "%64", "%65", "%66", "%67")
                 : LORA_32(d, 0), LORA_32(d, 32)
                 : LORA_OPERANDS);
  }
}
#undef LORA_OPERANDS
#undef LORA_WGMMA
#undef LORA_8
#undef LORA_32
#undef LORA_D64
#undef LORA_D128

#endif  // LORA_SM90A
}  // namespace lora::cuda
#endif  // LORA_EMULATE
