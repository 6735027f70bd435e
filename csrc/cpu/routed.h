// Many adapters: the groups of a routing over the factors of a bank (tensors.py says what each
// table holds).
#pragma once

#include <vector>

#include "tasks.h"

namespace lora {

struct Bank {
  const char* storage;
  int64_t numel;  // of storage; -1 where factors lie anywhere, before it or behind
  DType dtype;
  const int64_t* table;          // [L + 1, 1 + S, 3]: rank, first column in h, offset in storage
  int64_t slots;                 // L + 1
  int64_t width;                 // H: no rank is above it
  const double* scaling;         // [L + 1]
  const int32_t* thresholds;     // [L + 1], or nullptr: none drops
  int64_t slices;                // S
  const int64_t* slice_columns;  // [S + 1]
  int64_t in_features;
};

struct Routing {
  const int64_t* plan;  // [G, 4]: slot, first pair, end, first token or -1
  int64_t groups;
  const int32_t* tokens;  // [P]
  int64_t pairs;          // P
  const float* weights;   // [P] or nullptr
};

// Rows of an activation, all of them.
struct Rows {
  char* data;
  DType dtype;
  int64_t stride;
};

// The gradients of the factors in the bank's dtype, -1 where none is needed.
struct Gradient {
  char* data;
  int64_t numel;
  const int64_t* offsets;  // [L + 1, 1 + S]
};

class Routed {
 public:
  // Copies what the tables say of the routing's slots: they may change beside the call. Throws
  // std::runtime_error where that does not fit the storage, the width or the pairs.
  Routed(const Bank& bank, const Routing& routing, int threads);

  // The rows of pairs whose adapter drops, [P, stride].
  void draw_mask(uint8_t* mask, int64_t stride, MaskPlace place, uint64_t seed) const;
  // h = D(x) A^T
  void shrink(const Rows& x, Mask mask, Narrow h) const;
  // out += w s h B^T
  void expand(const Rows& out, Narrow h) const;
  // t = w s dy B; and grad_weights = s (dy B) . h, unless it is nullptr
  void expand_backward(const Rows& dy, Narrow t, const Narrow* h, float* grad_weights) const;
  // The gradients of B, at offsets[slot, 1 + s] of grad
  void gradient_b(const Rows& dy, Narrow h, const Gradient& grad) const;
  // The gradients of A, at offsets[slot, 0] of grad
  void gradient_a(const Rows& x, Mask mask, Narrow t, const Gradient& grad) const;
  // dx += keep (t A)
  void shrink_backward(const Rows& dx, Mask mask, Narrow t) const;

 private:
  struct Group {
    int64_t slot, begin, end, first, rank;
    const int64_t* entries;  // [1 + S, 3], as in the bank's table
    float scaling;
    int32_t threshold;
    int64_t count() const { return end - begin; }
  };
  Group read(const int64_t* plan, int64_t* entries) const;
  int64_t columns_of(int64_t index) const;
  Factor factor(const Group& group, int64_t index, int64_t& rank, int64_t& column) const;
  Wide rows_of(const Group& group, const Rows& rows, int64_t column) const;
  Mask mask_of(const Group& group, Mask mask) const;
  Narrow narrow_of(const Group& group, Narrow narrow, int64_t column) const;
  float keep_scale(const Group& group) const;
  int64_t work(int64_t columns) const;

  void shrink_by(const Rows& wide, Mask mask, Narrow out, int64_t index, int64_t from,
                 int64_t columns, bool dropout) const;
  void expand_by(const Rows& out, Mask mask, Narrow narrow, int64_t index, int64_t from,
                 int64_t columns, bool forward) const;
  void gradient_by(const Rows& wide, Mask mask, Narrow narrow, int64_t index, int64_t from,
                   int64_t columns, const Gradient& grad) const;

  Bank bank_;
  Routing routing_;
  int threads_;
  std::vector<int64_t> entries_;
  std::vector<Group> groups_;
};

}  // namespace lora
