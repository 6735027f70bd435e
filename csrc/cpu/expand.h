// y += h B^T: outer products over the rank. Included inside a level's namespace.

// acc[i][v] += sum over k of left[i * left_row + k * left_step] * panel[k * pitch + v * W]
template <class C, int ROWS_>
static inline __attribute__((always_inline)) void outer_tile(const uint32_t* left, int64_t left_row,
                                                             int64_t left_step,
                                                             const uint32_t* panel, int64_t pitch,
                                                             int64_t steps,
                                                             vf (&acc)[ROWS_][VECTORS]) {
  for (int64_t k = 0; k < steps; k++) {
    vf p[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) p[v] = load((const float*)(panel + k * pitch) + v * W);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS_; i++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        acc[i][v] = C::outer(acc[i][v], left + i * left_row + k * left_step, p[v]);
  }
}

// Columns [begin, begin + n) of a factor as words of DEPTH neighbouring ranks: [R / DEPTH, pitch].
template <class C>
static void pack_columns(uint32_t* panel, const Factor& f, int64_t rank, int64_t begin, int64_t n,
                         int64_t pitch, float scale) {
  const int64_t steps = (rank + C::DEPTH - 1) / C::DEPTH;
  if (f.column_stride == 1) {
    for (int64_t k = 0; k < steps; k++) {
      const char* rows[2];
      for (int64_t j = 0; j < C::DEPTH; j++)
        rows[j] = k * C::DEPTH + j < rank ? f.at(k * C::DEPTH + j, begin) : nullptr;
      C::pack_rows(panel + k * pitch, f.dtype, rows, n, nullptr, scale);
    }
  } else if (C::is_packed(f.dtype) && scale == 1 && rank % C::DEPTH == 0 &&
             f.column_stride % C::DEPTH == 0) {
    // Neighbouring ranks lie side by side already.
    transpose(panel, pitch, (const uint32_t*)f.at(0, begin), f.column_stride / C::DEPTH, n, steps);
  } else {
    constexpr int64_t BLOCK = 64;
    uint32_t* words = scratch<uint32_t>(Scratch::temporary, BLOCK * steps);
    for (int64_t d = 0; d < n; d += BLOCK) {
      const int64_t count = n - d < BLOCK ? n - d : BLOCK;
      for (int64_t i = 0; i < count; i++) {
        const char* ahead = f.at(0, begin + d + i + 16);
        for (int64_t k = 0; k < rank * size_of(f.dtype); k += 64) __builtin_prefetch(ahead + k);
        words[i * steps + steps - 1] = 0;  // half of it may belong to no rank
        C::pack((typename C::Element*)(words + i * steps), f.dtype, f.at(0, begin + d + i), rank,
                nullptr, scale);
      }
      transpose(panel + d, pitch, words, steps, count, steps);
    }
  }
  for (int64_t k = 0; k < steps; k++) fill_zero(panel + k * pitch + n, (pitch - n) * 4);
  C::order_columns(panel, steps * pitch);
}

// A piece of the task's columns whose packed factor stays in the first-level cache.
struct Piece {
  int64_t begin, end;
  const uint32_t* panel;
  int64_t pitch;
};

template <class C, DType T, int ROWS_, bool FULL>
static inline __attribute__((always_inline)) void expand_tile(
    const Expand& t, char* const* out, const char* const* next, const uint8_t* const* mask,
    int64_t n, const uint32_t* left, const uint32_t* panel, int64_t pitch, int64_t steps) {
  vf acc[ROWS_][VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS_; i++)
    C::template start<T, FULL>(acc[i], out[i], n, t.add && !t.out.index);
  if (next)
#pragma GCC unroll 4
    for (int i = 0; i < ROWS_; i++)
      for (int64_t at = 0; at < SPAN * size_of(T); at += 64) __builtin_prefetch(next[i] + at, 1);
  outer_tile<C, ROWS_>(left, steps, 1, panel, pitch, steps, acc);
#pragma GCC unroll 4
  for (int i = 0; i < ROWS_; i++)
    C::template finish<T, FULL>(acc[i], out[i], n, mask ? mask[i] : nullptr, t.add, t.out.index);
}

// ROWS_ rows of a piece, from row m on.
template <class C, DType T, int ROWS_>
static void expand_rows(const Expand& t, int64_t m, const Piece& piece, const uint32_t* left,
                        int64_t steps) {
  char* out[ROWS_];
  const char* next[ROWS_];
  const uint8_t* mask[ROWS_];
  const bool more = t.add && m + 2 * ROWS_ <= t.row_end;
  for (int i = 0; i < ROWS_; i++) {
    out[i] = t.out.row(m + i) + piece.begin * size_of(T);
    next[i] = more ? t.out.row(m + i + ROWS_) + piece.begin * size_of(T) : nullptr;
    mask[i] = t.mask.bits ? t.mask.row(m + i) + piece.begin / 8 : nullptr;
  }
  const uint32_t* panel = piece.panel;
  for (int64_t left_over = piece.end - piece.begin; left_over > 0; left_over -= SPAN) {
    const char* const* ahead = more ? next : nullptr;
    const uint8_t* const* kept = t.mask.bits ? mask : nullptr;
    if (left_over >= SPAN) {
      expand_tile<C, T, ROWS_, true>(t, out, ahead, kept, SPAN, left, panel, piece.pitch, steps);
    } else {
      expand_tile<C, T, ROWS_, false>(t, out, ahead, kept, left_over, left, panel, piece.pitch,
                                      steps);
    }
    panel += SPAN;
    for (int i = 0; i < ROWS_; i++) {
      out[i] += SPAN * size_of(T);
      if (more) next[i] += SPAN * size_of(T);
      if (kept) mask[i] += SPAN / 8;
    }
  }
}

template <class C, DType T>
static void expand_as(const Expand& t) {
  typedef typename C::Element E;
  constexpr int64_t WIDTH = 512, CHUNK = 128;
  const int64_t columns = t.column_end - t.column_begin;
  const int64_t steps = (t.rank + C::DEPTH - 1) / C::DEPTH;
  uint32_t* panels = scratch<uint32_t>(Scratch::columns, steps * round_up(columns, SPAN));
  const auto piece_at = [&](int64_t done) {
    const int64_t n = columns - done < WIDTH ? columns - done : WIDTH;
    const int64_t begin = t.column_begin + done;
    return Piece{begin, begin + n, panels + done * steps, round_up(n, SPAN)};
  };
  if (!packed_for(Scratch::columns, t.call))
    for (int64_t done = 0; done < columns; done += WIDTH) {
      const Piece p = piece_at(done);
      pack_columns<C>(panels + done * steps, t.factor, t.rank, p.begin, p.end - p.begin, p.pitch,
                      t.factor_scale);
    }
  uint32_t* left = scratch<uint32_t>(Scratch::left, CHUNK * steps);
  for (int64_t first = t.row_begin; first < t.row_end; first += CHUNK) {
    const int64_t last = t.row_end - first < CHUNK ? t.row_end : first + CHUNK;
    for (int64_t m = first; m < last; m++) {
      uint32_t* to = left + (m - first) * steps;
      to[steps - 1] = 0;  // half of it may belong to no rank
      C::pack((E*)to, DType::f32, (const char*)t.narrow.row(m), t.rank, nullptr,
              t.weights ? t.left_scale * t.weights[m] : t.left_scale);
    }
    for (int64_t done = 0; done < columns; done += WIDTH) {
      const Piece piece = piece_at(done);
      for (int64_t m = first; m < last; m += ROWS) {
        const uint32_t* from = left + (m - first) * steps;
        const int64_t rows = last - m;
        if (rows == 1) expand_rows<C, T, 1>(t, m, piece, from, steps);
        if (rows == 2 || (ROWS == 2 && rows > 2)) expand_rows<C, T, 2>(t, m, piece, from, steps);
        if constexpr (ROWS > 2) {
          if (rows == 3) expand_rows<C, T, 3>(t, m, piece, from, steps);
          if (rows >= 4) expand_rows<C, T, 4>(t, m, piece, from, steps);
        }
      }
    }
  }
}

template <class C>
static void expand_in(const Expand& t) {
  // Pairs are for bf16 alone.
  if (C::DEPTH == 2 || t.out.dtype == DType::bf16) return expand_as<C, DType::bf16>(t);
  if constexpr (C::DEPTH == 1) {
    if (t.out.dtype == DType::f16) return expand_as<C, DType::f16>(t);
    expand_as<C, DType::f32>(t);
  }
}
