// Compute types: what both micro-kernels take their packed operands in. fp32, or (AVX-512-BF16,
// where the activation is bf16) pairs of bf16 that one instruction multiplies and adds in fp32.
// Included inside a level's namespace.

constexpr int64_t SPAN = VECTORS * W;  // columns of an outer tile

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

  // The columns of whole spans that it has packed, span_step words from one span to the next.
  static int64_t pack_spans(uint32_t*, int64_t, DType, const char* const*, int64_t,
                            const uint8_t* const*) {
    return 0;
  }

  // A row of an expand tile: what its sums start from, and where they go. FULL: all SPAN columns
  // exist. Vector v has the columns from v * W on.
  static void order_columns(uint32_t*, int64_t) {}
  template <DType T, bool FULL>
  static inline __attribute__((always_inline)) void start(vf* sums, const char*, int64_t, bool) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sums[v] = zero();
  }
  template <DType T, bool FULL>
  static inline __attribute__((always_inline)) void finish(const vf* sums, char* out, int64_t n,
                                                           const uint8_t* mask, bool add_to, bool) {
    uint64_t bits = ~uint64_t(0);
    if (mask) {
      if constexpr (!FULL) bits = 0;
      std::memcpy(&bits, mask, size_t(FULL ? SPAN / 8 : (n + 7) / 8));
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
    const __m512i first =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t d = 0; d < n; d += 32) {
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

  template <bool MASKED>
  static inline int64_t pack_spans_of(uint32_t* to, int64_t span_step, const char* const* rows,
                                      int64_t n, const uint8_t* const* masks) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    int64_t d = 0;
    for (; d + SPAN <= n; d += SPAN, to += span_step)
#pragma GCC unroll 2
      for (int64_t i = 0; i < SPAN; i += 32) {
        __mmask32 bits[2] = {~0u, ~0u};
        if constexpr (MASKED) {
          std::memcpy(bits, masks[0] + (d + i) / 8, 4);
          std::memcpy(bits + 1, masks[1] + (d + i) / 8, 4);
        }
        const __m512i a = _mm512_maskz_loadu_epi16(bits[0], rows[0] + 2 * (d + i));
        const __m512i b = _mm512_maskz_loadu_epi16(bits[1], rows[1] + 2 * (d + i));
        _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(a, high, b));
      }
    return d;
  }
  static int64_t pack_spans(uint32_t* to, int64_t span_step, DType dtype, const char* const* rows,
                            int64_t n, const uint8_t* const* masks) {
    if (dtype != DType::bf16 || !rows[1]) return 0;
    return masks ? pack_spans_of<true>(to, span_step, rows, n, masks)
                 : pack_spans_of<false>(to, span_step, rows, n, masks);
  }

  // Of 32 columns of a row of an expand tile one vector has the even ones, the next the odd ones:
  // the halves of the words in memory. The sums start from them, and what is dropped is not stored.
  // Gathered rows may be the same row twice: to those the sums are added one after another.
  static void order_columns(uint32_t* panel, int64_t words) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t d = 0; d < words; d += 32) {
      const __m512i a = _mm512_loadu_si512(panel + d), b = _mm512_loadu_si512(panel + d + 16);
      _mm512_storeu_si512(panel + d, _mm512_permutex2var_epi32(a, even, b));
      _mm512_storeu_si512(panel + d + 16, _mm512_permutex2var_epi32(a, odd, b));
    }
  }
  template <bool FULL>
  static inline void load_columns(vf* to, const char* from, int64_t n) {
    const __m512i words = FULL ? _mm512_loadu_si512(from) : some((const Element*)from, n);
    to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    to[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u))));
  }
  template <DType T, bool FULL>
  static inline __attribute__((always_inline)) void start(vf* sums, const char* from, int64_t n,
                                                          bool add_to) {
    static_assert(T == DType::bf16);
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v += 2) {
      sums[v] = sums[v + 1] = zero();
      if (add_to && (FULL || n > v * W)) load_columns<FULL>(sums + v, from + v * 2 * W, n - v * W);
    }
  }
  template <DType T, bool FULL>
  static inline __attribute__((always_inline)) void finish(const vf* sums, char* out, int64_t n,
                                                           const uint8_t* mask, bool add_to,
                                                           bool gathered) {
    const __m512i in_turn =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    uint64_t bits = ~uint64_t(0);
    if (mask) {
      if constexpr (!FULL) bits = 0;
      std::memcpy(&bits, mask, size_t(FULL ? SPAN / 8 : (n + 7) / 8));
    }
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v += 2) {
      if (!FULL && n <= v * W) break;
      const __mmask32 exist = FULL ? ~__mmask32(0) : lanes(n - v * W);
      const __mmask32 kept = __mmask32(bits >> (v * W));
      char* to = out + v * 2 * W;
      vf even = sums[v], odd = sums[v + 1];
      if (add_to && gathered) {
        vf there[2];
        load_columns<FULL>(there, to, n - v * W);
        even = add(even, there[0]), odd = add(odd, there[1]);
      }
      const __m512i halves = _mm512_maskz_permutexvar_epi16(
          add_to ? ~__mmask32(0) : kept, in_turn, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
      if (FULL && !mask) {
        _mm512_storeu_si512(to, halves);
      } else {
        _mm512_mask_storeu_epi16(to, add_to ? exist & kept : exist, halves);
      }
    }
  }
};
#endif

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
