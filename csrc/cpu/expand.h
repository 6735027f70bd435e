// y += h B^T: outer products over the rank. Included inside a level's namespace.

// acc[i][v] = sum over k of left[i * left_row + k * left_step] * panel[k * pitch + v * W]
template <class C, int ROWS_>
static inline __attribute__((always_inline)) void outer_tile(const uint32_t* left, int64_t left_row,
                                                             int64_t left_step,
                                                             const uint32_t* panel, int64_t pitch,
                                                             int64_t steps,
                                                             vf (&acc)[ROWS_][VECTORS]) {
#pragma GCC unroll 4
  for (int i = 0; i < ROWS_; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) acc[i][v] = zero();
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

constexpr int64_t SPAN = VECTORS * W;  // columns of an outer tile

// Columns [begin, begin + n) of a factor as words of DEPTH neighbouring ranks: [R / DEPTH, pitch].
template <class C>
static uint32_t* pack_columns(const Factor& f, int64_t rank, int64_t begin, int64_t n,
                              int64_t pitch, float scale) {
  const int64_t steps = (rank + C::DEPTH - 1) / C::DEPTH;
  uint32_t* panel = scratch<uint32_t>(Scratch::panel, steps * pitch);
  if (f.column_stride == 1) {
    for (int64_t k = 0; k < steps; k++) {
      const char* rows[2];
      for (int64_t j = 0; j < C::DEPTH; j++)
        rows[j] = k * C::DEPTH + j < rank ? f.at(k * C::DEPTH + j, begin) : nullptr;
      C::pack_rows(panel + k * pitch, f.dtype, rows, n, nullptr, scale);
    }
  } else if (C::is_packed(f.dtype) && scale == 1 && rank % C::DEPTH == 0) {
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
  return panel;
}

// Adds (or writes) a row of a tile; FULL: all SPAN columns exist.
template <DType T, bool FULL>
static inline __attribute__((always_inline)) void finish_row(const vf* sums, char* out, int64_t n,
                                                             const uint8_t* mask, bool add_to) {
  uint64_t bits = ~uint64_t(0);
  if (mask) {
    if constexpr (FULL) {
      std::memcpy(&bits, mask, SPAN / 8);
    } else {
      bits = 0;
      std::memcpy(&bits, mask, size_t((n + 7) / 8));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) {
    const int64_t some = FULL ? W : n - v * W;
    if (!FULL && some <= 0) break;
    char* to = out + v * W * size_of(T);
    vf value = sums[v];
    if (mask) value = keep(value, uint32_t(bits >> (v * W)));
    if (add_to) value = add(value, load_any(T, to, some));
    store_any(T, to, value, some);
  }
}

template <class C, DType T, int ROWS_>
static void expand_tile(const Expand& t, int64_t m, const uint32_t* left, int64_t left_row,
                        const uint32_t* panel, int64_t pitch, int64_t steps) {
  const int64_t n = t.column_end - t.column_begin;
  char* out[ROWS_];
  const uint8_t* mask[ROWS_];
  for (int i = 0; i < ROWS_; i++) {
    out[i] = t.out.row(m + i) + t.column_begin * size_of(T);
    mask[i] = t.mask.bits ? t.mask.row(m + i) + t.column_begin / 8 : nullptr;
  }
  for (int64_t d = 0; d < n; d += SPAN) {
    vf acc[ROWS_][VECTORS];
    outer_tile<C, ROWS_>(left, left_row, 1, panel + d, pitch, steps, acc);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS_; i++) {
      char* to = out[i] + d * size_of(T);
      const uint8_t* kept = t.mask.bits ? mask[i] + d / 8 : nullptr;
      if (n - d >= SPAN) {
        finish_row<T, true>(acc[i], to, SPAN, kept, t.add);
      } else {
        finish_row<T, false>(acc[i], to, n - d, kept, t.add);
      }
    }
  }
}

template <class C, DType T>
static void expand_as(const Expand& t) {
  typedef typename C::Element E;
  const int64_t n = t.column_end - t.column_begin, pitch = round_up(n, SPAN);
  const int64_t steps = (t.rank + C::DEPTH - 1) / C::DEPTH;
  const uint32_t* panel =
      pack_columns<C>(t.factor, t.rank, t.column_begin, n, pitch, t.factor_scale);
  uint32_t* left = scratch<uint32_t>(Scratch::left, ROWS * steps);
  for (int64_t m = t.row_begin; m < t.row_end; m += ROWS) {
    const int rows = int(t.row_end - m < ROWS ? t.row_end - m : ROWS);
    for (int i = 0; i < rows; i++) {
      const float scale = t.weights ? t.left_scale * t.weights[m + i] : t.left_scale;
      left[i * steps + steps - 1] = 0;
      C::pack((E*)(left + i * steps), DType::f32, (const char*)t.narrow.row(m + i), t.rank, nullptr,
              scale);
    }
    if (rows == 1) expand_tile<C, T, 1>(t, m, left, steps, panel, pitch, steps);
    if (rows == 2) expand_tile<C, T, 2>(t, m, left, steps, panel, pitch, steps);
    if constexpr (ROWS > 2) {
      if (rows == 3) expand_tile<C, T, 3>(t, m, left, steps, panel, pitch, steps);
      if (rows == 4) expand_tile<C, T, 4>(t, m, left, steps, panel, pitch, steps);
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
