// Vectors of the AVX-512 levels: sixteen floats. Included inside their namespaces.

constexpr int W = 16;       // lanes
constexpr int ROWS = 4;     // of a tile: 16 accumulators of the 32 registers
constexpr int RANKS = 4;    // of a shrink tile
constexpr int VECTORS = 4;  // of an outer tile
typedef __m512 vf;

static inline vf zero() { return _mm512_setzero_ps(); }
static inline vf set1(float a) { return _mm512_set1_ps(a); }
static inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, vf v) { _mm512_storeu_ps(p, v); }

static inline __mmask16 first_lanes(int64_t n) {
  return __mmask16(n >= W ? 0xffff : (1u << n) - 1);
}
static inline vf load_some(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
static inline vf load_any(DType dtype, const char* p, int64_t n) {
  if (dtype == DType::f32) return load_some((const float*)p, n);
  const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  if (dtype == DType::f16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
static inline __m256i bf16_of(vf v) {
#ifdef LORA_AVX512_BF16
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
#endif
}
static inline void store_any(DType dtype, char* p, vf v, int64_t n) {
  if (dtype == DType::f32) return _mm512_mask_storeu_ps(p, first_lanes(n), v);
  const __m256i halves =
      dtype == DType::f16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : bf16_of(v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), halves);
}
static inline vf keep(vf v, uint32_t bits) { return _mm512_maskz_mov_ps(__mmask16(bits), v); }

// A tree that is the same for each of the four: lanes 8 apart, then 4, 2 and 1.
static inline void sum4(const vf* v, float* out) {
  const vf ab = add(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xEE));
  const vf cd = add(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xEE));
  vf all = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  all = add(all, _mm512_permute_ps(all, 0x4E));
  all = add(all, _mm512_permute_ps(all, 0xB1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all)));
}

constexpr int GROUPS = 16;

// Both halves of the products of sixteen words with a constant.
static inline void multiply(__m512i words, __m512i by, __m512i& low, __m512i& high) {
  const __m512i even = _mm512_mul_epu32(words, by);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(words, 32), by);
  low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
}

// Sixteen groups of the same high counter word.
static inline void philox_groups(uint8_t* out, uint64_t group, const Philox& p) {
  __m512i c0 =
      _mm512_add_epi32(_mm512_set1_epi32(int(uint32_t(group))),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  __m512i c1 = _mm512_set1_epi32(int(uint32_t(group >> 32)));
  __m512i c2 = _mm512_set1_epi32(int(p.stream)), c3 = _mm512_setzero_si512();
  uint32_t k0 = uint32_t(p.seed), k1 = uint32_t(p.seed >> 32);
  const __m512i m0 = _mm512_set1_epi32(int(0xD2511F53u)), m1 = _mm512_set1_epi32(int(0xCD9E8D57u));
#pragma GCC unroll 7
  for (int round = 0; round < 7; round++) {
    __m512i low0, high0, low1, high1;
    multiply(c0, m0, low0, high0);
    multiply(c2, m1, low1, high1);
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(int(k0)), 0x96);
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(int(k1)), 0x96);
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // A group's four words side by side: a comparison then gives a byte per group, in the order
  // 0 4 8 12 of the first, 1 5 9 13 of the second ..., which one shuffle of bytes puts right.
  const __m512i a = _mm512_unpacklo_epi32(c0, c1), b = _mm512_unpackhi_epi32(c0, c1);
  const __m512i c = _mm512_unpacklo_epi32(c2, c3), d = _mm512_unpackhi_epi32(c2, c3);
  const __m512i q = _mm512_set1_epi16(short(p.threshold));
  const __m128i bytes =
      _mm_setr_epi32(int(_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(a, c), q)),
                     int(_mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(a, c), q)),
                     int(_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(b, d), q)),
                     int(_mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(b, d), q)));
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm_storeu_si128((__m128i*)out, _mm_shuffle_epi8(bytes, order));
}
