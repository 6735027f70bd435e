// The kernels, written once over a level's vectors; included inside each level's namespace.
//
// Both micro-kernels take their operands packed in a compute type: fp32, or (AVX-512-BF16, where
// the activation is bf16) pairs of bf16 that one instruction multiplies and adds in fp32. Dropout,
// gathering, casts and odd ends are the packing's business. Every result is a sum in an order that
// depends on its own row, column and rank only: never on the tile, the task or the thread.

#include "compute.h"
#include "shrink.h"
#include "expand.h"
#include "gradient.h"

// Pairs where the activation is bf16 and the instruction exists; fp16 and fp32 keep all their bits.
#ifdef LORA_AVX512_BF16
#define LORA_IN(function, dtype, task) \
  return (dtype) == DType::bf16 ? function<Pairs>(task) : function<Single>(task)
#else
#define LORA_IN(function, dtype, task) return function<Single>(task)
#endif

static void shrink(const Shrink& t) { LORA_IN(shrink_in, t.wide.dtype, t); }
static void expand(const Expand& t) { LORA_IN(expand_in, t.out.dtype, t); }
static void rank_gradient(const RankGradient& t) { LORA_IN(rank_gradient_in, t.wide.dtype, t); }
static void gradient_part(const GradientPart& t) {
  LORA_IN(gradient_part_in, t.whole.wide.dtype, t);
}

static void philox(const Philox& p) {
  int64_t i = 0;
  while (i < p.count) {
    const uint64_t group = p.first + uint64_t(i);
    if (p.count - i >= GROUPS && uint32_t(group) <= 0xffffffffu - GROUPS) {
      philox_groups(p.out + i, group, p);
      i += GROUPS;
    } else {
      p.out[i++] = philox_byte(group, p);
    }
  }
}

static constexpr Kernels ALL = {shrink, expand, rank_gradient, gradient_part, gradient_of_parts,
                                philox};
