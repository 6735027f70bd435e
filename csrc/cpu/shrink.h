// h = D(x) A^T: dot products of a row with ranks. Included inside a level's namespace.

// ahead: rows of bytes that are needed next, `step` bytes of each for a vector of elements; or
// nullptr.
template <class C, int ROWS_, int RANKS_>
static void dot_tile(const typename C::Element* const* x, const typename C::Element* const* f,
                     int64_t n, const char* const* ahead, int64_t step, float* sums) {
  vf acc[(ROWS_ * RANKS_ + 3) / 4 * 4];
#pragma GCC unroll 16
  for (vf& a : acc) a = zero();
  int64_t d = 0;
  if (ahead)
    for (; d + C::STEP <= n; d += C::STEP)
#pragma GCC unroll 4
      for (int i = 0; i < ROWS_; i++) {
        __builtin_prefetch(ahead[i] + d / C::STEP * step);
#pragma GCC unroll 4
        for (int j = 0; j < RANKS_; j++)
          acc[i * RANKS_ + j] = C::dot(acc[i * RANKS_ + j], x[i] + d, f[j] + d);
      }
  for (; d + C::STEP <= n; d += C::STEP)
#pragma GCC unroll 4
    for (int i = 0; i < ROWS_; i++)
#pragma GCC unroll 4
      for (int j = 0; j < RANKS_; j++)
        acc[i * RANKS_ + j] = C::dot(acc[i * RANKS_ + j], x[i] + d, f[j] + d);
  if (d < n)
#pragma GCC unroll 4
    for (int i = 0; i < ROWS_; i++)
#pragma GCC unroll 4
      for (int j = 0; j < RANKS_; j++)
        acc[i * RANKS_ + j] = C::dot_some(acc[i * RANKS_ + j], x[i] + d, f[j] + d, n - d);
#pragma GCC unroll 4
  for (int i = 0; i < ROWS_ * RANKS_; i += 4) sum4(acc + i, sums + i);
}

template <class C>
static void dot_tile_of(int rows, const typename C::Element* const* x,
                        const typename C::Element* const* f, int64_t n, const char* const* ahead,
                        int64_t step, float* sums) {
  static_assert(ROWS <= 4, "cases");
  if (rows == 1) return dot_tile<C, 1, RANKS>(x, f, n, ahead, step, sums);
  if (rows == 2) return dot_tile<C, 2, RANKS>(x, f, n, ahead, step, sums);
  if constexpr (ROWS > 2) {
    if (rows == 3) return dot_tile<C, 3, RANKS>(x, f, n, ahead, step, sums);
    return dot_tile<C, 4, RANKS>(x, f, n, ahead, step, sums);
  }
}

// Ranks rank_begin .. rank_end of a factor as rows of the compute type.
template <class C>
static const typename C::Element* pack_ranks(const Shrink& t, int64_t pitch) {
  typedef typename C::Element E;
  const int64_t ranks = t.rank_end - t.rank_begin, n = t.columns;
  E* panel = scratch<E>(Scratch::ranks, ranks * pitch);
  if (packed_for(Scratch::ranks, t.call)) return panel;
  const Factor& f = t.factor;
  if (f.column_stride == 1) {
    for (int64_t r = 0; r < ranks; r++)
      C::pack(panel + r * pitch, f.dtype, f.at(t.rank_begin + r, 0), n, nullptr);
    return panel;
  }
  // [D, R]: words of DEPTH neighbouring columns, a block of them at a time, then transposed.
  constexpr int64_t BLOCK = 64;
  uint32_t* words = scratch<uint32_t>(Scratch::temporary, BLOCK * ranks);
  const int64_t all = (n + C::DEPTH - 1) / C::DEPTH;
  for (int64_t begin = 0; begin < all; begin += BLOCK) {
    const int64_t count = all - begin < BLOCK ? all - begin : BLOCK;
    for (int64_t i = 0; i < count; i++) {
      const char* rows[2];
      for (int64_t k = 0; k < C::DEPTH; k++) {
        const int64_t d = (begin + i) * C::DEPTH + k;
        rows[k] = d < n ? f.at(t.rank_begin, d) : nullptr;
      }
      C::pack_rows(words + i * ranks, f.dtype, rows, ranks, nullptr, 1);
    }
    transpose((uint32_t*)panel + begin, pitch / C::DEPTH, words, ranks, count, ranks);
  }
  return panel;
}

template <class C>
static void shrink_in(const Shrink& t) {
  typedef typename C::Element E;
  const int64_t n = t.columns, pitch = round_up(n, 32), ranks = t.rank_end - t.rank_begin;
  const E* panel = (const E*)t.factor.at(t.rank_begin, 0);
  int64_t panel_pitch = t.factor.rank_stride;
  if (!C::is_packed(t.factor.dtype) || t.factor.column_stride != 1)
    panel = pack_ranks<C>(t, pitch), panel_pitch = pitch;
  const bool direct = C::is_packed(t.wide.dtype) && !t.mask.bits;
  const int64_t step = C::STEP * size_of(t.wide.dtype);
  E* packed = direct ? nullptr : scratch<E>(Scratch::rows, ROWS * pitch);
  for (int64_t m = t.row_begin; m < t.row_end; m += ROWS) {
    const int rows = int(t.row_end - m < ROWS ? t.row_end - m : ROWS);
    const E* x[ROWS];
    for (int i = 0; i < rows; i++) {
      x[i] = (const E*)t.wide.row(m + i);
      if (direct) continue;
      C::pack(packed + i * pitch, t.wide.dtype, (const char*)x[i], n, t.mask.row(m + i));
      x[i] = packed + i * pitch;
    }
    const bool more = m + 2 * ROWS <= t.row_end;
    const char* next[ROWS];
    for (int i = 0; i < ROWS && more; i++) next[i] = t.wide.row(m + ROWS + i);
    for (int64_t r = 0; r < ranks; r += RANKS) {
      const E* f[RANKS];
      // Beyond the last rank the last one again: its sums are not stored twice.
      for (int j = 0; j < RANKS; j++)
        f[j] = panel + (r + j < ranks ? r + j : ranks - 1) * panel_pitch;
      float sums[ROWS * RANKS + 3];
      dot_tile_of<C>(rows, x, f, n, r == 0 && more ? next : nullptr, step, sums);
      const int64_t count = ranks - r < RANKS ? ranks - r : RANKS;
      for (int i = 0; i < rows; i++) {
        float* out = t.out.row(m + i) + t.rank_begin + r;
        for (int64_t j = 0; j < count; j++) out[j] = t.scale * sums[i * RANKS + j];
      }
    }
  }
}
