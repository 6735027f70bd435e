#include "linear.h"

#include <algorithm>

#include "parallel.h"

namespace lora {

namespace {
constexpr int64_t COLUMNS = 256;  // of an expand task: its panel stays in the first-level cache

int64_t pieces(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }
int64_t round_up(int64_t n, int64_t to) { return pieces(n, to) * to; }
}  // namespace

int threads_for(int64_t multiplications, int threads) {
  constexpr int64_t WORTH_A_THREAD = 1 << 19;  // some ten microseconds
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, multiplications / WORTH_A_THREAD)));
}

void shrink(const Shrink& whole, int64_t rows, int64_t rank, int threads) {
  threads = threads_for(rows * rank * whole.columns, threads);
  // Few rows: the factor is what is read, and the threads share its ranks.
  const int64_t ranks = threads > 1 && rows < 64 ? 8 : rank;
  const int64_t step = threads > 1 ? std::max<int64_t>(64, round_up(pieces(rows, 2 * threads), 4))
                                   : std::max<int64_t>(rows, 1);
  const int64_t row_pieces = pieces(rows, step), rank_pieces = pieces(rank, ranks);
  parallel_for(threads, row_pieces * rank_pieces, [&](int64_t i) {
    Shrink t = whole;
    t.row_begin = i / rank_pieces * step;
    t.row_end = std::min(rows, t.row_begin + step);
    t.rank_begin = i % rank_pieces * ranks;
    t.rank_end = std::min(rank, t.rank_begin + ranks);
    kernels().shrink(t);
  });
}

void expand(const Expand& whole, int64_t rows, int64_t columns, int threads) {
  threads = threads_for(rows * whole.rank * columns, threads);
  const int64_t column_pieces = pieces(columns, COLUMNS);
  const int64_t wanted = threads > 1 ? pieces(2 * threads, std::max<int64_t>(column_pieces, 1)) : 1;
  const int64_t step = std::max<int64_t>(64, round_up(pieces(rows, wanted), 4));
  parallel_for(threads, column_pieces * pieces(rows, step), [&](int64_t i) {
    Expand t = whole;
    t.row_begin = i / column_pieces * step;
    t.row_end = std::min(rows, t.row_begin + step);
    t.column_begin = i % column_pieces * COLUMNS;
    t.column_end = std::min(columns, t.column_begin + COLUMNS);
    kernels().expand(t);
  });
}

void rank_gradient(const RankGradient& whole, int64_t columns, int threads) {
  threads = threads_for(whole.rows * whole.rank * columns, threads);
  const int64_t step = std::min<int64_t>(512, round_up(pieces(columns, 2 * threads), 64));
  parallel_for(threads, pieces(columns, step), [&](int64_t i) {
    RankGradient t = whole;
    t.column_begin = i * step;
    t.column_end = std::min(columns, t.column_begin + step);
    kernels().rank_gradient(t);
  });
}

void draw_mask(uint8_t* out, int64_t stride, MaskPlace place, int64_t rows, int64_t columns,
               uint64_t seed, uint32_t stream, uint32_t threshold, int threads) {
  const int64_t groups = pieces(columns, 8);
  if (rows == 0 || groups == 0) return;
  // About as long as two hundred multiplications each.
  threads = threads_for(rows * groups * 200, threads);
  if (stride == groups && place.groups_per_row == uint64_t(groups)) {  // one run
    const int64_t all = rows * groups, step = std::max<int64_t>(4096, pieces(all, 4 * threads));
    parallel_for(threads, pieces(all, step), [&](int64_t i) {
      kernels().philox({out + i * step, place.first_group + uint64_t(i * step),
                        std::min(step, all - i * step), seed, stream, threshold});
    });
    return;
  }
  parallel_for(threads, rows, [&](int64_t i) {
    kernels().philox({out + i * stride, place.group(i), groups, seed, stream, threshold});
  });
}

}  // namespace lora
