// Conversions and loads that every level falls back on, and the vectors of the baseline level.
// Included inside a level's namespace.

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of_bf16(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

// Round to nearest even; NaN stays NaN.
static inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float float_of_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = uint32_t(half & 0x7fff) << 13;
  if ((half & 0x7c00) == 0x7c00) return float_of_bits(sign | 0x7f800000 | rest);
  // The product puts the exponent's bias right, for subnormal numbers too.
  return float_of_bits(sign | bits_of_float(float_of_bits(rest) * float_of_bits(0x77800000)));
}

static inline uint16_t f16_of_float(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                       // subnormal: the addition rounds it
    const float half = float_of_bits(magnitude) + 0.5f;
    return sign | uint16_t(bits_of_float(half) - 0x3f000000);
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

static inline float load_scalar(DType dtype, const char* p) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, p, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, p, 2);
  return dtype == DType::bf16 ? float_of_bf16(half) : float_of_f16(half);
}

static inline void store_scalar(DType dtype, char* p, float value) {
  if (dtype == DType::f32) {
    std::memcpy(p, &value, 4);
    return;
  }
  const uint16_t half = dtype == DType::bf16 ? bf16_of_float(value) : f16_of_float(value);
  std::memcpy(p, &half, 2);
}

// The 32 bits of a keep-mask from column d on (a multiple of 8), of which n matter.
static inline uint32_t mask_bits(const uint8_t* row, int64_t d, int64_t n) {
  uint32_t bits = 0;
  const int64_t bytes = n >= 32 ? 4 : (n + 7) / 8;
  if (bytes == 4) {
    std::memcpy(&bits, row + d / 8, 4);
  } else if (bytes == 2) {
    uint16_t half;
    std::memcpy(&half, row + d / 8, 2);
    bits = half;
  } else {
    for (int64_t i = 0; i < bytes; i++) bits |= uint32_t(row[d / 8 + i]) << (8 * i);
  }
  return bits;
}

// One group of the generator.
static inline uint8_t philox_byte(uint64_t group, const Philox& p) {
  uint32_t c0 = uint32_t(group), c1 = uint32_t(group >> 32), c2 = p.stream, c3 = 0;
  uint32_t k0 = uint32_t(p.seed), k1 = uint32_t(p.seed >> 32);
  for (int round = 0; round < 7; round++) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  uint8_t byte = 0;
  for (int j = 0; j < 8; j++)
    byte |= uint8_t(((words[j / 2] >> (16 * (j % 2))) & 0xffff) >= p.threshold) << j;
  return byte;
}
