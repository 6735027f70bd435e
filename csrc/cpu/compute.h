// Compute types: what both micro-kernels take their packed operands in. fp32, or (AVX-512-BF16,
// where the activation is bf16) pairs of bf16 that one instruction multiplies and adds in fp32.
// Included inside a level's namespace.

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
    const __m512i first =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
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
