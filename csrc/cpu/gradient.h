// dA = t^T D(x): outer products over the rows. Included inside a level's namespace.

constexpr int64_t ROW_BLOCK = 128;  // summed on its own, then added to the sum so far
constexpr int64_t AHEAD = 8;        // rows that are fetched before they are needed

// sums[r, d] (+)= the products of one block of rows; ranks in tiles of ROWS.
template <class C, int ROWS_>
static void gradient_tile(const uint32_t* left, int64_t left_step, const uint32_t* panel,
                          int64_t steps, float* sums, int64_t pitch, bool first) {
  vf acc[ROWS_][VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS_; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) acc[i][v] = zero();
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

// Two rows (or one, of a compute type of single values) of the task's columns, in spans.
template <class C>
static inline void pack_wide(uint32_t* to, int64_t span_step, const RankGradient& t,
                             const char** rows, const uint8_t** masks, int64_t n) {
  const uint8_t* const* kept = t.mask.bits ? masks : nullptr;
  int64_t d = C::pack_spans(to, span_step, t.wide.dtype, rows, n, kept);
  if (d == n) return;
  const int64_t element = size_of(t.wide.dtype);
  for (int64_t j = 0; j < C::DEPTH; j++) {
    if (rows[j]) rows[j] += d * element;
    if (masks[j]) masks[j] += d / 8;
  }
  for (to += d / SPAN * span_step; d < n; d += SPAN, to += span_step) {
    const int64_t width = n - d < SPAN ? n - d : SPAN;
    C::pack_rows(to, t.wide.dtype, rows, width, kept, 1);
    fill_zero(to + width, (SPAN - width) * 4);
    for (int64_t j = 0; j < C::DEPTH; j++) {
      if (rows[j]) rows[j] += SPAN * element;
      if (masks[j]) masks[j] += SPAN / 8;
    }
  }
}

// The next lines of what is fetched ahead.
struct Fetch {
  Ahead left;
  int64_t at = 0;

  static constexpr int64_t LINE = 64;

  int64_t lines() const { return left.rows * ((left.bytes + LINE - 1) / LINE); }
  void some(int64_t count) {
    for (; count > 0 && left.rows > 0; count--) {
      __builtin_prefetch(left.row + at, 0, 2);
      if ((at += LINE) >= left.bytes) at = 0, left.row += left.stride, left.rows--;
    }
  }
};

template <class C>
static void sum_rows(const GradientPart& part) {
  const RankGradient& t = part.whole;
  const int64_t n = t.column_end - t.column_begin, pitch = part.pitch;
  const int64_t element = size_of(t.wide.dtype), ranks = t.rank;
  uint32_t* left = scratch<uint32_t>(Scratch::left, ROW_BLOCK / C::DEPTH * ranks);
  uint32_t* panel = scratch<uint32_t>(Scratch::panel, ROW_BLOCK / C::DEPTH * round_up(n, SPAN));
  float* scaled = scratch<float>(Scratch::rows, 2 * ranks);
  if (part.row_begin == part.row_end && !part.add) fill_zero(part.sums, ranks * pitch * 4);
  for (int64_t begin = part.row_begin; begin < part.row_end; begin += ROW_BLOCK) {
    const int64_t count = part.row_end - begin < ROW_BLOCK ? part.row_end - begin : ROW_BLOCK;
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
      pack_wide<C>(panel + k * SPAN, steps * SPAN, t, rows, masks, n);
    }
    const bool start = begin == part.row_begin && !part.add;
    Fetch fetch{part.ahead};
    const int64_t tiles = (n + SPAN - 1) / SPAN * ((ranks + ROWS - 1) / ROWS);
    const int64_t lines = (fetch.lines() + tiles - 1) / tiles;
    for (int64_t d = 0; d < n; d += SPAN) {
      const uint32_t* block = panel + d * steps;
      for (int64_t r = 0; r < ranks; r += ROWS) {
        fetch.some(lines);
        float* to = part.sums + r * pitch + d;
        const int64_t some = ranks - r;
        if (some == 1) gradient_tile<C, 1>(left + r, ranks, block, steps, to, pitch, start);
        if (some == 2 || (ROWS == 2 && some > 2))
          gradient_tile<C, 2>(left + r, ranks, block, steps, to, pitch, start);
        if constexpr (ROWS > 2) {
          if (some == 3) gradient_tile<C, 3>(left + r, ranks, block, steps, to, pitch, start);
          if (some >= 4) gradient_tile<C, 4>(left + r, ranks, block, steps, to, pitch, start);
        }
      }
    }
  }
}

template <class C>
static void rank_gradient_in(const RankGradient& t) {
  const int64_t pitch = round_up(t.column_end - t.column_begin, SPAN);
  float* sums = scratch<float>(Scratch::sums, t.rank * pitch);
  sum_rows<C>({t, 0, t.rows, sums, pitch, false});
  store_gradient(t, sums, pitch);
}

template <class C>
static void gradient_part_in(const GradientPart& part) {
  sum_rows<C>(part);
}

// Adds the parts in their order.
static void gradient_of_parts(const RankGradient& t, const float* parts, int64_t count,
                              int64_t pitch) {
  const int64_t n = t.column_end - t.column_begin, own_pitch = round_up(n, SPAN);
  float* sums = scratch<float>(Scratch::sums, t.rank * own_pitch);
  for (int64_t r = 0; r < t.rank; r++)
    for (int64_t d = 0; d < n; d += W) {
      const float* from = parts + r * pitch + t.column_begin + d;
      vf sum = load(from);
      for (int64_t i = 1; i < count; i++) sum = add(sum, load(from + i * t.rank * pitch));
      store(sums + r * own_pitch + d, sum);
    }
  store_gradient(t, sums, own_pitch);
}
