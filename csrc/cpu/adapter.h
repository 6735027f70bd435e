// One adapter's whole share of a layer: what stands around the base's product, forward and
// backward, each in one walk over the rows.
#pragma once

#include "tasks.h"

namespace lora {

// Where a keep-mask [M, stride] goes, and what it is drawn from.
struct Draw {
  uint8_t* mask;  // nullptr: nothing is drawn
  int64_t stride;
  MaskPlace place;
  uint64_t seed;
  uint32_t threshold;
};

// mask; h = D(x) A^T; y (+)= s h B^T. The tasks are over everything and their ranges are ignored;
// up.narrow is down.out.
void adapter_forward(const Draw& draw, const Shrink& down, const Expand& up, int64_t rows,
                     int64_t in_columns, int64_t out_columns, int threads);

// t = s dy B; the gradients of B (from dy and h) and A (from x and t); dx (+)= keep (t A).
// A gradient without an address is not computed, nor dx, nor t if nobody needs it.
struct AdapterBackward {
  Shrink t;  // where t lies is this call's own business
  RankGradient grad_b, grad_a;
  Expand dx;
};
void adapter_backward(const AdapterBackward& whole, int64_t rows, int64_t in_columns,
                      int64_t out_columns, int threads);

}  // namespace lora
