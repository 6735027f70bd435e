// What the decode kernels share: products of few tokens with rows that are read once.
//
// The rows (of W, A or B) are the 16 rows of mma's `a`, eight tokens its columns `b`. Row and
// column i of a product may be any row and token, and the order of the depth inside a sum is free
// as long as `a` and `b` agree. So with g = lane / 4 and t = lane % 4 a lane takes
// * rows 2g and 2g + 1 of 16: its results lie side by side in y and in h;
// * 8 neighbouring columns of 32 (a chunk) from 8t on: 16 bytes, straight from global memory into
// the
//   registers of two products;
// * 4 neighbouring ranks of 16 (a step) from 4t on, where the depth is a rank.
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda/launch.cuh"

namespace lora::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int CHUNK = 32, STEP = 16, BLOCK_R = 16;
constexpr int CLUSTER = 8;  // sum_over_blocks() counts on it

struct Lane {
  int warp, lane, g, t;
  __device__ __forceinline__ Lane()
      : warp(int(threadIdx.x) / 32), lane(int(threadIdx.x) % 32), g(lane / 4), t(lane % 4) {}
};

// A row pitch, in bytes, with which 8 lanes that read 16 bytes each (2 rows of 64) meet no bank
// twice; and the same for 16 lanes that read 8 bytes each (4 rows of 32).
constexpr int64_t pitch_of_16(int64_t bytes) { return (bytes + 63) / 128 * 128 + 64; }
constexpr int64_t pitch_of_8(int64_t bytes) { return (bytes + 95) / 128 * 128 + 32; }

// --- loads -----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
__device__ __forceinline__ float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Neighbouring elements of a row as they were loaded, so that waiting for them is left to their
// use.
template <class F>
struct Eight {
  uint4 raw[sizeof(F) / 2];
};

template <class T>
__device__ __forceinline__ uint32_t two(const T* from, int room) {
  const float low = room > 0 ? to_float(from[0]) : 0.0f;
  return pack<T>(low, room > 1 ? to_float(from[1]) : 0.0f);
}

// The first `room` are there, the rest is zero. With VEC room is a multiple of 8 and `from` of 16
// bytes.
template <bool VEC, class F>
__device__ __forceinline__ Eight<F> load_eight(const F* from, int room) {
  Eight<F> eight = {};
  if constexpr (VEC) {
    if (room > 0) {
#pragma unroll
      for (int i = 0; i < int(sizeof(F)) / 2; ++i) {
        eight.raw[i] = load_16(reinterpret_cast<const uint4*>(from) + i);
      }
    }
  } else if constexpr (sizeof(F) == 4) {
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = room > i ? bits_of(from[i]) : 0;
    eight.raw[0] = {words[0], words[1], words[2], words[3]};
    eight.raw[1] = {words[4], words[5], words[6], words[7]};
  } else {
    eight.raw[0] = {two(from, room), two(from + 2, room - 2), two(from + 4, room - 4),
                    two(from + 6, room - 6)};
  }
  return eight;
}

// The same elements as T.
template <class T>
__device__ __forceinline__ uint2 rounded(const uint4& four) {
  return {pack<T>(float_of(four.x), float_of(four.y)), pack<T>(float_of(four.z), float_of(four.w))};
}
template <class T>
__device__ __forceinline__ uint4 words(const Eight<T>& eight) {
  return eight.raw[0];
}
template <class T>
__device__ __forceinline__ uint4 words(const Eight<float>& eight) {
  const uint2 low = rounded<T>(eight.raw[0]), high = rounded<T>(eight.raw[1]);
  return {low.x, low.y, high.x, high.y};
}

// Four elements as T, zero from `room` on. With VEC room is a multiple of 4, and `from` of their
// size.
template <class T, class F>
__device__ __forceinline__ uint2 load_four(const F* from, int room, bool vec) {
  if (room <= 0) return {0, 0};
  if constexpr (sizeof(F) == 4) {
    if (vec) return rounded<T>(load_16(from));
    const float a = from[0], b = room > 1 ? from[1] : 0.0f;
    const float c = room > 2 ? from[2] : 0.0f, d = room > 3 ? from[3] : 0.0f;
    return {pack<T>(a, b), pack<T>(c, d)};
  } else {
    if (vec) return load_8(from);
    return {two(from, room), two(from + 2, room - 2)};
  }
}

// --- products --------------------------------------------------------------------------------

// sum[16 rows][8 tokens] += a chunk of them.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& even, const uint4& odd,
                                         const uint4& x) {
  const uint32_t rows[2][4] = {{even.x, odd.x, even.y, odd.y}, {even.z, odd.z, even.w, odd.w}};
  const uint32_t tokens[2][2] = {{x.x, x.y}, {x.z, x.w}};
  mma<T>(sum, rows[0], tokens[0]);
  mma<T>(sum, rows[1], tokens[1]);
}

// A step of ranks: `a` has rows `first` and `second` of this lane.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint2& first, const uint2& second,
                                         const uint2& column) {
  const uint32_t a[4] = {first.x, second.x, first.y, second.y};
  const uint32_t b[2] = {column.x, column.y};
  mma<T>(sum, a, b);
}

// A warp's rows on their way through registers: MB blocks of 16 rows, DEPTH chunks at a time.
template <class T, class F, bool VEC, int MB, int DEPTH>
struct Rows {
  const F* const first;  // the lane's first row, at its columns of the block's first chunk
  const int64_t stride;
  const int rows, room;  // how many rows and columns there are from there on
  Eight<F> held[DEPTH][MB][2];

  // Rows from `row` of a matrix with `count` rows.
  __device__ __forceinline__ Rows(const void* matrix, int64_t stride, int row, int count,
                                  const Lane& at, int column, int columns)
      : first(static_cast<const F*>(matrix) + (row + 2 * at.g) * stride + column + 8 * at.t),
        stride(stride),
        rows(count - row - 2 * at.g),
        room(columns - 8 * at.t) {}

  // Only the first `blocks` of the MB. What lies outside of the matrix is zero.
  __device__ __forceinline__ void load(int slot, int chunk, int blocks = MB) {
#pragma unroll
    for (int m = 0; m < MB; ++m) {
      if (m >= blocks) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 16 * m + i;
        held[slot][m][i] = load_eight<VEC>(first + row * stride + chunk * CHUNK,
                                           row < rows ? room - chunk * CHUNK : 0);
      }
    }
  }
  __device__ __forceinline__ void multiply_with(float (&sum)[4], int slot, int m,
                                                const uint4& x) const {
    multiply<T>(sum, words<T>(held[slot][m][0]), words<T>(held[slot][m][1]), x);
  }
};

template <int COUNT>
__device__ __forceinline__ void clear(float (&sums)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
}

__device__ __forceinline__ float4 as_float4(const float (&sum)[4]) {
  return {sum[0], sum[1], sum[2], sum[3]};
}
__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// The sum of what the blocks of the cluster hold there, in their order; a cluster has 1 or CLUSTER.
__device__ __forceinline__ float4 sum_over_blocks(const float4* shared) {
  float4 sum = *of_block(shared, 0);
  if (cluster_size() == 1) return sum;
  // As many loads at once as the registers beside a stream of W allow.
  const float4 a = *of_block(shared, 1), b = *of_block(shared, 2), c = *of_block(shared, 3);
  sum = sum + a + b + c;
  const float4 d = *of_block(shared, 4), e = *of_block(shared, 5), f = *of_block(shared, 6);
  return sum + d + e + f + *of_block(shared, 7);
}

// A block's share of `count` things, rounded up; and which cluster this is. Not divisions, which
// would cost more than what they decide about.
__device__ __forceinline__ int share_of(int count) {
  return cluster_size() == 1 ? count : (count + CLUSTER - 1) / CLUSTER;
}
__device__ __forceinline__ int cluster_index() {
  return int(cluster_size() == 1 ? blockIdx.x : blockIdx.x / CLUSTER);
}

// The chunks of the depth that this block of the cluster takes.
struct Share {
  int first, chunks;
  __device__ __forceinline__ explicit Share(int columns) {
    const int all = (columns + CHUNK - 1) / CHUNK, each = share_of(all);
    first = min(int(cluster_rank()) * each, all);
    chunks = min(each, all - first);
  }
};

// How a warp shares work with the others: `blocks` sets of rows times the parts of the depth.
struct Split {
  int parts, block, part;
  __device__ __forceinline__ Split(int blocks, int warp)
      : parts(blocks == 1   ? 8
              : blocks == 2 ? 4
              : blocks <= 4 ? 2
                            : 1),
        block(warp % blocks),
        part(warp / blocks) {}
  // Warps may be left over.
  __device__ __forceinline__ bool has_part() const { return part < parts; }
};

// --- host ------------------------------------------------------------------------------------

inline bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes) == 0;
}

// Bytes of shared memory that a block may ask for.
inline int64_t shared_limit(int capability) {
  if (capability == 80 || capability == 87) return 163 * 1024;
  return capability >= 90 && capability < 120 ? 227 * 1024 : 99 * 1024;
}

}  // namespace
}  // namespace lora::cuda
