#include "adapter.h"

#include <algorithm>
#include <atomic>

#include "linear.h"
#include "parallel.h"

namespace lora {

namespace {
constexpr int64_t FORWARD_ROWS = 64;  // of a task
constexpr int64_t BLOCK = 128;        // rows that stay in the cache from one kernel to the next
constexpr int64_t MOST_PARTS = 16;    // of the gradients' sums
constexpr int64_t CACHE = 1 << 19;    // bytes of a block of activations

int64_t pieces(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }

// Below, what counts is the factors, whose ranks and columns the threads share.
bool has_few(int64_t rows) { return rows < 2 * BLOCK; }

Shrink of_rows(Shrink t, int64_t first, int64_t last, int64_t rank, int64_t call) {
  t.rank_begin = 0;
  t.rank_end = rank;
  t.row_begin = first;
  t.row_end = last;
  t.call = call;
  return t;
}

Expand of_rows(Expand t, int64_t first, int64_t last, int64_t columns, int64_t call) {
  t.column_begin = 0;
  t.column_end = columns;
  t.row_begin = first;
  t.row_end = last;
  t.call = call;
  return t;
}

// A gradient that is summed in parts over the rows, [R, columns] each, one after another.
struct Parts {
  RankGradient whole;
  float* sums;
  int64_t count, columns, pitch;

  int64_t size() const { return whole.rank * pitch; }

  RankGradient piece(int64_t first, int64_t width) const {
    RankGradient t = whole;
    t.column_begin = first;
    t.column_end = std::min(columns, first + width);
    return t;
  }
  void add_rows(int64_t index, int64_t first, int64_t last, bool add) const {
    constexpr int64_t WIDTH = 768;
    for (int64_t d = 0; d < columns; d += WIDTH)
      kernels().gradient_part(
          {piece(d, WIDTH), first, last, sums + index * size() + d, pitch, add});
  }
  static constexpr int64_t WIDTH = 512;
  int64_t tasks() const { return whole.grad ? pieces(columns, WIDTH) : 0; }
  void finish(int64_t task) const {
    kernels().gradient_of_parts(piece(task * WIDTH, WIDTH), sums, count, pitch);
  }
};

// Row blocks need parts, and those a cache that holds a block.
bool fits(int64_t columns, DType dtype) { return BLOCK * columns * size_of(dtype) <= CACHE; }
}  // namespace

void adapter_forward(const Draw& draw, const Shrink& down, const Expand& up, int64_t rows,
                     int64_t in_columns, int64_t out_columns, int threads) {
  const int64_t rank = up.rank;
  if (has_few(rows)) {
    if (draw.mask)
      draw_mask(draw.mask, draw.stride, 0, rows, in_columns, draw.seed, 0, draw.threshold, threads);
    shrink(down, rows, rank, threads);
    expand(up, rows, out_columns, threads);
    return;
  }
  threads = threads_for(rows * rank * (in_columns + out_columns), threads);
  const int64_t call = new_call();
  parallel_for(threads, pieces(rows, FORWARD_ROWS), [&](int64_t i) {
    const int64_t first = i * FORWARD_ROWS, last = std::min(rows, first + FORWARD_ROWS);
    if (draw.mask)
      draw_mask(draw.mask + first * draw.stride, draw.stride, first, last - first, in_columns,
                draw.seed, 0, draw.threshold, 1);
    kernels().shrink(of_rows(down, first, last, rank, call));
    kernels().expand(of_rows(up, first, last, out_columns, call));
  });
}

void adapter_backward(const AdapterBackward& given, int64_t rows, int64_t in_columns,
                      int64_t out_columns, int threads) {
  AdapterBackward whole = given;
  const int64_t rank = whole.dx.rank;
  const bool needs_b = whole.grad_b.grad, needs_a = whole.grad_a.grad, needs_x = whole.dx.out.data;
  const bool needs_t = needs_a || needs_x;
  if (needs_t) {
    const Narrow t{scratch<float>(Scratch::narrow, rows * rank), rank};
    whole.t.out = whole.grad_a.narrow = whole.dx.narrow = t;
  }
  const DType dtype = whole.t.wide.dtype;
  // The shape alone decides: the bits do not depend on the threads.
  if (has_few(rows) || !fits(std::max(in_columns, out_columns), dtype)) {
    if (needs_t) shrink(whole.t, rows, rank, threads);
    if (needs_b) rank_gradient(whole.grad_b, out_columns, threads);
    if (needs_a) rank_gradient(whole.grad_a, in_columns, threads);
    if (needs_x) expand(whole.dx, rows, in_columns, threads);
    return;
  }
  const int64_t step = pieces(pieces(rows, BLOCK), MOST_PARTS) * BLOCK, count = pieces(rows, step);
  const auto round_up = [](int64_t n) { return pieces(n, 64) * 64; };
  Parts b{whole.grad_b, nullptr, count, out_columns, round_up(out_columns)};
  Parts a{whole.grad_a, nullptr, count, in_columns, round_up(in_columns)};
  const int64_t size_b = needs_b ? b.size() : 0, size_a = needs_a ? a.size() : 0;
  b.sums = scratch<float>(Scratch::parts, count * (size_b + size_a));
  a.sums = b.sums + count * size_b;

  const int64_t tasks = b.tasks() + a.tasks();
  const auto finish = [&](int64_t i) { i < b.tasks() ? b.finish(i) : a.finish(i - b.tasks()); };
  // Few sums: whoever comes last adds them, instead of waking everybody again.
  const bool last_finishes = count * (size_b + size_a) <= 1 << 18;
  std::atomic<int64_t> open{count};

  const int64_t call = new_call();
  threads = threads_for(2 * rows * rank * (in_columns + out_columns), threads);
  parallel_for(threads, count, [&](int64_t i) {
    const int64_t begin = i * step, end = std::min(rows, begin + step);
    for (int64_t first = begin; first < end; first += BLOCK) {
      const int64_t last = std::min(end, first + BLOCK);
      if (needs_t) kernels().shrink(of_rows(whole.t, first, last, rank, call));
      if (needs_b) b.add_rows(i, first, last, first > begin);
      if (needs_a) a.add_rows(i, first, last, first > begin);
      if (needs_x) kernels().expand(of_rows(whole.dx, first, last, in_columns, call));
    }
    if (last_finishes && open.fetch_sub(1) == 1)
      for (int64_t task = 0; task < tasks; task++) finish(task);
  });
  if (!last_finishes) parallel_for(threads, tasks, finish);
}

}  // namespace lora
