// What the CPU kernels work on. Nothing here knows Python or torch.
//
// M rows (tokens, or pairs of a token and an adapter), D a wide dimension, R rank.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lora {

// An activation [., D], unit stride along D; row i of a task is row index[i], or first + i.
struct Wide {
  char* data;
  DType dtype;
  int64_t stride;  // elements
  const int32_t* index;
  int64_t first;

  char* row(int64_t i) const {
    return data + (index ? index[i] : first + i) * stride * size_of(dtype);
  }
};

// Element (r, d) of A or B; one of the strides is 1.
struct Factor {
  const char* data;
  DType dtype;
  int64_t rank_stride, column_stride;  // elements

  const char* at(int64_t r, int64_t d) const {
    return data + (r * rank_stride + d * column_stride) * size_of(dtype);
  }
};

// Packed keep-mask, row i of a task; bits == nullptr keeps everything.
struct Mask {
  const uint8_t* bits;
  int64_t stride;  // bytes

  const uint8_t* row(int64_t i) const { return bits ? bits + i * stride : nullptr; }
};

// h or t, [M, R] fp32, unit stride along R.
struct Narrow {
  float* data;
  int64_t stride;

  float* row(int64_t i) const { return data + i * stride; }
};

// out[m, r] = scale * sum_d keep[m, d] * wide[m, d] * factor[r, d]
// for the rows and ranks of the task. A result's bits depend on its own row and rank only.
struct Shrink {
  Wide wide;
  Mask mask;
  Factor factor;
  Narrow out;
  float scale;
  int64_t columns;
  int64_t row_begin, row_end, rank_begin, rank_end;
  int64_t call = 0;  // of several tasks with the same factor and ranks: a thread packs it once
};

// out[m, d] (+)= keep[m, d] * sum_r (left_scale * weights[m] * narrow[m, r])
//                                   * (factor_scale * factor[r, d])
// for the rows and columns of the task. column_begin is a multiple of 8.
struct Expand {
  Wide out;
  Mask mask;
  Factor factor;
  Narrow narrow;
  const float* weights;  // [M] or nullptr
  float left_scale, factor_scale;
  bool add;
  int64_t rank;
  int64_t row_begin, row_end, column_begin, column_end;
  int64_t call = 0;  // as above, for the same columns
};

// grad[r, d] = scale * sum_m weights[m] * narrow[m, r] * keep[m, d] * wide[m, d]
// for the columns of the task and all its rows, which are summed in blocks of a fixed size.
struct RankGradient {
  Wide wide;
  Mask mask;
  Narrow narrow;
  const float* weights;  // [M] or nullptr
  float scale;
  char* grad;
  DType grad_dtype;
  int64_t rank_stride, column_stride;  // of grad; one of them is 1
  int64_t rank, rows;
  int64_t column_begin, column_end;
};

// Rows of memory that are needed next, and are fetched meanwhile.
struct Ahead {
  const char* row = nullptr;
  int64_t rows = 0, bytes = 0, stride = 0;  // bytes of a row, and from one to the next
};

// What some rows of `whole` add to its columns: sums [R, pitch], unscaled.
struct GradientPart {
  RankGradient whole;
  int64_t row_begin, row_end;
  float* sums;  // of column_begin and on
  int64_t pitch;
  bool add;  // to what is there
  Ahead ahead = {};
};

// Where an activation's mask stands in that of the whole activation, in the generator's groups.
struct MaskPlace {
  uint64_t first_group, groups_per_row;
  uint64_t group(int64_t row) const { return first_group + uint64_t(row) * groups_per_row; }
};

// The generator's groups first .. first + count - 1 (lora_kernels/runtime/dropout.py), one byte
// each.
struct Philox {
  uint8_t* out;
  uint64_t first;
  int64_t count;
  uint64_t seed;
  uint32_t stream, threshold;
};

// One instruction set's kernels.
struct Kernels {
  void (*shrink)(const Shrink&);
  void (*expand)(const Expand&);
  void (*rank_gradient)(const RankGradient&);
  void (*gradient_part)(const GradientPart&);
  // The task's columns of the gradient from `count` parts [R, pitch] that lie one after another.
  void (*gradient_of_parts)(const RankGradient&, const float* parts, int64_t count, int64_t pitch);
  void (*philox)(const Philox&);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#endif

// 0 portable, 1 AVX2 + FMA + F16C, 2 AVX-512 (F, BW, VL, DQ), 3 and AVX-512-BF16.
int best_level();
int level();
void set_level(int level);  // at most best_level()
const Kernels& kernels();

// Memory of the calling thread, kept from call to call; aligned to a cache line.
enum class Scratch { ranks, columns, panel, left, rows, sums, temporary, narrow, parts, count };
void* scratch_bytes(Scratch which, int64_t bytes);

// Whether the calling thread's memory holds already what it packed there for this call. If not, it
// is about to. Call 0 never does.
bool packed_for(Scratch which, int64_t call);
int64_t new_call();

template <class T>
T* scratch(Scratch which, int64_t count) {
  return static_cast<T*>(scratch_bytes(which, count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace lora
