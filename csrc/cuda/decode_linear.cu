// decode_linear: y = x W^T + bias + s (x A^T) B^T for few tokens. All that counts is to read W
// once, at the speed of memory, so everything else happens while W is on its way.
//
// M tokens, K in_features, N out_features, R rank. A cluster serves `rows` rows of W for 8 NB
// tokens; each of its blocks takes a part of K (chunks of 32 columns) for all of these rows:
//
//   * x of that part lies in shared memory, in passes where it is long.
//   * shrink: the ranks are 16 rows of A each, for one warp; sums over the warps' parts give the
//     block's part of h = x A^T.
//   * stream: a warp takes 32 rows of W and its share of the chunks, with DEPTH chunks in registers
//     or on their way. Half-way the blocks add their parts of h, each an eighth of it, and round
//     h: nobody has to wait for it then.
//   * finish: tiles of 16 rows and 8 tokens, spread over the warps of the cluster, add the blocks'
//     sums, s (h B^T) and bias; y is rounded once. s h itself could lie outside of fp16's range.
//
// Every sum has an order that depends on K, N, R and the device alone: a token has the same bits in
// any batch.
#include "cuda/decode.cuh"

namespace lora::cuda {
namespace {

constexpr int ROWS_OF_WARP = 32, MAX_ROWS = WARPS * ROWS_OF_WARP;
constexpr int DEPTH = 3;                      // chunks of W that a warp holds
constexpr int PASS_MULTIPLE = DEPTH * WARPS;  // chunks: what up to 8 parts take in one turn
constexpr int LINE = 128;                     // bytes
constexpr int PREFETCHED_LINES = 1024;        // of W into L2, while x is copied and h is made

// Sizes, and where things lie in shared memory (bytes). Sums lie as the lanes hold them, float4
// [16 rows or ranks, live groups of 8 tokens, 32]. At 0 is x [tokens, K], later the sums of W.
struct Layout {
  int rows;           // of W that a cluster serves
  int warps_k;        // parts of the depth: MAX_ROWS / rows
  int pass;           // chunks of x that shared memory holds
  int pitch;          // of a token in x
  int tail_pitch;     // of a token in the rounded h
  int shrunk;         // the warps' sums of 16 ranks each
  int h;              // this block's part of h; then T [tokens, R], all of h
  int mine;           // uint2: this block's share of h
  bool vec_b, vec_y;  // whether four ranks of B, two columns of y may be read or written at once
};

template <class T, int NB, bool VEC>
struct Decode {
  const DecodeLinear& call;
  const Layout& layout;
  char* const shared;
  const Lane at;
  const Share share;  // of K
  const int row;      // of W: the cluster's first
  const int token;    // the block's first
  const int column;   // the block's first
  const int columns;  // of the block
  const int rank_blocks;
  const int live;  // groups of 8 tokens that there are
  int staged;      // first chunk of the block's that is in shared memory, or far off

  __device__ __forceinline__ Decode(const DecodeLinear& call, const Layout& layout)
      : call(call),
        layout(layout),
        shared(shared_memory()),
        share(int(call.in_features)),
        row(cluster_index() * layout.rows),
        token(int(blockIdx.y) * 8 * NB),
        column(share.first * CHUNK),
        columns(min(share.chunks * CHUNK, int(call.in_features) - column)),
        rank_blocks((int(call.rank) + BLOCK_R - 1) / BLOCK_R),
        live(min(NB, (int(call.tokens) - token + 7) / 8)),
        staged(1 << 30) {}

  typedef Rows<T, T, VEC, 2, DEPTH> Weight;

  static constexpr int LINE_ELEMENTS = LINE / int(sizeof(T));

  __device__ __forceinline__ int warps_k() const { return layout.warps_k; }

  // What is read first of W, and all of B, on their way before anybody waits. 256 threads are a
  // multiple of the rows.
  __device__ __forceinline__ void prefetch() const {
    const int thread = int(threadIdx.x), rows = min(layout.rows, int(call.out_features) - row);
    const int r = thread % layout.rows, from = thread / layout.rows * LINE_ELEMENTS;
    const T* const w = static_cast<const T*>(call.weight) + (row + r) * call.weight_stride + column;
#pragma unroll
    for (int i = 0; i < PREFETCHED_LINES / THREADS; ++i) {
      const int line = from + i * (warps_k() * LINE_ELEMENTS);
      if (r < rows && line < columns) prefetch_to_l2(w + line);
    }
    const int64_t size = call.factor_dtype == DType::f32 ? 4 : 2, row_bytes = call.rank * size;
    const int own = share_of(layout.rows), first = int(cluster_rank()) * own;
    if (thread >= own || first + thread >= rows) return;
    const char* const b =
        static_cast<const char*>(call.lora_b) + (row + first + thread) * call.b_stride * size;
#pragma unroll 1
    for (int64_t byte = 0; byte < row_bytes; byte += LINE) prefetch_to_l2(b + byte);
  }

  // Copies the pass of x that begins with this chunk, unless it is there; zeros beyond M and K.
  // With AT_ONCE 16-byte loads of a thread under way.
  template <int AT_ONCE>
  __device__ __forceinline__ void stage(int chunk) {
    if (chunk >= staged && chunk < staged + layout.pass) return;
    staged = chunk;
    __syncthreads();  // the pass before has been read
    const int first = column + chunk * CHUNK, left = columns - chunk * CHUNK;
    const int eighths = min(layout.pass, share.chunks - chunk) * (CHUNK / 8);
    constexpr int TOKENS = AT_ONCE < NB ? AT_ONCE : NB, TURNS = AT_ONCE / TOKENS;
#pragma unroll 1
    for (int i = at.lane; i < eighths; i += 32 * TURNS) {
#pragma unroll 1
      for (int n = 0; n < NB; n += TOKENS) {
        const T* const x = static_cast<const T*>(call.x) + first + 8 * i;
        char* const to = shared + (8 * n + at.warp) * layout.pitch + 16 * i;
        uint4 held[TURNS][TOKENS];
#pragma unroll
        for (int j = 0; j < TURNS; ++j) {
#pragma unroll
          for (int k = 0; k < TOKENS; ++k) {
            const int m = token + 8 * (n + k) + at.warp;
            const int room = m < call.tokens ? left - 8 * (i + 32 * j) : 0;
            held[j][k] = words<T>(load_eight<VEC>(x + m * call.x_stride + 256 * j, room));
          }
        }
#pragma unroll
        for (int j = 0; j < TURNS; ++j) {
#pragma unroll
          for (int k = 0; k < TOKENS; ++k) {
            if (i + 32 * j >= eighths) continue;
            *reinterpret_cast<uint4*>(to + 8 * k * layout.pitch + 512 * j) = held[j][k];
          }
        }
      }
    }
    __syncthreads();
  }

  // This lane's columns of a chunk, of token g of eight.
  __device__ __forceinline__ uint4 x_of(int chunk, int n) const {
    return *reinterpret_cast<const uint4*>(shared + (8 * n + at.g) * layout.pitch +
                                           (chunk - staged) * (2 * CHUNK) + 16 * at.t);
  }

  // Adds the products with this warp's chunks first, first + step, ... of one turn of the ring, and
  // asks for those of the next.
  template <class F, int MB, int HELD>
  __device__ __forceinline__ void turn(float (&sums)[MB * NB][4], Rows<T, F, VEC, MB, HELD>& rows,
                                       int first, int step, int end) {
#pragma unroll
    for (int slot = 0; slot < HELD; ++slot) {
      const int chunk = first + slot * step;
      if (chunk < end) {
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          const uint4 x = x_of(chunk, n);
#pragma unroll
          for (int m = 0; m < MB; ++m) rows.multiply_with(sums[m * NB + n], slot, m, x);
        }
      }
      if (chunk + HELD * step < end) rows.load(slot, chunk + HELD * step);
    }
  }
  template <class F, int MB, int HELD>
  __device__ __forceinline__ void fill(Rows<T, F, VEC, MB, HELD>& rows, int first, int step,
                                       int end) {
#pragma unroll
    for (int slot = 0; slot < HELD; ++slot) {
      if (first + slot * step < end) rows.load(slot, first + slot * step);
    }
  }

  // This block's part of h.
  template <class F>
  __device__ __forceinline__ void shrink() {
    constexpr int HELD = DEPTH;
    float4* const parts = reinterpret_cast<float4*>(shared + layout.shrunk);
    float4* const h = reinterpret_cast<float4*>(shared + layout.h);
    for (int round = 0; round < rank_blocks; round += WARPS) {
      const int blocks = min(WARPS, rank_blocks - round);
      const Split split(blocks, at.warp);
      const int end = split.has_part() ? share.chunks : 0;
      Rows<T, F, VEC, 1, HELD> a(call.lora_a, call.a_stride, (round + split.block) * BLOCK_R,
                                 int(call.rank), at, column, columns);
      fill(a, split.part, split.parts, end);
      float sums[NB][4];
      clear(sums);
      for (int chunk = 0; chunk < share.chunks; chunk += HELD * split.parts) {
        stage<8>(chunk);
        turn<F, 1, HELD>(sums, a, chunk + split.part, split.parts, end);
      }
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        if (n < live) parts[(at.warp * live + n) * 32 + at.lane] = as_float4(sums[n]);
      }
      __syncthreads();
      const int count = blocks * live * 32;
      for (int i = int(threadIdx.x); i < count; i += THREADS) {
        float4 sum = parts[i];
        for (int part = 1; part < split.parts; ++part) sum = sum + parts[i + part * count];
        h[round * live * 32 + i] = sum;
      }
      __syncthreads();
    }
  }

  // This block's eighth of h over all of K: saved, rounded.
  __device__ __forceinline__ void exchange() {
    const float4* const h = reinterpret_cast<const float4*>(shared + layout.h);
    uint2* const mine = reinterpret_cast<uint2*>(shared + layout.mine);
    const int each = share_of(rank_blocks * live * 32);
    const int first = int(cluster_rank()) * each;
    const bool saves = call.h && cluster_index() == 0;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < each; i += THREADS) {
      const float4 sum = sum_over_blocks(h + first + i);
      const int lane = (first + i) % 32, group = (first + i) / 32;
      const int r = group / live * BLOCK_R + lane / 4 * 2;
      const int m = token + group % live * 8 + lane % 4 * 2;
      // [rank r, r + 1][token m, m + 1]; what lies beyond R must not meet the zeros of B.
      const bool even = r < call.rank, odd = r + 1 < call.rank;
      const float v[2][2] = {{even ? sum.x : 0.0f, even ? sum.y : 0.0f},
                             {odd ? sum.z : 0.0f, odd ? sum.w : 0.0f}};
      if (saves) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (m + j >= call.tokens) continue;
          float* const to = call.h + (m + j) * call.rank + r;
          if (even) to[0] = v[0][j];
          if (odd) to[1] = v[1][j];
        }
      }
      mine[i] = {pack<T>(v[0][0], v[1][0]), pack<T>(v[0][1], v[1][1])};
    }
  }

  // All of h, as [token, rank].
  __device__ __forceinline__ void gather() const {
    const uint2* const mine = reinterpret_cast<const uint2*>(shared + layout.mine);
    char* const tail = shared + layout.h;
    const int count = rank_blocks * live * 32, each = share_of(count);
    for (int i = int(threadIdx.x); i < count; i += THREADS) {
      const uint2 v = *of_block(mine + i % each, uint32_t(i / each));
      const int lane = i % 32, group = i / 32;
      const int r = group / live * BLOCK_R + lane / 4 * 2, m = group % live * 8 + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(tail + m * layout.tail_pitch + 2 * r) = v.x;
      *reinterpret_cast<uint32_t*>(tail + (m + 1) * layout.tail_pitch + 2 * r) = v.y;
    }
  }

  // The warps' sums, where x was, and then those of the block.
  __device__ __forceinline__ void add_parts(const float (&sums)[2 * NB][4]) const {
    float4* const parts = reinterpret_cast<float4*>(shared);
    const int warps_n = layout.rows / ROWS_OF_WARP, count = layout.rows / 16 * live * 32;
    const int part = at.warp / warps_n, block = at.warp % warps_n * 2;
    __syncthreads();  // x has been read
#pragma unroll
    for (int i = 0; i < 2 * NB; ++i) {
      const int n = i % NB;
      if (n >= live) continue;
      parts[part * count + ((block + i / NB) * live + n) * 32 + at.lane] = as_float4(sums[i]);
    }
    if (warps_k() == 1) return;
    __syncthreads();
    for (int i = int(threadIdx.x); i < count; i += THREADS) {
      float4 sum = parts[i];
      for (int other = 1; other < warps_k(); ++other) sum = sum + parts[i + other * count];
      parts[i] = sum;
    }
  }

  struct Pair {
    uint2 even, odd;
  };
  template <class F>
  __device__ __forceinline__ Pair ranks_of(int n, int step) const {
    const F* const b = static_cast<const F*>(call.lora_b) + n * call.b_stride + step + 4 * at.t;
    const int room = int(call.rank) - step - 4 * at.t;
    return {load_four<T>(b, n < call.out_features ? room : 0, layout.vec_b),
            load_four<T>(b + call.b_stride, n + 1 < call.out_features ? room : 0, layout.vec_b)};
  }
  // Four ranks of rows n and n + 1 of B.
  __device__ __forceinline__ Pair of_b(int n, int step) const {
    if (call.factor_dtype == DType::f32) return ranks_of<float>(n, step);
    return ranks_of<T>(n, step);
  }

  __device__ __forceinline__ void write(int n, int m, float even, float odd) const {
    if (m >= call.tokens || n >= call.out_features) return;
    T* const to = static_cast<T*>(call.y) + m * call.y_stride + n;
    if (layout.vec_y && n + 1 < call.out_features) {
      *reinterpret_cast<uint32_t*>(to) = pack<T>(even, odd);
      return;
    }
    to[0] = from_float<T>(even);
    if (n + 1 < call.out_features) to[1] = from_float<T>(odd);
  }

  __device__ __forceinline__ void finish() const {
    const float4* const parts = reinterpret_cast<const float4*>(shared);
    const T* const bias = static_cast<const T*>(call.bias);
    const int blocks = int(cluster_size()), tiles = layout.rows / 16 * live;
    const int first = at.warp * blocks + int(cluster_rank());  // over the blocks first
    Pair b = of_b(row + first / live * 16 + 2 * at.g, 0);
    const float scaling = call.scaling_at ? *call.scaling_at : call.scaling;
    __syncthreads();  // h is there
    cluster_wait();   // and so are all sums
    for (int tile = first; tile < tiles; tile += WARPS * blocks) {
      const int n = row + tile / live * 16 + 2 * at.g, m = tile % live * 8;
      const bool even = n < call.out_features, odd = n + 1 < call.out_features;
      const float bias_even = bias && even ? to_float(bias[n]) : 0.0f;
      const float bias_odd = bias && odd ? to_float(bias[n + 1]) : 0.0f;
      const float4 total = sum_over_blocks(parts + tile * 32 + at.lane);
      float sum[4] = {};
      const char* const tail = shared + layout.h + (m + at.g) * layout.tail_pitch + 8 * at.t;
      for (int step = 0; step < rank_blocks * BLOCK_R; step += STEP) {
        const Pair here = b;
        const bool last = step + STEP >= rank_blocks * BLOCK_R;
        b = of_b(last ? row + (tile + WARPS * blocks) / live * 16 + 2 * at.g : n,
                 last ? 0 : step + STEP);
        multiply<T>(sum, here.even, here.odd, *reinterpret_cast<const uint2*>(tail + 2 * step));
      }
      write(n, token + m + 2 * at.t, total.x + scaling * sum[0] + bias_even,
            total.z + scaling * sum[2] + bias_odd);
      write(n, token + m + 2 * at.t + 1, total.y + scaling * sum[1] + bias_even,
            total.w + scaling * sum[3] + bias_odd);
    }
  }

  __device__ __forceinline__ void run() {
    prefetch();
    const int warps_n = layout.rows / ROWS_OF_WARP, step = warps_k();
    const int part = at.warp / warps_n;
    if (call.factor_dtype == DType::f32) {
      shrink<float>();
    } else {
      shrink<T>();
    }
    cluster_arrive();  // our part of h is there

    Weight weight(call.weight, call.weight_stride, row + at.warp % warps_n * ROWS_OF_WARP,
                  int(call.out_features), at, column, columns);
    fill(weight, part, step, share.chunks);

    float sums[2 * NB][4];
    clear(sums);
    const int turns = (share.chunks + DEPTH * step - 1) / (DEPTH * step);
    for (int q = 0;; ++q) {
      if (q == turns / 2) {
        cluster_wait();
        exchange();
        cluster_arrive();  // our eighth of all of h is there, and the parts have been read
      }
      if (q == turns) break;
      stage<4>(q * DEPTH * step);
      turn<T, 2, DEPTH>(sums, weight, q * DEPTH * step + part, step, share.chunks);
    }
    add_parts(sums);
    cluster_wait();
    cluster_arrive();  // our sums are there
    gather();
    finish();
    // No block may end while others read its memory.
    cluster_arrive();
    cluster_wait();
  }
};

template <class T, int NB, bool VEC>
__global__ void __launch_bounds__(THREADS, NB == 8 || !VEC ? 1 : 2)
    decode_linear_kernel(const __grid_constant__ DecodeLinear call,
                         const __grid_constant__ Layout layout) {
  Decode<T, NB, VEC>(call, layout).run();
}

// --- host ------------------------------------------------------------------------------------

// The rows of W per cluster with which the busiest multiprocessors are done first. What a block
// does besides streaming costs about as much as 24 rows.
int rows_per_cluster(int64_t out_features, int64_t clusters_at_once) {
  int best = 0;
  int64_t best_cost = 0;
  for (int rows = MAX_ROWS; rows >= ROWS_OF_WARP; rows /= 2) {
    const int64_t clusters = ceil_div(out_features, rows);
    const int64_t cost = ceil_div(clusters, clusters_at_once) * (rows + 24);
    if (best == 0 || cost < best_cost) best = rows, best_cost = cost;
  }
  return best;
}

// Fills in the layout for blocks of 8 `groups` tokens; returns the bytes of shared memory.
int64_t arrange(Layout& layout, int groups, const DecodeLinear& call, int cluster) {
  const int64_t rank_blocks = ceil_div(call.rank, BLOCK_R),
                chunks = ceil_div(call.in_features, CHUNK);
  const int64_t sums = groups * 32 * int64_t(sizeof(float4));  // of 16 rows
  layout.pass = PASS_MULTIPLE * (groups == 1 ? 4 : 1);
  layout.pitch =
      int(pitch_of_16(2 * CHUNK * std::min(layout.pass, int(ceil_div(chunks, cluster)))));
  layout.tail_pitch = int(pitch_of_8(2 * BLOCK_R * rank_blocks));
  int64_t end = std::max<int64_t>(8 * groups * layout.pitch, MAX_ROWS / 16 * sums);
  layout.shrunk = int(end);
  end += WARPS * sums;
  layout.h = int(end);
  end += std::max<int64_t>(rank_blocks * sums, 8 * groups * layout.tail_pitch);
  layout.mine = int(end);
  return end + rank_blocks * sums / 2 / cluster;
}

template <class T, int NB, bool VEC>
bool run(const DecodeLinear& call, Layout layout, int capability, const Place& place) {
  const int cluster = capability >= 90 ? CLUSTER : 1;
  const int64_t bytes = arrange(layout, NB, call, cluster);
  if (bytes > shared_limit(capability)) return false;
  const auto what = [&] {
    return described("decode_linear", "tokens", call.tokens, "in_features", call.in_features,
                     "out_features", call.out_features, "rank", call.rank, "rows", layout.rows);
  };
  const int64_t at_once = std::max(multiprocessors(place, what) / cluster, 1);
  layout.rows = rows_per_cluster(call.out_features, at_once);
  layout.warps_k = MAX_ROWS / layout.rows;
  const int64_t clusters = ceil_div(call.out_features, layout.rows);
  launch(what, decode_linear_kernel<T, NB, VEC>,
         Grid{clusters * cluster, THREADS, bytes, cluster, ceil_div(call.tokens, 8 * NB)}, place,
         call, layout);
  return true;
}

template <class T>
void run(const DecodeLinear& call, const Place& place) {
  const auto what = [&] { return described("decode_linear", "rank", call.rank); };
  use(place, what);
  const int capability = compute_capability(place, what);
  const int64_t factor_size = size_of(call.factor_dtype);
  const auto eights = [](const void* address, int64_t rows, int64_t stride, int64_t size) {
    return is_aligned(address, 16) && (rows == 1 || stride * size % 16 == 0);
  };
  const bool vec = call.in_features % 8 == 0 && eights(call.x, call.tokens, call.x_stride, 2) &&
                   eights(call.weight, call.out_features, call.weight_stride, 2) &&
                   eights(call.lora_a, call.rank, call.a_stride, factor_size);
  Layout layout = {};
  layout.vec_b =
      call.rank % 4 == 0 && call.b_stride % 4 == 0 && is_aligned(call.lora_b, 4 * factor_size);
  layout.vec_y = call.y_stride % 2 == 0 && is_aligned(call.y, 4);
  // As many tokens at once as there are, or as h leaves room for.
  bool runs = false;
  if (!vec) {
    runs = run<T, 2, false>(call, layout, capability, place);
  } else {
    if (call.tokens > 32) runs = run<T, 8, true>(call, layout, capability, place);
    if (!runs && call.tokens > 8) runs = run<T, 4, true>(call, layout, capability, place);
    if (!runs) runs = run<T, 1, true>(call, layout, capability, place);
  }
  if (!runs) throw std::runtime_error(what() + ": shared memory has no room for so many ranks");
}

}  // namespace

void decode_linear(const DecodeLinear& call, Place place) {
  if (call.tokens == 0 || call.out_features == 0) return;
  if (call.dtype == DType::bf16) return run<bf16>(call, place);
  return run<fp16>(call, place);
}

}  // namespace lora::cuda
