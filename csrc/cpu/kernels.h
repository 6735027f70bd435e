// The kernels, written once over a level's vectors; included inside each level's namespace.
//
// Both micro-kernels take their operands packed in a compute type: fp32, or (AVX-512-BF16, where
// the activation is bf16) pairs of bf16 that one instruction multiplies and adds in fp32. Dropout,
// gathering, casts and odd ends are the packing's business. Every result is a sum in an order that
// depends on its own row, column and rank only: never on the tile, the task or the thread.

// --- compute types ---------------------------------------------------------------------------

static inline void fill_zero(void* to, int64_t bytes) {
  if (bytes > 0) std::memset(to, 0, size_t(bytes));
}

// Words [rows, columns] to [columns, rows]. bf16 pairs need not lie at a multiple of a word.
static void transpose(uint32_t* to, int64_t to_pitch, const uint32_t* from, int64_t from_pitch,
                      int64_t rows, int64_t columns) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    // A factor is read once: the rows after the next ones are on their way meanwhile.
    const char* ahead = (const char*)(from + (i + 16) * from_pitch);
    for (int64_t k = 0; k < 8 * from_pitch * 4; k += 64) __builtin_prefetch(ahead + k);
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8)
      transpose_block(to + j * to_pitch + i, to_pitch, from + i * from_pitch + j, from_pitch);
    for (; j < columns; j++)
      for (int64_t k = i; k < i + 8; k++)
        std::memcpy(to + j * to_pitch + k, from + k * from_pitch + j, 4);
  }
  for (; i < rows; i++)
    for (int64_t j = 0; j < columns; j++)
      std::memcpy(to + j * to_pitch + i, from + i * from_pitch + j, 4);
}

struct Single {
  typedef float Element;
  static constexpr int DEPTH = 1;  // of the sum, per word of an outer product
  static constexpr int STEP = W;   // elements per vector of a dot product

  static bool is_packed(DType dtype) { return dtype == DType::f32; }

  static inline vf dot(vf sum, const Element* a, const Element* b) {
    return fma(load(a), load(b), sum);
  }
  static inline vf dot_some(vf sum, const Element* a, const Element* b, int64_t n) {
    return fma(load_some(a, n), load_some(b, n), sum);
  }
  static inline vf outer(vf sum, const uint32_t* left, vf panel) {
    float value;
    std::memcpy(&value, left, 4);
    return fma(set1(value), panel, sum);
  }

  static inline void pack(Element* to, DType dtype, const char* from, int64_t n,
                          const uint8_t* mask, float scale = 1) {
    for (int64_t d = 0; d < n; d += W) {
      vf v = load_any(dtype, from + d * size_of(dtype), n - d);
      if (mask) v = keep(v, mask_bits(mask, d & ~int64_t(7), n - (d & ~int64_t(7))) >> (d & 7));
      if (scale != 1) v = mul(v, set1(scale));
      const int64_t left = n - d;
      if (left >= W) {
        store(to + d, v);
      } else {
        store_any(DType::f32, (char*)(to + d), v, left);
      }
    }
  }
  // Rows k, one word per column each. A row that does not exist is nullptr.
  static inline void pack_rows(uint32_t* to, DType dtype, const char* const* rows, int64_t n,
                               const uint8_t* const* masks, float scale) {
    pack((float*)to, dtype, rows[0], n, masks ? masks[0] : nullptr, scale);
  }
};

#ifdef LORA_AVX512_BF16
struct Pairs {
  typedef uint16_t Element;
  static constexpr int DEPTH = 2;
  static constexpr int STEP = 32;

  static bool is_packed(DType dtype) { return dtype == DType::bf16; }

  static inline __mmask32 lanes(int64_t n) { return __mmask32(n >= 32 ? ~0u : (1u << n) - 1); }
  static inline __m512i some(const Element* a, int64_t n) {
    return _mm512_maskz_loadu_epi16(lanes(n), a);
  }
  static inline vf dot(vf sum, const Element* a, const Element* b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
  }
  static inline vf dot_some(vf sum, const Element* a, const Element* b, int64_t n) {
    return _mm512_dpbf16_ps(sum, (__m512bh)some(a, n), (__m512bh)some(b, n));
  }
  static inline vf outer(vf sum, const uint32_t* left, vf panel) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(*left)),
                            (__m512bh)_mm512_castps_si512(panel));
  }

  // Up to 32 elements as bf16, zeros behind.
  static inline __m512i load_halves(DType dtype, const char* from, int64_t n, float scale) {
    if (dtype == DType::bf16 && scale == 1) return some((const Element*)from, n);
    vf low = load_any(dtype, from, n);
    vf high = n > W ? load_any(dtype, from + W * size_of(dtype), n - W) : zero();
    if (scale != 1) low = mul(low, set1(scale)), high = mul(high, set1(scale));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  static inline __m512i masked(__m512i halves, const uint8_t* mask, int64_t d, int64_t n) {
    return mask ? _mm512_maskz_mov_epi16(__mmask32(mask_bits(mask, d, n - d)), halves) : halves;
  }
  static inline void pack(Element* to, DType dtype, const char* from, int64_t n,
                          const uint8_t* mask, float scale = 1) {
    int64_t d = 0;
    if (dtype == DType::bf16 && mask && scale == 1)
      for (; d + 32 <= n; d += 32) {
        uint32_t bits;
        std::memcpy(&bits, mask + d / 8, 4);
        _mm512_storeu_si512(to + d, _mm512_maskz_loadu_epi16(__mmask32(bits), from + 2 * d));
      }
    for (; d < n; d += 32) {
      const __m512i halves = load_halves(dtype, from + d * size_of(dtype), n - d, scale);
      _mm512_mask_storeu_epi16(to + d, lanes(n - d), masked(halves, mask, d, n));
    }
  }
  static inline void pack_rows(uint32_t* to, DType dtype, const char* const* rows, int64_t n,
                               const uint8_t* const* masks, float scale) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9,
                                           40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
                                           32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    int64_t d = 0;
    if (dtype == DType::bf16 && scale == 1 && rows[1])
      for (; d + 32 <= n; d += 32) {
        uint32_t bits[2] = {~0u, ~0u};
        if (masks) {
          std::memcpy(bits, masks[0] + d / 8, 4);
          std::memcpy(bits + 1, masks[1] + d / 8, 4);
        }
        const __m512i a = _mm512_maskz_loadu_epi16(__mmask32(bits[0]), rows[0] + 2 * d);
        const __m512i b = _mm512_maskz_loadu_epi16(__mmask32(bits[1]), rows[1] + 2 * d);
        _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(a, second, b));
      }
    for (; d < n; d += 32) {
      __m512i a = load_halves(dtype, rows[0] + d * size_of(dtype), n - d, scale);
      __m512i b = _mm512_setzero_si512();
      if (rows[1]) b = load_halves(dtype, rows[1] + d * size_of(dtype), n - d, scale);
      if (masks) {
        a = masked(a, masks[0], d, n);
        if (rows[1]) b = masked(b, masks[1], d, n);
      }
      const int64_t left = n - d;
      _mm512_mask_storeu_epi32(to + d, first_lanes(left), _mm512_permutex2var_epi16(a, first, b));
      if (left > 16)
        _mm512_mask_storeu_epi32(to + d + 16, first_lanes(left - 16),
                                 _mm512_permutex2var_epi16(a, second, b));
    }
  }
};
#endif

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- shrink ----------------------------------------------------------------------------------

template <class C, int ROWS_, int RANKS_>
static void dot_tile(const typename C::Element* const* x, const typename C::Element* const* f,
                     int64_t n, float* sums) {
  vf acc[(ROWS_ * RANKS_ + 3) / 4 * 4];
#pragma GCC unroll 16
  for (vf& a : acc) a = zero();
  int64_t d = 0;
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
                        const typename C::Element* const* f, int64_t n, float* sums) {
  static_assert(ROWS <= 4, "cases");
  if (rows == 1) return dot_tile<C, 1, RANKS>(x, f, n, sums);
  if (rows == 2) return dot_tile<C, 2, RANKS>(x, f, n, sums);
  if constexpr (ROWS > 2) {
    if (rows == 3) return dot_tile<C, 3, RANKS>(x, f, n, sums);
    return dot_tile<C, 4, RANKS>(x, f, n, sums);
  }
}

// Ranks rank_begin .. rank_end of a factor as rows of the compute type.
template <class C>
static const typename C::Element* pack_ranks(const Shrink& t, int64_t pitch) {
  typedef typename C::Element E;
  const int64_t ranks = t.rank_end - t.rank_begin, n = t.columns;
  E* panel = scratch<E>(Scratch::panel, ranks * pitch);
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
    for (int64_t r = 0; r < ranks; r += RANKS) {
      const E* f[RANKS];
      // Beyond the last rank the last one again: its sums are not stored twice.
      for (int j = 0; j < RANKS; j++)
        f[j] = panel + (r + j < ranks ? r + j : ranks - 1) * panel_pitch;
      float sums[ROWS * RANKS + 3];
      dot_tile_of<C>(rows, x, f, n, sums);
      const int64_t count = ranks - r < RANKS ? ranks - r : RANKS;
      for (int i = 0; i < rows; i++) {
        float* out = t.out.row(m + i) + t.rank_begin + r;
        for (int64_t j = 0; j < count; j++) out[j] = t.scale * sums[i * RANKS + j];
      }
    }
  }
}

// --- outer products --------------------------------------------------------------------------

// acc[i][v] = sum over k of left[i * left_row + k * left_step] * panel[k * pitch + v * W]
template <class C, int ROWS_>
static inline __attribute__((always_inline)) void outer_tile(const uint32_t* left,
                                                             int64_t left_row, int64_t left_step,
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

// --- rank gradient ---------------------------------------------------------------------------

constexpr int64_t ROW_BLOCK = 128;  // summed on its own, then added to the sum so far
constexpr int64_t AHEAD = 8;        // rows that are fetched before they are needed

// sums[r, d] (+)= the products of one block of rows; ranks in tiles of ROWS.
template <class C, int ROWS_>
static void gradient_tile(const uint32_t* left, int64_t left_step, const uint32_t* panel,
                          int64_t steps, float* sums, int64_t pitch, bool first) {
  vf acc[ROWS_][VECTORS];
  outer_tile<C, ROWS_>(left, 1, left_step, panel, SPAN, steps, acc);
#pragma GCC unroll 4
  for (int i = 0; i < ROWS_; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      float* to = sums + i * pitch + v * W;
      store(to, first ? acc[i][v] : add(load(to), acc[i][v]));
    }
}

static void store_gradient(const RankGradient& t, float* sums, int64_t pitch) {
  const int64_t n = t.column_end - t.column_begin, element = size_of(t.grad_dtype);
  const vf scale = set1(t.scale);
  if (t.column_stride == 1) {
    for (int64_t r = 0; r < t.rank; r++) {
      char* out = t.grad + (r * t.rank_stride + t.column_begin) * element;
      for (int64_t d = 0; d < n; d += W)
        store_any(t.grad_dtype, out + d * element, mul(load(sums + r * pitch + d), scale), n - d);
    }
    return;
  }
  const int64_t rank_pitch = round_up(t.rank, W);
  float* turned = scratch<float>(Scratch::temporary, n * rank_pitch);
  transpose((uint32_t*)turned, rank_pitch, (const uint32_t*)sums, pitch, t.rank, n);
  for (int64_t d = 0; d < n; d++) {
    char* out = t.grad + (t.column_begin + d) * t.column_stride * element;
    for (int64_t r = 0; r < t.rank; r += W)
      store_any(t.grad_dtype, out + r * element,
                mul(load_some(turned + d * rank_pitch + r, t.rank - r), scale), t.rank - r);
  }
}

template <class C>
static void rank_gradient_in(const RankGradient& t) {
  const int64_t n = t.column_end - t.column_begin, pitch = round_up(n, SPAN);
  const int64_t element = size_of(t.wide.dtype), ranks = t.rank;
  float* sums = scratch<float>(Scratch::sums, ranks * pitch);
  uint32_t* left = scratch<uint32_t>(Scratch::left, ROW_BLOCK / C::DEPTH * ranks);
  uint32_t* panel = scratch<uint32_t>(Scratch::panel, ROW_BLOCK / C::DEPTH * pitch);
  float* scaled = scratch<float>(Scratch::rows, 2 * ranks);
  if (t.rows == 0) fill_zero(sums, ranks * pitch * 4);
  for (int64_t begin = 0; begin < t.rows; begin += ROW_BLOCK) {
    const int64_t count = t.rows - begin < ROW_BLOCK ? t.rows - begin : ROW_BLOCK;
    const int64_t steps = (count + C::DEPTH - 1) / C::DEPTH;
    for (int64_t k = 0; k < steps; k++) {
      const char* rows[2];
      for (int64_t j = 0; j < C::DEPTH; j++) {
        const int64_t m = k * C::DEPTH + j;
        rows[j] = m < count ? (const char*)t.narrow.row(begin + m) : nullptr;
        if (rows[j] && t.weights) {
          Single::pack(scaled + j * ranks, DType::f32, rows[j], ranks, nullptr,
                       t.weights[begin + m]);
          rows[j] = (const char*)(scaled + j * ranks);
        }
      }
      C::pack_rows(left + k * ranks, DType::f32, rows, ranks, nullptr, 1);
    }
    // Whole rows of the task at a time: memory is read in order.
    for (int64_t k = 0; k < steps; k++) {
      const char* rows[2];
      const uint8_t* masks[2];
      for (int64_t j = 0; j < C::DEPTH; j++) {
        const int64_t m = k * C::DEPTH + j;
        rows[j] = m < count ? t.wide.row(begin + m) + t.column_begin * element : nullptr;
        masks[j] = t.mask.bits && m < count ? t.mask.row(begin + m) + t.column_begin / 8 : nullptr;
        if (m + AHEAD < count) {
          const char* ahead = t.wide.row(begin + m + AHEAD) + t.column_begin * element;
          for (int64_t at = 0; at < n * element; at += 64) __builtin_prefetch(ahead + at);
        }
      }
      for (int64_t d = 0; d < n; d += SPAN) {
        const int64_t width = n - d < SPAN ? n - d : SPAN;
        uint32_t* to = panel + (d * steps + k * SPAN);
        C::pack_rows(to, t.wide.dtype, rows, width, t.mask.bits ? masks : nullptr, 1);
        fill_zero(to + width, (SPAN - width) * 4);
        for (int64_t j = 0; j < C::DEPTH; j++) {
          if (rows[j]) rows[j] += SPAN * element;
          if (masks[j]) masks[j] += SPAN / 8;
        }
      }
    }
    for (int64_t d = 0; d < n; d += SPAN) {
      const uint32_t* block = panel + d * steps;
      for (int64_t r = 0; r < ranks; r += ROWS) {
        float* to = sums + r * pitch + d;
        const int64_t some = ranks - r;
        if (some == 1) gradient_tile<C, 1>(left + r, ranks, block, steps, to, pitch, !begin);
        if (some == 2 || (ROWS == 2 && some > 2))
          gradient_tile<C, 2>(left + r, ranks, block, steps, to, pitch, !begin);
        if constexpr (ROWS > 2) {
          if (some == 3) gradient_tile<C, 3>(left + r, ranks, block, steps, to, pitch, !begin);
          if (some >= 4) gradient_tile<C, 4>(left + r, ranks, block, steps, to, pitch, !begin);
        }
      }
    }
  }
  store_gradient(t, sums, pitch);
}

// --- the level's table -----------------------------------------------------------------------

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
