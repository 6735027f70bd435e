#include "routed.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"
#include "parallel.h"

namespace lora {

namespace {
constexpr int64_t FEW_ROWS = 16;  // up to here a group's factor costs more than its rows
int64_t pieces(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }
}  // namespace

// --- one group -------------------------------------------------------------------------------

Routed::Routed(const Bank& bank, const Routing& routing, int threads)
    : bank_(bank), routing_(routing), threads_(threads) {
  const int64_t entries = 3 * (1 + bank.slices);
  entries_.resize(size_t(routing.groups * entries));
  groups_.reserve(size_t(routing.groups));
  for (int64_t g = 0; g < routing.groups; g++)
    groups_.push_back(read(routing.plan + 4 * g, entries_.data() + g * entries));
}

Routed::Group Routed::read(const int64_t* plan, int64_t* entries) const {
  const int64_t slot = plan[0], begin = plan[1], end = plan[2];
  if (slot < 0 || slot >= bank_.slots || begin < 0 || end < begin || end > routing_.pairs)
    throw std::runtime_error("routing: expected slots below " + std::to_string(bank_.slots) +
                             " and pairs up to " + std::to_string(routing_.pairs) + ", got slot " +
                             std::to_string(slot) + " with pairs " + std::to_string(begin) +
                             " to " + std::to_string(end));
  for (int64_t index = 0; index <= bank_.slices; index++) {
    const int64_t* row = bank_.table + (slot * (1 + bank_.slices) + index) * 3;
    int64_t* entry = entries + 3 * index;
    std::copy(row, row + 3, entry);
    const int64_t rank = entry[0], column = entry[1], offset = entry[2];
    const bool inside = bank_.numel < 0 || (offset >= 0 && offset <= bank_.numel &&
                                            rank * columns_of(index) <= bank_.numel - offset);
    const bool fits = rank >= 0 && column >= 0 && rank <= bank_.width - column && inside;
    if (rank != 0 && !fits)
      throw std::runtime_error(
          "bank: it was changed while a call read it: slot " + std::to_string(slot) + " has rank " +
          std::to_string(rank) + " from column " + std::to_string(column) + " at offset " +
          std::to_string(offset) + ", and the call was made for a width of " +
          std::to_string(bank_.width) + " and " + std::to_string(bank_.numel) + " elements");
  }
  // A slot without an adapter in this bank has rank 0.
  return {slot,
          begin,
          end,
          plan[3],
          entries[0],
          entries,
          float(bank_.scaling[slot]),
          bank_.thresholds ? bank_.thresholds[slot] : 0};
}

int64_t Routed::columns_of(int64_t index) const {
  if (index == 0) return bank_.in_features;
  return bank_.slice_columns[index] - bank_.slice_columns[index - 1];
}

// A (index 0) as it lies, or B of slice index - 1, which lies transposed.
Factor Routed::factor(const Group& group, int64_t index, int64_t& rank, int64_t& column) const {
  const int64_t* entry = group.entries + 3 * index;
  rank = entry[0], column = entry[1];
  const char* data = bank_.storage + entry[2] * size_of(bank_.dtype);
  if (index == 0) return {data, bank_.dtype, bank_.in_features, 1};
  return {data, bank_.dtype, 1, rank};
}

Wide Routed::rows_of(const Group& group, const Rows& rows, int64_t column) const {
  char* data = rows.data + column * size_of(rows.dtype);
  const int32_t* index = group.first < 0 ? routing_.tokens + group.begin : nullptr;
  return {data, rows.dtype, rows.stride, index, group.first};
}

Mask Routed::mask_of(const Group& group, Mask mask) const {
  if (!mask.bits || group.threshold == 0) return {nullptr, 0};
  return {mask.row(group.begin), mask.stride};
}

Narrow Routed::narrow_of(const Group& group, Narrow narrow, int64_t column) const {
  return {narrow.row(group.begin) + column, narrow.stride};
}

float Routed::keep_scale(const Group& group) const {
  return float(65536.0 / (65536 - group.threshold));
}

int64_t Routed::work(int64_t columns) const {
  int64_t sum = 0;
  for (int64_t g = 0; g < routing_.groups; g++) {
    const Group& one = groups_[g];
    // A factor of few rows waits for memory.
    sum += std::max<int64_t>(one.count(), FEW_ROWS) * one.rank * columns;
  }
  return sum;
}

// --- tasks over all groups -------------------------------------------------------------------

void Routed::draw_mask(uint8_t* mask, int64_t stride, MaskPlace place, uint64_t seed) const {
  const int64_t groups = pieces(bank_.in_features, 8);
  struct Task {
    int64_t group, begin, end;
  };
  std::vector<Task> tasks;
  int64_t drawn = 0;
  for (int64_t g = 0; g < routing_.groups; g++) {
    const Group& one = groups_[g];
    if (one.rank == 0 || one.threshold == 0) continue;
    drawn += one.count() * groups;
    for (int64_t i = one.begin; i < one.end; i += FEW_ROWS)
      tasks.push_back({g, i, std::min(one.end, i + FEW_ROWS)});
  }
  parallel_for(threads_for(drawn * 200, threads_), int64_t(tasks.size()), [&](int64_t i) {
    const Group& one = groups_[tasks[i].group];
    for (int64_t p = tasks[i].begin; p < tasks[i].end; p++)
      kernels().philox({mask + p * stride, place.group(routing_.tokens[p]), groups, seed,
                        uint32_t(one.slot), uint32_t(one.threshold)});
  });
}

void Routed::shrink_by(const Rows& wide, Mask mask, Narrow out, int64_t index, int64_t from,
                       int64_t columns, bool dropout) const {
  struct Task {
    int64_t group, begin, end, rank_begin, rank_end;
  };
  std::vector<Task> tasks;
  for (int64_t g = 0; g < routing_.groups; g++) {
    const Group& one = groups_[g];
    int64_t rank, column;
    factor(one, index, rank, column);
    const int64_t ranks = one.count() <= FEW_ROWS ? 16 : rank;
    for (int64_t i = 0; i < one.count(); i += 128)
      for (int64_t r = 0; r < rank; r += ranks)
        tasks.push_back({g, i, std::min(one.count(), i + 128), r, std::min(rank, r + ranks)});
  }
  parallel_for(threads_for(work(columns), threads_), int64_t(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    const Group& one = groups_[task.group];
    int64_t rank, column;
    const Factor f = factor(one, index, rank, column);
    kernels().shrink({rows_of(one, wide, from), mask_of(one, mask), f,
                      narrow_of(one, out, index ? column : 0), dropout ? keep_scale(one) : 1.0f,
                      columns, task.begin, task.end, task.rank_begin, task.rank_end});
  });
}

// A task owns columns of the result, for all groups one after the other: a token with several
// adapters gets the same bits every time.
void Routed::expand_by(const Rows& out, Mask mask, Narrow narrow, int64_t index, int64_t from,
                       int64_t columns, bool forward) const {
  const int64_t step = columns >= 512 * threads_ ? 256 : columns >= 256 * threads_ ? 128 : 64;
  parallel_for(threads_for(work(columns), threads_), pieces(columns, step), [&](int64_t i) {
    const int64_t begin = i * step, end = std::min(columns, begin + step);
    for (int64_t g = 0; g < routing_.groups; g++) {
      const Group& one = groups_[g];
      int64_t rank, column;
      const Factor f = factor(one, index, rank, column);
      if (rank == 0) continue;
      const float* weights = forward && routing_.weights ? routing_.weights + one.begin : nullptr;
      const float scale = forward ? one.scaling : keep_scale(one);
      kernels().expand({rows_of(one, out, from), mask_of(one, mask), f,
                        narrow_of(one, narrow, index ? column : 0), weights, scale, 1.0f, true,
                        rank, 0, one.count(), begin, end});
    }
  });
}

void Routed::gradient_by(const Rows& wide, Mask mask, Narrow narrow, int64_t index, int64_t from,
                         int64_t columns, const Gradient& grad) const {
  struct Task {
    int64_t group, begin, end;
  };
  std::vector<Task> tasks;
  for (int64_t g = 0; g < routing_.groups; g++) {
    const Group& one = groups_[g];
    int64_t rank, column;
    factor(one, index, rank, column);
    const int64_t offset = grad.offsets[one.slot * (1 + bank_.slices) + index];
    if (rank == 0 || offset < 0) continue;
    if (rank * columns > grad.numel - offset)
      throw std::runtime_error("bank: it was changed between a forward and its backward: slot " +
                               std::to_string(one.slot) + " has rank " + std::to_string(rank) +
                               " now, and its gradient has no room for it");
    for (int64_t d = 0; d < columns; d += 256) tasks.push_back({g, d, std::min(columns, d + 256)});
  }
  parallel_for(threads_for(work(columns), threads_), int64_t(tasks.size()), [&](int64_t i) {
    const Group& one = groups_[tasks[i].group];
    int64_t rank, column;
    factor(one, index, rank, column);
    char* to =
        grad.data + grad.offsets[one.slot * (1 + bank_.slices) + index] * size_of(bank_.dtype);
    const bool is_b = index > 0;
    const float* weights = is_b && routing_.weights ? routing_.weights + one.begin : nullptr;
    const float scale = is_b ? one.scaling : keep_scale(one);
    kernels().rank_gradient({rows_of(one, wide, from), mask_of(one, mask),
                             narrow_of(one, narrow, is_b ? column : 0), weights, scale, to,
                             bank_.dtype, is_b ? 1 : bank_.in_features, is_b ? rank : 1, rank,
                             one.count(), tasks[i].begin, tasks[i].end});
  });
}

// --- the operations --------------------------------------------------------------------------

void Routed::shrink(const Rows& x, Mask mask, Narrow h) const {
  shrink_by(x, mask, h, 0, 0, bank_.in_features, mask.bits != nullptr);
}

void Routed::expand(const Rows& out, Narrow h) const {
  for (int64_t s = 0; s < bank_.slices; s++) {
    const int64_t from = bank_.slice_columns[s], columns = bank_.slice_columns[s + 1] - from;
    expand_by(out, {nullptr, 0}, h, 1 + s, from, columns, true);
  }
}

void Routed::expand_backward(const Rows& dy, Narrow t, const Narrow* h, float* grad_weights) const {
  for (int64_t s = 0; s < bank_.slices; s++) {
    const int64_t from = bank_.slice_columns[s], columns = bank_.slice_columns[s + 1] - from;
    shrink_by(dy, {nullptr, 0}, t, 1 + s, from, columns, false);
  }
  for (int64_t g = 0; g < routing_.groups; g++) {
    const Group& one = groups_[g];
    if (one.rank == 0) continue;
    const float scaling = one.scaling;
    for (int64_t p = one.begin; p < one.end; p++) {
      float* row = t.row(p);
      if (grad_weights) {
        float sum = 0;
        for (int64_t r = 0; r < one.rank; r++) sum += row[r] * h->row(p)[r];
        grad_weights[p] = scaling * sum;
      }
      const float scale = routing_.weights ? scaling * routing_.weights[p] : scaling;
      for (int64_t r = 0; r < one.rank; r++) row[r] *= scale;
    }
  }
}

void Routed::gradient_b(const Rows& dy, Narrow h, const Gradient& grad) const {
  for (int64_t s = 0; s < bank_.slices; s++) {
    const int64_t from = bank_.slice_columns[s], columns = bank_.slice_columns[s + 1] - from;
    gradient_by(dy, {nullptr, 0}, h, 1 + s, from, columns, grad);
  }
}

void Routed::gradient_a(const Rows& x, Mask mask, Narrow t, const Gradient& grad) const {
  gradient_by(x, mask, t, 0, 0, bank_.in_features, grad);
}

void Routed::shrink_backward(const Rows& dx, Mask mask, Narrow t) const {
  expand_by(dx, mask, t, 0, 0, bank_.in_features, false);
}

}  // namespace lora
