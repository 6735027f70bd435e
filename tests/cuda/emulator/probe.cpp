// What every device has, and clusters.
#include "probe.h"

namespace lora::cuda {
namespace {

// sums[row, block] = the sum of a block's numbers.
__global__ void block_sum(const float* x, float* sums, int fault) {
  float* const partial = reinterpret_cast<float*>(shared_memory());
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  partial[threadIdx.x] = x[block * blockDim.x + threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (fault != 1) __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[block] = partial[0];
}

// d [16, 8] += a [16, 16] b [8, 16]^T
template <class T>
__global__ void multiply(const T* a, const T* b, float* d) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const auto pair = [&](const T* matrix, int row, int depth) {
    const T* const at = matrix + 16 * row + depth;
    return uint32_t(at[0].bits) | uint32_t(at[1].bits) << 16;
  };
  const uint32_t left[4] = {pair(a, g, 2 * t), pair(a, g + 8, 2 * t), pair(a, g, 2 * t + 8),
                            pair(a, g + 8, 2 * t + 8)};
  const uint32_t right[2] = {pair(b, g, 2 * t), pair(b, g, 2 * t + 8)};
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = d[8 * (g + i / 2 * 8) + 2 * t + i % 2];
  mma<T>(acc, left, right);
  for (int i = 0; i < 4; ++i) d[8 * (g + i / 2 * 8) + 2 * t + i % 2] = acc[i];
}

__global__ void exchange(const int64_t* values, const int* from, int64_t* got) {
  got[threadIdx.x] = shuffle(values[threadIdx.x], from[threadIdx.x]);
}

// A transposition through shared memory within a warp.
__global__ void warp_exchange(const float* values, float* got, int fault) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = values[threadIdx.x];
  if (fault != 1) sync_warp();
  got[threadIdx.x] = shared[threadIdx.x ^ 31];
}

template <class T>
__global__ void convert(const float* values, T* rounded, float* back, uint32_t* packed) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  rounded[i] = from_float<T>(values[i]);
  back[i] = to_float(rounded[i]);
  packed[i] = pack<T>(values[i], -values[i]);
}

// sums[block] = sum over the cluster of (rank + 1) * values[block's]
__global__ void cluster_sum(const float* values, float* sums, int fault) {
  float* const mine = reinterpret_cast<float*>(shared_memory());
  mine[threadIdx.x] = values[blockIdx.x * blockDim.x + threadIdx.x];
  cluster_arrive();
  if (fault == 3) cluster_arrive();
  if (fault != 1) cluster_wait();
  float sum = 0;
  for (uint32_t rank = 0; rank < cluster_size(); ++rank) {
    sum += float(rank + 1) * of_block(mine, rank)[threadIdx.x];
  }
  if (fault == 1) cluster_wait();
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (fault == 2) return;  // while others may still read
  cluster_arrive();
  cluster_wait();
}

// Two halves of a block hand a number to and fro, each at its own pace.
__global__ void hand_over(int* result, int rounds, int fault) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  const bool second = threadIdx.x >= blockDim.x / 2;
  const int all = int(blockDim.x);
  if (threadIdx.x == 0) shared[0] = 0;
  for (int round = 0; round < rounds; ++round) {
    if (!second) {
      if (threadIdx.x == 0) shared[0] += 1;
      sync_named(1, fault == 1 ? all - 32 : all);
      sync_named(2, all);
    } else {
      sync_named(1, all);
      if (threadIdx.x + 1 == blockDim.x) shared[0] *= 2;
      sync_named(fault == 2 && round + 1 == rounds ? 3 : 2, all);
    }
  }
  if (threadIdx.x == 0) result[0] = shared[0];
}

// Things that a device does not forgive.
__global__ void misuse(const char* global, float* out, int64_t shared_bytes, int fault) {
  char* const shared = shared_memory();
  const unsigned thread = threadIdx.x;
  float values[4] = {1, 2, 3, 4};
  switch (fault) {
    case 1:  // one warp never comes
      if (thread >= 32) __syncthreads();
      break;
    case 2:  // lanes of a warp go different ways
      if (thread % 32 < 7) {
        sync_warp();
      } else {
        shuffle(int(thread), 0);
      }
      break;
    case 3:  // a lane has returned
      if (thread == 40) return;
      sync_warp();
      break;
    case 4: out[thread] = float(load_16(global + 8).x); break;
    case 5: out[thread] = float(load_8(global + 4).x); break;
    case 6: out[thread] = reinterpret_cast<const uint4*>(shared + 4)->x; break;
    case 7: out[thread] = values[thread % 5]; break;
    case 8: shared[shared_bytes + 3] = 1; break;
    case 9: out[thread] = float(1 << thread); break;
    case 10: out[thread] = float(shared_address(global)); break;
    case 11: __trap();
    case 12: throw std::runtime_error("from the kernel");
    case 13:
      if (thread == 0) {
        cluster_arrive();
        cluster_wait();
      }
      break;
    case 14: __syncthreads(), sync_named(1 + int(thread / 32), 64); break;
    case 15: cluster_wait(); break;
  }
}

}  // namespace

LORA_PROBE probe_block_sum(const float* x, float* sums, int64_t blocks, int64_t rows, int threads,
                           int fault) {
  return text_of_error([=] {
    launch(probe, block_sum, Grid{blocks, threads, 4 * threads, 1, rows}, NOWHERE, x, sums, fault);
  });
}

LORA_PROBE probe_mma(bool is_bf16, const void* a, const void* b, float* d) {
  return text_of_error([=] {
    const Grid grid{1, 32, 0};
    if (is_bf16) {
      launch(probe, multiply<bf16>, grid, NOWHERE, static_cast<const bf16*>(a),
             static_cast<const bf16*>(b), d);
    } else {
      launch(probe, multiply<fp16>, grid, NOWHERE, static_cast<const fp16*>(a),
             static_cast<const fp16*>(b), d);
    }
  });
}

LORA_PROBE probe_shuffle(const int64_t* values, const int* from, int64_t* got) {
  return text_of_error(
      [=] { launch(probe, exchange, Grid{1, 32, 0}, NOWHERE, values, from, got); });
}

LORA_PROBE probe_warp_exchange(const float* values, float* got, int threads, int fault) {
  return text_of_error([=] {
    launch(probe, warp_exchange, Grid{1, threads, 4 * threads}, NOWHERE, values, got, fault);
  });
}

LORA_PROBE probe_convert(bool is_bf16, const float* values, void* rounded, float* back,
                         uint32_t* packed, int64_t blocks) {
  return text_of_error([=] {
    const Grid grid{blocks, 256, 0};
    if (is_bf16) {
      launch(probe, convert<bf16>, grid, NOWHERE, values, static_cast<bf16*>(rounded), back,
             packed);
    } else {
      launch(probe, convert<fp16>, grid, NOWHERE, values, static_cast<fp16*>(rounded), back,
             packed);
    }
  });
}

LORA_PROBE probe_cluster_sum(const float* values, float* sums, int64_t blocks, int threads,
                             int cluster, int fault) {
  return text_of_error([=] {
    launch(probe, cluster_sum, Grid{blocks, threads, 4 * threads, cluster}, NOWHERE, values, sums,
           fault);
  });
}

LORA_PROBE probe_hand_over(int* result, int rounds, int fault) {
  return text_of_error(
      [=] { launch(probe, hand_over, Grid{1, 128, 16}, NOWHERE, result, rounds, fault); });
}

LORA_PROBE probe_misuse(const char* global, float* out, int fault) {
  return text_of_error([=] {
    launch(probe, misuse, Grid{1, 64, 1024}, NOWHERE, global, out, int64_t(1024), fault);
  });
}

LORA_PROBE probe_launch(int64_t blocks, int64_t rows, int threads, int64_t shared_bytes,
                        int cluster) {
  return text_of_error([=] {
    launch(probe, +[](int) {}, Grid{blocks, threads, shared_bytes, cluster, rows}, NOWHERE, 0);
  });
}

}  // namespace lora::cuda
