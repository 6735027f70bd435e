// One kernel over all rows: whole problems cut into tasks.
#pragma once

#include "tasks.h"

namespace lora {

// Each takes a task over everything and ignores its ranges.
void shrink(const Shrink& whole, int64_t rows, int64_t rank, int threads);
void expand(const Expand& whole, int64_t rows, int64_t columns, int threads);
void rank_gradient(const RankGradient& whole, int64_t columns, int threads);

// The keep-mask of [rows, columns] at `place`.
void draw_mask(uint8_t* out, int64_t stride, MaskPlace place, int64_t rows, int64_t columns,
               uint64_t seed, uint32_t stream, uint32_t threshold, int threads);

// The threads that are worth waking for so many multiplications.
int threads_for(int64_t multiplications, int threads);

}  // namespace lora
