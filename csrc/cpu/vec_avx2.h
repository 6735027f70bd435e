// Vectors of the AVX2 level: eight floats. Included inside its namespace.

constexpr int W = 8;        // lanes
constexpr int ROWS = 4;     // of a tile: 8 accumulators of the 16 registers
constexpr int RANKS = 2;    // of a shrink tile
constexpr int VECTORS = 2;  // of an outer tile
typedef __m256 vf;

static inline vf zero() { return _mm256_setzero_ps(); }
static inline vf set1(float a) { return _mm256_set1_ps(a); }
static inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, vf v) { _mm256_storeu_ps(p, v); }

static inline __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n < W ? n : W)), lane);
}
static inline vf load_some(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, first_lanes(n));
}
static inline vf load_any(DType dtype, const char* p, int64_t n) {
  if (dtype == DType::f32) return n >= W ? load((const float*)p) : load_some((const float*)p, n);
  __m128i halves;
  if (n >= W) {
    halves = _mm_loadu_si128((const __m128i*)p);
  } else {
    uint16_t some[W] = {0};
    for (int64_t i = 0; i < n; i++) std::memcpy(some + i, p + 2 * i, 2);
    halves = _mm_loadu_si128((const __m128i*)some);
  }
  if (dtype == DType::f16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline __m128i bf16_of(vf v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
static inline void store_any(DType dtype, char* p, vf v, int64_t n) {
  if (dtype == DType::f32) {
    if (n >= W) return store((float*)p, v);
    return _mm256_maskstore_ps((float*)p, first_lanes(n), v);
  }
  const __m128i halves =
      dtype == DType::f16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : bf16_of(v);
  if (n >= W) return _mm_storeu_si128((__m128i*)p, halves);
  uint16_t some[W];
  _mm_storeu_si128((__m128i*)some, halves);
  std::memcpy(p, some, 2 * n);
}
static inline vf keep(vf v, uint32_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_and_si256(_mm256_set1_epi32(int(bits)), bit);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, bit)));
}
static inline void sum4(const vf* v, float* out) {
  const vf pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

constexpr int GROUPS = 8;

// Both halves of the products of eight words with a constant.
static inline void multiply(__m256i words, __m256i by, __m256i& low, __m256i& high) {
  const __m256i even = _mm256_mul_epu32(words, by);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), by);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}

// Eight groups of the same high counter word.
static inline void philox_groups(uint8_t* out, uint64_t group, const Philox& p) {
  __m256i c0 = _mm256_add_epi32(_mm256_set1_epi32(int(uint32_t(group))),
                                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i c1 = _mm256_set1_epi32(int(uint32_t(group >> 32)));
  __m256i c2 = _mm256_set1_epi32(int(p.stream)), c3 = _mm256_setzero_si256();
  uint32_t k0 = uint32_t(p.seed), k1 = uint32_t(p.seed >> 32);
  const __m256i m0 = _mm256_set1_epi32(int(0xD2511F53u)), m1 = _mm256_set1_epi32(int(0xCD9E8D57u));
#pragma GCC unroll 7
  for (int round = 0; round < 7; round++) {
    __m256i low0, high0, low1, high1;
    multiply(c0, m0, low0, high0);
    multiply(c2, m1, low1, high1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), _mm256_set1_epi32(int(k0)));
    c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), _mm256_set1_epi32(int(k1)));
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // A group's four words side by side: eight lanes of 16 bits, then one bit of each.
  const __m256i a = _mm256_unpacklo_epi32(c0, c1), b = _mm256_unpackhi_epi32(c0, c1);
  const __m256i c = _mm256_unpacklo_epi32(c2, c3), d = _mm256_unpackhi_epi32(c2, c3);
  const __m256i q = _mm256_set1_epi16(short(p.threshold));
  const __m256i lanes[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                            _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m256i first = _mm256_cmpeq_epi16(_mm256_max_epu16(lanes[2 * i], q), lanes[2 * i]);
    const __m256i second =
        _mm256_cmpeq_epi16(_mm256_max_epu16(lanes[2 * i + 1], q), lanes[2 * i + 1]);
    const uint32_t bits = uint32_t(_mm256_movemask_epi8(_mm256_packs_epi16(first, second)));
    out[2 * i] = uint8_t(bits);
    out[2 * i + 1] = uint8_t(bits >> 8);
    out[2 * i + 4] = uint8_t(bits >> 16);
    out[2 * i + 5] = uint8_t(bits >> 24);
  }
}
