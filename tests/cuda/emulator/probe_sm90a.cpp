// What only sm_90a has.
#include "probe.h"

namespace lora::cuda {
namespace {

constexpr int ROW = 128;  // bytes of a row of a swizzled box

// An element of a swizzled tile.
template <class T>
__device__ __forceinline__ T element(const char* tile, int row, int column) {
  const int chunk = (column / 8) ^ (row % 8);
  return reinterpret_cast<const T*>(tile + ROW * row + 16 * chunk)[column % 8];
}

struct Steps {
  int count, column, row;  // where the first box is; each next one is 64 columns to the right
  bool swizzled;
};

// out[block, step, 8 * blocks, 64] = the boxes, through a ring of two stages that warp 0 fills. In
// a cluster each block copies eight of the rows, for all.
constexpr int SHARE = 8 * ROW;
__global__ void ring(const TensorMap map, const Steps steps, float* out, int fault) {
  char* const shared = shared_memory();
  const int blocks = int(cluster_size()), rank = int(cluster_rank()), bytes = blocks * SHARE;
  Barrier* const full = reinterpret_cast<Barrier*>(shared + 2 * bytes);
  Barrier* const empty = full + 2;
  const int consumers = int(blockDim.x) / 32 - 1;
  if (threadIdx.x == 0 && fault != 1) {
    for (int stage = 0; stage < 2; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, uint32_t(consumers * blocks - (fault == 2)));
    }
    barrier_init_fence();
  }
  sync_warp();
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < 32) {
    for (int step = 0; step < steps.count && threadIdx.x == 0; ++step) {
      const int stage = step % 2;
      const uint32_t parity = uint32_t(step / 2 % 2) ^ (fault != 3);
      if (fault != 4) barrier_wait(empty + stage, parity);
      barrier_expect(full + stage, uint32_t(bytes - (fault == 5) + (fault == 6)));
      char* const to = shared + stage * bytes + rank * SHARE + (fault == 7) * 64;
      const int column = steps.column + 64 * step, row = steps.row + 8 * rank;
      if (blocks == 1) {
        tma_load(to, &map, column, row, full + stage);
      } else {
        tma_load_multicast(to, &map, column, row, full + stage, uint16_t((1 << blocks) - 1));
      }
    }
  } else {
    for (int step = 0; step < steps.count; ++step) {
      const int stage = step % 2;
      if (fault != 8) barrier_wait(full + stage, uint32_t(step / 2 % 2));
      const int count = 512 * blocks;
      float* const to = out + (int64_t(blockIdx.x) * steps.count + step) * count;
      const char* const box = shared + stage * bytes;
      for (int i = int(threadIdx.x) - 32; i < count; i += int(blockDim.x) - 32) {
        to[i] = steps.swizzled ? to_float(element<bf16>(box, i / 64, i % 64))
                               : to_float(reinterpret_cast<const bf16*>(box)[i]);
      }
      sync_warp();
      if (threadIdx.x % 32 < cluster_size() && fault != 9) {
        barrier_arrive(empty + stage, threadIdx.x % 32);
      }
      sync_warp();
    }
  }
  if (fault == 10) return;  // before the other block has said what it has read
  for (int step = steps.count; step < steps.count + 2 && threadIdx.x == 0; ++step) {
    barrier_wait(empty + step % 2, uint32_t(step / 2 % 2) ^ 1);
  }
  sync_warp();
  cluster_arrive();
  cluster_wait();
}

__device__ __forceinline__ uint64_t descriptor(const char* tile) {
  return 1ull << 62 | 64ull << 32 | 512ull << 16 | shared_address(tile) >> 4;
}

// d [64 * warpgroups, 2 NUM] = a b, a [.., depth], b [depth, 2 NUM] or its transpose.
template <class T, bool TRANSPOSED, int NUM>
__global__ void product(const TensorMap left, const TensorMap right, int depth, float* d,
                        int fault) {
  constexpr int COLUMNS = 2 * NUM;
  char* const shared = shared_memory();
  const int warpgroups = int(blockDim.x) / 128, warpgroup = int(threadIdx.x) / 128;
  char* const right_tile = shared + warpgroups * 64 * ROW;
  Barrier* const arrived = reinterpret_cast<Barrier*>(right_tile + COLUMNS * ROW);
  if (threadIdx.x == 0) barrier_init(arrived, 1);
  __syncthreads();
  float acc[NUM];
  for (int i = 0; i < NUM; ++i) acc[i] = 7;
  for (int k = 0; k < depth; k += 64) {
    if (threadIdx.x == 0) {
      barrier_expect(arrived, uint32_t((64 * warpgroups + COLUMNS) * ROW));
      for (int group = 0; group < warpgroups; ++group) {
        tma_load(shared + group * 64 * ROW, &left, k, 64 * group, arrived);
      }
      if (TRANSPOSED) {
        for (int column = 0; column < COLUMNS; column += 64) {
          tma_load(right_tile + column * ROW, &right, column, k, arrived);
        }
      } else {
        tma_load(right_tile, &right, k, 0, arrived);
      }
    }
    barrier_wait(arrived, uint32_t(k / 64 % 2));
    if (fault != 1) wgmma_fence();
    const uint64_t wrong = fault == 2 ? 1ull << 62 : 0;
    const uint64_t a = descriptor(shared + warpgroup * 64 * ROW) ^ wrong;
    const uint64_t b = descriptor(right_tile);
    for (int step = 0; step < 4; ++step) {
      const bool other = fault == 3 && threadIdx.x / 32 == 1;
      wgmma<T, TRANSPOSED>(acc, a + step * 2, b + (step + other) % 4 * (TRANSPOSED ? 128 : 2),
                           k + step > 0);
    }
    if (fault == 4) acc[3] = 0;
    if (fault != 5) wgmma_commit();
    if (fault == 6) d[threadIdx.x] = acc[0];
    if (fault != 7) wgmma_wait<0>();
    if (fault == 6) return;
    __syncthreads();
  }
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 * 16 + lane / 4;
  for (int i = 0; i < NUM; ++i) {
    d[(row + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
  }
}

// Writes rows [16, 64] of `values`, one box of a warp after another, through one box of shared
// memory.
__global__ void store(const float* values, const TensorMap map, int count, int column, int row,
                      int fault) {
  char* const box = shared_memory();
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  const int block = lane / 8, inside = 8 * (block % 2) + lane % 8;
  for (int step = 0; step < count; ++step) {
    if (lane == 0 && fault != 1) tma_store_wait_read<0>();
    sync_warp();
    const float* const from = values + step * 16 * 64;
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t packed[4];
      for (int i = 0; i < 4; ++i) {
        const float* const at = from + (g + i % 2 * 8) * 64 + 16 * pair + i / 2 * 8 + 2 * t;
        packed[i] = pack<bf16>(at[0], at[1]);
      }
      const int chunk = (2 * pair + block / 2) ^ (inside % 8);
      store_blocks(box + inside * ROW + 16 * chunk, packed[0], packed[1], packed[2], packed[3]);
    }
    fence_async_shared();
    sync_warp();
    if (lane == 0) {
      tma_store(&map, box, column, row + 16 * step);
      tma_store_commit();
    }
  }
  if (lane == 0 && fault != 2) tma_store_wait_read<0>();
}

__global__ void registers() {
  registers_fewer<40>();
  registers_more<232>();
}

template <class T, bool TRANSPOSED, int NUM>
void run_product(const void* a, const void* b, int64_t rows, int64_t depth, float* d, int fault) {
  const int64_t columns = 2 * NUM;
  const TensorMap left = make_emulated_map(a, depth, rows, 2 * depth, 64, 64, true);
  const TensorMap right =
      TRANSPOSED ? make_emulated_map(b, columns, depth, 2 * columns, 64, 64, true)
                 : make_emulated_map(b, depth, columns, 2 * depth, 64, int(columns), true);
  const int warpgroups = int(rows / 64);
  const int64_t bytes = (64 * warpgroups + columns) * ROW + 8;
  launch(probe, product<T, TRANSPOSED, NUM>, Grid{1, 128 * warpgroups, bytes}, NOWHERE, left, right,
         int(depth), d, fault);
}

template <class T, bool TRANSPOSED>
void run_product(const void* a, const void* b, int64_t rows, int64_t columns, int64_t depth,
                 float* d, int fault) {
  if (columns == 128) return run_product<T, TRANSPOSED, 64>(a, b, rows, depth, d, fault);
  return run_product<T, TRANSPOSED, 128>(a, b, rows, depth, d, fault);
}

}  // namespace

LORA_PROBE probe_ring(const void* matrix, int64_t columns, int64_t rows, int64_t stride, int column,
                      int row, int steps, bool swizzled, int cluster, float* out, int fault) {
  return text_of_error([=] {
    const TensorMap map = make_emulated_map(matrix, columns, rows, stride, 64, 8, swizzled);
    launch(probe, ring, Grid{cluster, 96, 2 * cluster * SHARE + 32, cluster}, NOWHERE, map,
           Steps{steps, column, row, swizzled}, out, fault);
  });
}

LORA_PROBE probe_product(bool is_bf16, bool transposed, const void* a, const void* b, int64_t rows,
                         int64_t columns, int64_t depth, float* d, int fault) {
  return text_of_error([=] {
    if (is_bf16 && transposed) {
      run_product<bf16, true>(a, b, rows, columns, depth, d, fault);
    } else if (is_bf16) {
      run_product<bf16, false>(a, b, rows, columns, depth, d, fault);
    } else if (transposed) {
      run_product<fp16, true>(a, b, rows, columns, depth, d, fault);
    } else {
      run_product<fp16, false>(a, b, rows, columns, depth, d, fault);
    }
  });
}

LORA_PROBE probe_store(const float* values, int steps, void* matrix, int64_t columns, int64_t rows,
                       int64_t stride, int column, int row, int fault) {
  return text_of_error([=] {
    const TensorMap map = make_emulated_map(matrix, columns, rows, stride, 64, 16, true);
    launch(probe, store, Grid{1, 32, 16 * ROW}, NOWHERE, values, map, steps, column, row, fault);
  });
}

LORA_PROBE probe_registers() {
  return text_of_error([] { launch(probe, registers, Grid{1, 64, 0}, NOWHERE); });
}

LORA_PROBE probe_map(const void* matrix, int64_t columns, int64_t rows, int64_t stride,
                     int box_columns, int box_rows, bool swizzle) {
  return text_of_error(
      [=] { make_emulated_map(matrix, columns, rows, stride, box_columns, box_rows, swizzle); });
}

}  // namespace lora::cuda
