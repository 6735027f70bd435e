#include "adapter.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "linear.h"
#include "parallel.h"

namespace lora {

namespace {
constexpr int64_t FORWARD_ROWS = 64;    // of a task
constexpr int64_t BLOCK = 128;          // rows that stay in the cache from one kernel to the next
constexpr int64_t CACHE = 1 << 19;      // bytes of a block of activations
constexpr int64_t PACKED = 1 << 19;     // elements of a factor that each thread packs for itself
constexpr int64_t MOST_PARTS = 16;      // of the gradients' sums
constexpr int64_t MOST_SUMS = 1 << 22;  // floats of all parts

int64_t pieces(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }

// Below, what counts is the factors, whose ranks and columns the threads share.
bool has_few(int64_t rows) { return rows < 2 * BLOCK; }

Wide from_row(Wide wide, int64_t first) {
  wide.first += first;
  return wide;
}

Mask from_row(Mask mask, int64_t first) {
  if (mask.bits) mask.bits += first * mask.stride;
  return mask;
}

Narrow from_row(Narrow narrow, int64_t first) { return {narrow.row(first), narrow.stride}; }

Ahead ahead(const Wide& wide, int64_t first, int64_t rows, int64_t columns) {
  const int64_t element = size_of(wide.dtype);
  return {wide.row(first), rows, columns * element, wide.stride * element};
}

// The tasks of `count` rows, out of one over everything.
Shrink of_rows(Shrink t, int64_t first, int64_t count, Narrow out, int64_t rank, int64_t call) {
  t.wide = from_row(t.wide, first);
  t.mask = from_row(t.mask, first);
  t.out = out;
  t.rank_begin = 0;
  t.rank_end = rank;
  t.row_begin = 0;
  t.row_end = count;
  t.call = call;
  return t;
}

Expand of_rows(Expand t, int64_t first, int64_t count, Narrow narrow, int64_t columns,
               int64_t call) {
  t.out = from_row(t.out, first);
  t.mask = from_row(t.mask, first);
  t.narrow = narrow;
  t.column_begin = 0;
  t.column_end = columns;
  t.row_begin = 0;
  t.row_end = count;
  t.call = call;
  return t;
}

// A gradient that is summed in parts over the rows, [R, pitch] each, one after another.
struct Parts {
  RankGradient whole;
  int64_t columns, count;
  float* sums = nullptr;

  int64_t pitch() const { return pieces(columns, 64) * 64; }
  int64_t size() const { return whole.grad ? whole.rank * pitch() : 0; }

  void add_rows(int64_t index, int64_t first, int64_t rows, Narrow narrow, bool add,
                Ahead next) const {
    constexpr int64_t WIDTH = 768;
    RankGradient t = whole;
    t.wide = from_row(t.wide, first);
    t.mask = from_row(t.mask, first);
    t.narrow = narrow;
    for (int64_t d = 0; d < columns; d += WIDTH) {
      t.column_begin = d;
      t.column_end = std::min(columns, d + WIDTH);
      const int64_t some = next.rows * t.column_end / columns - next.rows * d / columns;
      kernels().gradient_part({t,
                               0,
                               rows,
                               sums + index * size() + d,
                               pitch(),
                               add,
                               {next.row, some, next.bytes, next.stride}});
      next.row += some * next.stride;
    }
  }

  // Columns that one task adds up and stores.
  static constexpr int64_t WIDTH = 512;
  int64_t tasks() const { return whole.grad ? pieces(columns, WIDTH) : 0; }
  void finish(int64_t task) const {
    RankGradient t = whole;
    t.column_begin = task * WIDTH;
    t.column_end = std::min(columns, t.column_begin + WIDTH);
    kernels().gradient_of_parts(t, sums, count, pitch());
  }
};
}  // namespace

void adapter_forward(const Draw& draw, const Shrink& down, const Expand& up, int64_t rows,
                     int64_t in_columns, int64_t out_columns, int threads) {
  const int64_t rank = up.rank;
  if (has_few(rows) || rank * std::max(in_columns, out_columns) > PACKED) {
    if (draw.mask)
      draw_mask(draw.mask, draw.stride, draw.place, rows, in_columns, draw.seed, 0, draw.threshold,
                threads);
    shrink(down, rows, rank, threads);
    expand(up, rows, out_columns, threads);
    return;
  }
  threads = threads_for(rows * rank * (in_columns + out_columns), threads);
  const int64_t call = new_call();
  parallel_for(threads, pieces(rows, FORWARD_ROWS), [&](int64_t i) {
    const int64_t first = i * FORWARD_ROWS, count = std::min(rows - first, FORWARD_ROWS);
    const Narrow h = from_row(down.out, first);
    if (draw.mask)
      draw_mask(draw.mask + first * draw.stride, draw.stride,
                {draw.place.group(first), draw.place.groups_per_row}, count, in_columns, draw.seed,
                0, draw.threshold, 1);
    kernels().shrink(of_rows(down, first, count, h, rank, call));
    kernels().expand(of_rows(up, first, count, h, out_columns, call));
  });
}

void adapter_backward(const AdapterBackward& whole, int64_t rows, int64_t in_columns,
                      int64_t out_columns, int threads) {
  const int64_t rank = whole.dx.rank, widest = std::max(in_columns, out_columns);
  const bool needs_b = whole.grad_b.grad, needs_a = whole.grad_a.grad, needs_x = whole.dx.out.data;
  const bool needs_t = needs_a || needs_x;
  const int64_t step = pieces(pieces(rows, BLOCK), MOST_PARTS) * BLOCK;
  Parts b{whole.grad_b, out_columns, pieces(rows, std::max<int64_t>(step, 1))};
  Parts a{whole.grad_a, in_columns, b.count};
  const int64_t sums = b.count * (a.size() + b.size());

  // The shape alone decides: the bits do not depend on the threads.
  if (has_few(rows) || BLOCK * widest * size_of(whole.t.wide.dtype) > CACHE ||
      rank * widest > PACKED || sums > MOST_SUMS) {
    AdapterBackward one = whole;
    const std::unique_ptr<float[]> t(needs_t ? new float[size_t(rows * rank)] : nullptr);
    one.t.out = one.grad_a.narrow = one.dx.narrow = {t.get(), rank};
    if (needs_t) shrink(one.t, rows, rank, threads);
    if (needs_b) rank_gradient(one.grad_b, out_columns, threads);
    if (needs_a) rank_gradient(one.grad_a, in_columns, threads);
    if (needs_x) expand(one.dx, rows, in_columns, threads);
    return;
  }
  b.sums = scratch<float>(Scratch::parts, sums);
  a.sums = b.sums + b.count * b.size();

  const int64_t tasks = b.tasks() + a.tasks();
  const auto finish = [&](int64_t i) { i < b.tasks() ? b.finish(i) : a.finish(i - b.tasks()); };
  // Few sums: whoever comes last adds them, instead of waking everybody again.
  const bool last_finishes = sums <= 1 << 18;
  std::atomic<int64_t> open{b.count};

  const int64_t call = new_call();
  threads = threads_for(2 * rows * rank * (in_columns + out_columns), threads);
  parallel_for(threads, b.count, [&](int64_t i) {
    const int64_t begin = i * step, end = std::min(rows, begin + step);
    const Narrow t{scratch<float>(Scratch::narrow, BLOCK * rank), rank};
    for (int64_t first = begin; first < end; first += BLOCK) {
      const int64_t count = std::min(end - first, BLOCK);
      const bool add = first > begin;
      if (needs_t) kernels().shrink(of_rows(whole.t, first, count, t, rank, call));
      // dy's rows are in the cache by now. x has lain in memory since the forward.
      const Ahead x = needs_a ? ahead(whole.grad_a.wide, first, count, in_columns) : Ahead{};
      if (needs_b) b.add_rows(i, first, count, from_row(whole.grad_b.narrow, first), add, x);
      if (needs_a) a.add_rows(i, first, count, t, add, {});
      if (needs_x) kernels().expand(of_rows(whole.dx, first, count, t, in_columns, call));
    }
    if (last_finishes && open.fetch_sub(1) == 1)
      for (int64_t task = 0; task < tasks; task++) finish(task);
  });
  if (!last_finishes) parallel_for(threads, tasks, finish);
}

}  // namespace lora
