// Vectors of the baseline level: four floats. Included inside its namespace.

constexpr int W = 4;        // lanes
constexpr int ROWS = 2;     // of a tile
constexpr int RANKS = 2;    // of a shrink tile
constexpr int VECTORS = 2;  // of an outer tile
typedef float vf __attribute__((vector_size(16)));

static inline vf zero() { return vf{0, 0, 0, 0}; }
static inline vf set1(float a) { return vf{a, a, a, a}; }
static inline vf mul(vf a, vf b) { return a * b; }
static inline vf add(vf a, vf b) { return a + b; }
static inline vf fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }
static inline vf load_some(const float* p, int64_t n) {
  vf v = zero();
  for (int64_t i = 0; i < n && i < W; i++) v[i] = p[i];
  return v;
}
static inline vf load_any(DType dtype, const char* p, int64_t n) {
  vf v = zero();
  for (int64_t i = 0; i < n && i < W; i++) v[i] = load_scalar(dtype, p + i * size_of(dtype));
  return v;
}
static inline void store_any(DType dtype, char* p, vf v, int64_t n) {
  for (int64_t i = 0; i < n && i < W; i++) store_scalar(dtype, p + i * size_of(dtype), v[i]);
}
static inline vf keep(vf v, uint32_t bits) {
  for (int i = 0; i < W; i++)
    if (!(bits >> i & 1)) v[i] = 0;
  return v;
}
static inline void sum4(const vf* v, float* out) {
  for (int i = 0; i < 4; i++) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
}
static inline void transpose_block(uint32_t* to, int64_t to_pitch, const uint32_t* from,
                                   int64_t from_pitch) {
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) std::memcpy(to + j * to_pitch + i, from + i * from_pitch + j, 4);
}
constexpr int GROUPS = 1;
static inline void philox_groups(uint8_t* out, uint64_t group, const Philox& p) {
  *out = philox_byte(group, p);
}
