// The CUDA kernels as the binding sees them. Addresses are on the device unless said otherwise,
// strides in elements; every matrix has unit stride in its last dimension. Everything was checked
// before; what a launch reports is thrown as a std::runtime_error that names the sizes.
//
// Dimensions: M tokens, K in_features, N out_features, R rank, P pairs, H the widest rank of a
// bank.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lora::cuda {

// Where a kernel runs: the CUDA device's number and a cudaStream_t.
struct Place {
  int device;
  void* stream;
};

// y = x W^T + bias + s (x A^T) B^T for few tokens, reading W once and A once per cluster.
struct DecodeLinear {
  DType dtype;         // of x, weight, bias and y: bf16 or f16
  DType factor_dtype;  // of A and B: the same, or f32
  const void* x;       // [M, K]
  int64_t x_stride;
  const void* weight;  // [N, K]
  int64_t weight_stride;
  const void* lora_a;  // [R, K]
  int64_t a_stride;
  const void* lora_b;  // [N, R]
  int64_t b_stride;
  const void* bias;         // [N], or null
  const float* scaling_at;  // s, or null: then it is `scaling`
  float scaling;
  void* y;  // [M, N]
  int64_t y_stride;
  float* h;  // [M, R] = x A^T, or null
  int64_t tokens, in_features, out_features, rank;
};
void decode_linear(const DecodeLinear& call, Place place);

// y (+)= w s (x A^T) B^T for every pair, shrink and expand of all slices in one launch. The tables
// are those of lora_kernels.ops.routed.tensors; a token has at most one pair.
constexpr int64_t MAX_SLICES = 8;
struct DecodeRouted {
  DType dtype;         // of x and y: bf16 or f16
  DType factor_dtype;  // of the bank: the same, or f32
  const void* x;       // [M, K]
  int64_t x_stride;
  void* y;  // [M, N]
  int64_t y_stride;
  bool overwrite;  // write y, zeros where there is no adapter; otherwise add
  float* h;        // [P, H] = x A^T, zero beyond the adapter's rank; or null
  const void* storage;
  const int64_t* table;                                  // [L + 1, 1 + slices, 3]
  const double* scaling;                                 // [L + 1]
  const int32_t* tiles;                                  // [num_tiles, 2]
  const int32_t* offsets;                                // [L + 2]
  const int32_t* pair_tokens;                            // [P]
  const float* pair_weights;                             // [P], or null
  int64_t tokens, in_features, width, num_tiles, block;  // block: pairs of a tile, at most
  int64_t slices;
  const int64_t* slice_columns;  // [slices + 1], on the host
};
void decode_routed(const DecodeRouted& call, Place place);

// out = output_scale * (left right + keep * (tail_left tail_right)) + bias, for sm_90a. All
// matrices begin at a multiple of 16 bytes and have rows a multiple of 16 bytes apart.
struct GemmTail {
  DType dtype;       // of all matrices: bf16 or f16
  const void* left;  // [M, D]
  int64_t left_stride;
  const void* right;  // [C, D] if transposed, otherwise [D, C]
  int64_t right_stride;
  const void* tail_left;  // [M, R]
  int64_t tail_left_stride;
  const void* tail_right;  // [C, R] if transposed, otherwise [R, C]
  int64_t tail_right_stride;
  bool transposed;
  void* out;  // [M, C]
  int64_t out_stride;
  const void* bias;          // [C], or null
  const void* output_scale;  // [C], or null
  const int64_t* seed;       // of the keep-mask [M, C] of the tail; null: nothing is dropped
  uint32_t threshold;
  uint64_t first_group, groups_per_row;  // where it stands in the whole activation's mask
  int64_t tokens, depth, columns, rank;
  // Tile variants, for measurements: 128 or 256 columns; 1 or 2 blocks that share their right
  // tiles.
  int tile_columns, cluster;
};
void gemm_tail(const GemmTail& call, Place place);

}  // namespace lora::cuda
