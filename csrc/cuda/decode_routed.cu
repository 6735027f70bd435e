// decode_routed: y (+)= w s (x A^T) B^T for every pair of a token and an adapter, few of each
// adapter, shrink and expand of all slices in one launch. What an adapter weighs is read once.
//
// M tokens, P pairs, L slots, S slices, K in_features, N_s out_features of slice s, R_s an
// adapter's rank there, R their sum, H the widest R of the bank. A cluster serves PAIRS pairs of
// one slot; what the slot does not have costs an early exit.
//
//   * shrink: a block takes a part of K (chunks of 32 columns). A warp takes 32 ranks (16 in fp32),
//     of A as rows, and a part of the block's chunks, of x as they lie in memory; sums over the
//     warps are the block's part of h = x A^T.
//   * Meanwhile B comes into L2, and what a warp expands first, of B and of y, into registers.
//   * Every block adds the parts of h that it expands, and rounds them.
//   * expand: a block takes a part of the columns of all slices, a warp every eighth unit of 16.
//     Here the pairs are the rows of mma's `a`, rows of B its columns, and a lane holds four
//     neighbouring columns of y.
//
// A token is multiplied with its own adapter only: NaN in another cannot reach it. Every sum has an
// order that depends on the adapter alone: a token's bits are the same in any batch.
#include "cuda/decode.cuh"

namespace lora::cuda {
namespace {

constexpr int PAIRS = 16, UNIT = 16;
constexpr int ITEMS = 4;   // that a warp holds of the expand: a unit's step of ranks each
constexpr int LINE = 128;  // bytes

struct Slice {
  int64_t offset;          // of B in the storage
  int rank, pitch;         // pitch: the rank that B was stored with, should H be less than that
  int column, place;       // of its first rank, in h and in the tail
  int unit, begin, width;  // its first unit and column, and how many columns
  bool vec_b, vec_y;       // whether four ranks of B, four columns of y may be read at once
};

// Sizes, and where things lie in shared memory (bytes). Sums lie as the lanes hold them: float4
// [2 groups of 8 pairs, 32] for every 16 ranks. At 0 are those of the warps.
struct Layout {
  int slice_columns[MAX_SLICES + 1];
  int units;       // of all slices
  int groups;      // clusters per tile
  int h;           // this block's part of h
  int tail;        // T [PAIRS, ...]: h, the ranks of each slice from a multiple of 16 on
  int tail_pitch;  // of a pair there
  int scale;       // float [PAIRS]: w s
  int slices;      // Slice [S]
  bool vec_y;      // whether rows of y begin at multiples of four columns
};
constexpr int SUMS = 2 * 32;  // float4 for 16 ranks

// A unit's step of ranks, one after the other.
struct Walk {
  int unit, step, slice;
};

template <class T, class F, bool VEC>
struct Decode {
  const DecodeRouted& call;
  const Layout& layout;
  char* const shared;
  const Slice* const slices;
  const Lane at;
  const int slot, first, pairs;  // the cluster's first pair, and how many it has
  const int rank;
  int token[2];                // of pairs g and g + 8; M if there is none
  int units_first, units_end;  // of this block

  __device__ __forceinline__ Decode(const DecodeRouted& call, const Layout& layout, int slot,
                                    int first, int pairs, int rank)
      : call(call),
        layout(layout),
        shared(shared_memory()),
        slices(reinterpret_cast<const Slice*>(shared + layout.slices)),
        slot(slot),
        first(first),
        pairs(pairs),
        rank(rank) {
    const int each = share_of(layout.units);
    units_first = min(int(cluster_rank()) * each, layout.units);
    units_end = min(units_first + each, layout.units);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int pair = 8 * n + at.g;
      token[n] = pair < pairs ? call.pair_tokens[first + pair] : int(call.tokens);
    }
  }

  __device__ __forceinline__ const F* storage() const {
    return static_cast<const F*>(call.storage);
  }
  __device__ __forceinline__ const int64_t* entry(int factor) const {
    return call.table + (slot * (1 + call.slices) + factor) * 3;
  }

  // What all threads look up, and a tail of zeros.
  __device__ __forceinline__ void prepare() const {
    Slice* const all = reinterpret_cast<Slice*>(shared + layout.slices);
    float* const scale = reinterpret_cast<float*>(shared + layout.scale);
    uint4* const tail = reinterpret_cast<uint4*>(shared + layout.tail);
    const int thread = int(threadIdx.x);
#pragma unroll 1
    for (int i = thread; i < PAIRS * layout.tail_pitch / 16; i += THREADS) tail[i] = {0, 0, 0, 0};
    if (thread < pairs) {
      const float scaling = float(call.scaling[slot]);
      scale[thread] = call.pair_weights ? scaling * call.pair_weights[first + thread] : scaling;
    }
    if (thread < call.slices) {
      Slice slice = {};
#pragma unroll 1
      for (int s = 0; s <= thread; ++s) {
        if (s > 0) {
          slice.unit += (slice.width + UNIT - 1) / UNIT;
          slice.place += (slice.rank + STEP - 1) / STEP * STEP;
        }
        const int64_t* const b = entry(1 + s);
        slice.pitch = int(b[0]);
        slice.column = int(b[1]);
        // h has no room for more, should a wider adapter have come after a graph was captured.
        slice.rank = max(min(slice.pitch, int(call.width) - slice.column), 0);
        slice.offset = b[2];
        slice.begin = layout.slice_columns[s];
        slice.width = layout.slice_columns[s + 1] - slice.begin;
      }
      slice.vec_b = slice.pitch % 4 == 0 && slice.rank % 4 == 0 &&
                    reinterpret_cast<uintptr_t>(storage() + slice.offset) % (4 * sizeof(F)) == 0;
      slice.vec_y = layout.vec_y && slice.begin % 4 == 0;
      all[thread] = slice;
    }
  }

  // This block's part of B on its way to L2.
  __device__ __forceinline__ void prefetch() const {
#pragma unroll 1
    for (int s = 0; s < call.slices; ++s) {
      const Slice& slice = slices[s];
      const int from = max(units_first - slice.unit, 0) * UNIT;
      const int to = min((units_end - slice.unit) * UNIT, slice.width);
      const char* const b = reinterpret_cast<const char*>(storage() + slice.offset);
      const int64_t pitch = slice.pitch * int64_t(sizeof(F));
#pragma unroll 1
      for (int64_t byte = from * pitch + threadIdx.x * LINE; byte < to * pitch;
           byte += THREADS * LINE) {
        prefetch_to_l2(b + byte);
      }
    }
  }

  // --- shrink --------------------------------------------------------------------------------

  // This block's part of h. `meanwhile` is called while the first loads are under way.
  template <class Meanwhile>
  __device__ __forceinline__ void shrink(const Meanwhile& meanwhile) const {
    // What a warp holds: chunks, and blocks of ranks, as many as there are registers for.
    constexpr int DEPTH = 3, MB = sizeof(F) == 4 ? 1 : 2;
    float4* const parts = reinterpret_cast<float4*>(shared);
    float4* const h = reinterpret_cast<float4*>(shared + layout.h);
    const Share share(int(call.in_features));
    const int column = share.first * CHUNK;
    const int columns = min(share.chunks * CHUNK, int(call.in_features) - column);
    const T* const x = static_cast<const T*>(call.x) + column + 8 * at.t;
    const int sets = (rank + MB * BLOCK_R - 1) / (MB * BLOCK_R);
    for (int round = 0; round < sets; round += WARPS) {
      const int blocks = min(WARPS, sets - round);
      const Split split(blocks, at.warp);
      const int end = split.has_part() ? share.chunks : 0;
      const int rank_first = (round + split.block) * (MB * BLOCK_R);
      const int wide = rank - rank_first > BLOCK_R ? MB : 1;  // blocks of ranks that there are
      const int live = pairs > 8 ? 2 : 1;
      Rows<T, F, VEC, MB, DEPTH> a(storage() + entry(0)[2], call.in_features, rank_first, rank, at,
                                   column, columns);
      uint4 held[DEPTH][2];
      const auto load = [&](int slot, int chunk) {
        if (chunk >= end) return;
        a.load(slot, chunk, wide);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n >= live) continue;
          const int room = token[n] < call.tokens ? columns - 8 * at.t - chunk * CHUNK : 0;
          held[slot][n] =
              words<T>(load_eight<VEC>(x + token[n] * call.x_stride + chunk * CHUNK, room));
        }
      };
#pragma unroll
      for (int slot = 0; slot < DEPTH; ++slot) load(slot, split.part + slot * split.parts);
      if (round == 0) meanwhile();
      float sums[2 * MB][4];
      clear(sums);
      for (int turn = split.part; turn < end; turn += DEPTH * split.parts) {
#pragma unroll
        for (int slot = 0; slot < DEPTH; ++slot) {
          const int chunk = turn + slot * split.parts;
          if (chunk < end) {
#pragma unroll
            for (int i = 0; i < 2 * MB; ++i) {
              if (i / 2 < wide && i % 2 < live) {
                a.multiply_with(sums[i], slot, i / 2, held[slot][i % 2]);
              }
            }
          }
          load(slot, chunk + DEPTH * split.parts);
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * MB; ++i) {
        parts[at.warp * (MB * SUMS) + 32 * i + at.lane] = as_float4(sums[i]);
      }
      __syncthreads();
      const int count = blocks * (MB * SUMS);
      for (int i = int(threadIdx.x); i < count; i += THREADS) {
        float4 sum = parts[i];
        for (int part = 1; part < split.parts; ++part) sum = sum + parts[i + part * count];
        h[round * (MB * SUMS) + i] = sum;
      }
      __syncthreads();
    }
  }

  // --- h ---------------------------------------------------------------------------------------

  // The columns of h that this block writes, if it is asked for.
  __device__ __forceinline__ int h_first(int block) const {
    return min(block * share_of(int(call.width)), int(call.width));
  }
  __device__ __forceinline__ int slice_of(int r) const {
    int s = 0;
    while (s + 1 < call.slices && r >= slices[s + 1].column) ++s;
    return s;
  }

  // Adds up h over all of K: writes this block's columns of it and rounds what this block expands.
  // w s comes after the product: w s h need not fit fp16.
  __device__ __forceinline__ void gather() const {
    const float4* const h = reinterpret_cast<const float4*>(shared + layout.h);
    char* const tail = shared + layout.tail;
    const int own_first = h_first(int(cluster_rank())), own_end = h_first(int(cluster_rank()) + 1);
    int from = rank, to = 0;  // ranks
#pragma unroll 1
    for (int s = 0; s < call.slices; ++s) {
      const Slice& slice = slices[s];
      const int end = slice.unit + (slice.width + UNIT - 1) / UNIT;
      if (slice.unit >= units_end || end <= units_first || slice.rank == 0) continue;
      from = min(from, slice.column);
      to = max(to, slice.column + slice.rank);
    }
    if (call.h && own_first < min(own_end, rank)) {
      from = min(from, own_first);
      to = max(to, min(own_end, rank));
    }
    const int live = pairs > 8 ? 2 : 1, begin = from / BLOCK_R;
    const int count = to > from ? ((to + BLOCK_R - 1) / BLOCK_R - begin) * live * 32 : 0;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count; i += THREADS) {
      const int lane = i % 32, block = begin + i / 32 / live, n = i / 32 % live;
      const float4 sum = sum_over_blocks(h + (block * 2 + n) * 32 + lane);
      const float v[2][2] = {{sum.x, sum.y}, {sum.z, sum.w}};  // [rank r, r + 1][pair p, p + 1]
      const int r = block * BLOCK_R + lane / 4 * 2, p = 8 * n + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (r + j >= rank) continue;
        const Slice& slice = slices[slice_of(r + j)];
        const int place = slice.place + r + j - slice.column;
        const bool expands = r + j < slice.column + slice.rank;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (p + k >= pairs) continue;
          if (expands) {
            T* const row = reinterpret_cast<T*>(tail + (p + k) * layout.tail_pitch);
            row[place] = from_float<T>(v[j][k]);
          }
          if (call.h && r + j >= own_first && r + j < own_end) {
            call.h[(first + p + k) * call.width + r + j] = v[j][k];
          }
        }
      }
    }
  }

  // Zeros in this block's columns of h beyond the adapter's rank.
  __device__ __forceinline__ void fill_h() const {
    const int from = max(h_first(int(cluster_rank())), rank);
    const int wide = h_first(int(cluster_rank()) + 1) - from;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < wide * pairs; i += THREADS) {
      call.h[(first + i / wide) * call.width + from + i % wide] = 0.0f;
    }
  }

  // --- expand ----------------------------------------------------------------------------------

  // What a lane holds of a unit's step: four ranks of two rows of B, and with the last step four
  // columns of y of pairs g and g + 8.
  struct Item {
    uint2 b[2], y[2];
  };

  __device__ __forceinline__ void settle(Walk& walk) const {
    while (walk.slice + 1 < call.slices && walk.unit >= slices[walk.slice + 1].unit) ++walk.slice;
  }
  __device__ __forceinline__ Walk begin() const {
    Walk walk = {units_first + at.warp, 0, 0};
    settle(walk);
    return walk;
  }
  __device__ __forceinline__ void advance(Walk& walk) const {
    walk.step += STEP;
    if (walk.step < slices[walk.slice].rank) return;
    walk.step = 0;
    walk.unit += WARPS;
    settle(walk);
  }
  __device__ __forceinline__ bool is_last(const Walk& walk) const {
    return walk.step + STEP >= slices[walk.slice].rank;
  }

  // This lane's first column of the unit in its slice, and the row of y at that column.
  __device__ __forceinline__ int column_of(const Walk& walk) const {
    return (walk.unit - slices[walk.slice].unit) * UNIT + 4 * at.t;
  }
  __device__ __forceinline__ T* row_of_y(const Slice& slice, int column, int n) const {
    return static_cast<T*>(call.y) + token[n] * call.y_stride + slice.begin + column;
  }

  __device__ __forceinline__ void load(Item& item, const Walk& walk) const {
    if (walk.unit >= units_end) return;
    const Slice& slice = slices[walk.slice];
    const int ranks = slice.rank - walk.step - 4 * at.t;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      // Column g of product j: so columns 2t, 2t + 1 of both products are four neighbours.
      const int n = (walk.unit - slice.unit) * UNIT + at.g / 2 * 4 + 2 * j + at.g % 2;
      const F* const b = storage() + slice.offset + int64_t(n) * slice.pitch + walk.step + 4 * at.t;
      item.b[j] = load_four<T>(b, n < slice.width ? ranks : 0, slice.vec_b);
    }
    if (call.overwrite || !is_last(walk)) return;
    const int column = column_of(walk), room = slice.width - column;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (token[n] >= call.tokens || room <= 0) continue;
      const T* const y = row_of_y(slice, column, n);
      if (slice.vec_y && room >= 4) {
        item.y[n] = *reinterpret_cast<const uint2*>(y);
      } else {
        item.y[n] = {two(y, room), two(y + 2, room - 2)};
      }
    }
  }

  __device__ __forceinline__ void store(const Item& item, const Walk& walk,
                                        const float (&sums)[2][4]) const {
    const Slice& slice = slices[walk.slice];
    const int column = column_of(walk), room = slice.width - column;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (token[n] >= call.tokens || room <= 0) continue;
      float v[4] = {sums[0][2 * n], sums[0][2 * n + 1], sums[1][2 * n], sums[1][2 * n + 1]};
      if (slice.rank > 0) {  // or it would be 0 times a scaling that may be infinite
        const float scale = reinterpret_cast<const float*>(shared + layout.scale)[at.g + 8 * n];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] *= scale;
      }
      if (!call.overwrite) {
        T before[4];
        memcpy(before, &item.y[n], sizeof(before));
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] += to_float(before[i]);
      }
      T* const y = row_of_y(slice, column, n);
      if (slice.vec_y && room >= 4) {
        *reinterpret_cast<uint2*>(y) = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < room) y[i] = from_float<T>(v[i]);
        }
      }
    }
  }

  // Adds an item's product; with a unit's last one writes y.
  __device__ __forceinline__ void take(const Item& item, const Walk& walk,
                                       float (&sums)[2][4]) const {
    const Slice& slice = slices[walk.slice];
    if (slice.rank > 0) {
      const char* const tail = shared + layout.tail + at.g * layout.tail_pitch +
                               2 * (slice.place + walk.step + 4 * at.t);
      const uint2 low = *reinterpret_cast<const uint2*>(tail);
      const uint2 high = *reinterpret_cast<const uint2*>(tail + 8 * layout.tail_pitch);
      multiply<T>(sums[0], low, high, item.b[0]);
      multiply<T>(sums[1], low, high, item.b[1]);
    }
    if (!is_last(walk)) return;
    if (slice.rank > 0 || call.overwrite) store(item, walk, sums);
    clear(sums);
  }

  __device__ __forceinline__ void run() const {
    Item items[ITEMS];
    if (rank > 0) {
      shrink([&] {
        prepare();
        __syncthreads();
        prefetch();
      });
      cluster_arrive();  // our part of h is there
    } else {
      prepare();
      __syncthreads();
    }
    Walk ahead = begin();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      load(items[i], ahead);
      advance(ahead);
    }
    if (call.h) fill_h();
    if (rank > 0) {
      cluster_wait();
      gather();
      cluster_arrive();  // we have read what others hold
      __syncthreads();
    }
    float sums[2][4];
    clear(sums);
    for (Walk walk = begin(); walk.unit < units_end;) {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        if (walk.unit >= units_end) continue;
        take(items[i], walk, sums);
        advance(walk);
        load(items[i], ahead);
        advance(ahead);
      }
    }
    if (rank > 0) cluster_wait();  // nobody reads our part of h any more
  }
};

template <class T, class F, bool VEC>
__global__ void __launch_bounds__(THREADS, VEC ? 2 : 1)
    decode_routed_kernel(const __grid_constant__ DecodeRouted call,
                         const __grid_constant__ Layout layout) {
  const int tile = cluster_index() / layout.groups, group = cluster_index() % layout.groups;
  const int slot = call.tiles[2 * tile], begin = call.tiles[2 * tile + 1];
  if (slot < 0) return;
  const int first = begin + group * PAIRS;
  const int end = call.offsets[slot + 1];
  const int rank = int(min(call.table[slot * (1 + call.slices) * 3], call.width));
  // The same for all blocks of the cluster: nobody waits for one that is gone.
  if (first >= end || (rank == 0 && !call.overwrite && !call.h)) return;
  Decode<T, F, VEC>(call, layout, slot, first, min(end - first, PAIRS), rank).run();
}

// --- host ------------------------------------------------------------------------------------

// Bytes of shared memory.
int64_t arrange(Layout& layout, const DecodeRouted& call) {
  const int64_t sums = SUMS * int64_t(sizeof(float4));
  layout.units = 0;
  for (int64_t s = 0; s < call.slices; ++s) {
    layout.slice_columns[s] = int(call.slice_columns[s]);
    layout.slice_columns[s + 1] = int(call.slice_columns[s + 1]);
    layout.units += int(ceil_div(call.slice_columns[s + 1] - call.slice_columns[s], UNIT));
  }
  layout.groups = int(call.block / PAIRS);  // 16 or 64 pairs
  int64_t end = WARPS * 2 * sums;
  layout.h = int(end);
  end += ceil_div(call.width, 2 * BLOCK_R) * 2 * sums;
  layout.tail = int(end);
  // Each slice begins at a multiple of a step.
  layout.tail_pitch = int(pitch_of_8(2 * (call.width + (STEP - 1) * call.slices)));
  end += PAIRS * layout.tail_pitch;
  layout.scale = int(end);
  end += PAIRS * int64_t(sizeof(float));
  layout.slices = int(end);
  return end + call.slices * int64_t(sizeof(Slice));
}

template <class T, class F>
void run(const DecodeRouted& call, const Place& place) {
  const auto what = [&] {
    return described("decode_routed", "tokens", call.tokens, "in_features", call.in_features,
                     "tiles", call.num_tiles, "widest rank", call.width);
  };
  use(place, what);
  const int capability = compute_capability(place, what);
  Layout layout = {};
  const int64_t bytes = arrange(layout, call);
  if (bytes > shared_limit(capability)) {
    throw std::runtime_error(what() + ": shared memory has no room for so many ranks");
  }
  layout.vec_y = call.y_stride % 4 == 0 && is_aligned(call.y, 8);
  // Factors begin at multiples of 64 elements of the storage.
  const bool vec = call.in_features % 8 == 0 && call.x_stride % 8 == 0 && is_aligned(call.x, 16) &&
                   is_aligned(call.storage, 16);
  const int cluster = capability >= 90 ? CLUSTER : 1;
  const auto kernel = vec ? decode_routed_kernel<T, F, true> : decode_routed_kernel<T, F, false>;
  launch(what, kernel, Grid{call.num_tiles * layout.groups * cluster, THREADS, bytes, cluster},
         place, call, layout);
}

template <class T>
void run(const DecodeRouted& call, const Place& place) {
  if (call.factor_dtype == DType::f32) return run<T, float>(call, place);
  return run<T, T>(call, place);
}

}  // namespace

void decode_routed(const DecodeRouted& call, Place place) {
  if (call.num_tiles == 0) return;
  if (call.dtype == DType::bf16) return run<bf16>(call, place);
  return run<fp16>(call, place);
}

}  // namespace lora::cuda
