// The GEMM with a tail for sm_90a:
//   out = output_scale * (left right + keep * (tail_left tail_right)) + bias
// The reduction over D simply continues into the rank on the same accumulators; with dropout the
// tail comes first, is masked in registers, and the main reduction goes on from there.
//
// M tokens, C columns, D depth, R rank. A block computes tiles of BLOCK_M x BLOCK_C one after
// another (persistent). Its first warpgroup only copies: one thread asks the copy engine for steps
// of 64 of the depth, into a ring of STAGES. The other two multiply 64 rows each, straight from the
// ring; while they write a tile, the copies of the next one are under way. A cluster of two blocks
// works on neighbouring rows and shares the tiles of `right`: each copies half of them for both.
#include "cuda/philox.cuh"
#include "cuda/tensor_map.cuh"

namespace lora::cuda {
namespace {

constexpr int BLOCK_M = 128, BLOCK_D = 64, THREADS = 384;
constexpr int ROW = 2 * BLOCK_D;  // bytes of a row of any tile in shared memory
constexpr int SLAB = 64 * ROW;    // 64 rows: a warpgroup's part of left, a box of right [D, C]
constexpr int CONSUMERS = 2;

template <int BLOCK_C>
struct Ring {
  static constexpr int LEFT = BLOCK_M * ROW, RIGHT = BLOCK_C * ROW, STAGE = LEFT + RIGHT;
  static constexpr int STAGES = BLOCK_C == 256 ? 4 : 6;
  static constexpr int RESULTS = STAGES * STAGE;  // per consumer two boxes of the result
  static constexpr int BARRIERS = RESULTS + 2 * CONSUMERS * SLAB;
  static constexpr int BYTES = BARRIERS + 2 * STAGES * 8;
};

struct Sizes {
  int tokens, columns, depth, rank;
  int row_tiles, column_tiles;  // row tiles of a whole cluster
  const void* bias;
  const void* output_scale;
  const int64_t* seed;
  uint32_t threshold;
  uint64_t first_group, groups_per_row;  // where the mask stands in the whole activation's
};

#ifdef LORA_SM90A

constexpr int NEIGHBOURS = 8;  // row tiles that take turns, so that L2 keeps their operands

struct Tile {
  int row, column;
};

template <int BLOCK_C>
__device__ __forceinline__ Tile tile_at(int index, const Sizes& sizes) {
  const int per_group = NEIGHBOURS * sizes.column_tiles;
  const int first = index / per_group * NEIGHBOURS, inside = index % per_group;
  const int rows = min(NEIGHBOURS, sizes.row_tiles - first);
  const int row = (first + inside % rows) * int(cluster_size()) + int(cluster_rank());
  return {row * BLOCK_M, inside / rows * BLOCK_C};
}

// Where the ring is: producer and consumers step through it alike.
template <int STAGES>
struct Position {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// A matrix tile with rows of 128 swizzled bytes, in units of 16 bytes as descriptors have them:
// eight rows are 1024 bytes; SLAB is between 64 columns of a tile whose memory runs along columns.
__device__ __forceinline__ uint64_t descriptor(const char* tile) {
  constexpr uint64_t swizzled = 1ull << 62, eight_rows = 1024 >> 4, next_slab = SLAB >> 4;
  return swizzled | eight_rows << 32 | next_slab << 16 | (shared_address(tile) & 0x3ffff) >> 4;
}

// Copies of one part of the reduction: the main one, or the tail.
template <int BLOCK_C, bool TRANSPOSED>
__device__ __forceinline__ void copy(const TensorMap& left, const TensorMap& right, int depth,
                                     const Tile& tile, char* shared, Barrier* full, Barrier* empty,
                                     Position<Ring<BLOCK_C>::STAGES>& at) {
  typedef Ring<BLOCK_C> R;
  const int blocks = int(cluster_size()), rank = int(cluster_rank());
  const int share = BLOCK_C / blocks;  // columns of right that this block copies
  for (int d = 0; d < depth; d += BLOCK_D) {
    char* const stage = shared + at.stage * R::STAGE;
    char* const mine = stage + R::LEFT + rank * share * ROW;
    Barrier* const arrived = full + at.stage;
    barrier_wait(empty + at.stage, at.parity ^ 1);
    barrier_expect(arrived, R::STAGE);
    tma_load(stage, &left, d, tile.row, arrived);
    const uint16_t all = uint16_t((1 << blocks) - 1);
    if (TRANSPOSED) {
      const int column = tile.column + rank * share;
      if (blocks == 1) {
        tma_load(mine, &right, d, column, arrived);
      } else {
        tma_load_multicast(mine, &right, d, column, arrived, all);
      }
    } else {
      for (int c = 0; c < share; c += 64) {
        const int column = tile.column + rank * share + c;
        if (blocks == 1) {
          tma_load(mine + c * ROW, &right, column, d, arrived);
        } else {
          tma_load_multicast(mine + c * ROW, &right, column, d, arrived, all);
        }
      }
    }
    at.advance();
  }
}

// This warp has read a stage; every block that copies into it has to know.
__device__ __forceinline__ void release(Barrier* empty) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane < cluster_size()) barrier_arrive(empty, lane);
}

// acc += the next steps of the ring, `depth` deep. All but the last product stay under way while
// the next step is waited for; at the end none is.
template <class T, int BLOCK_C, bool TRANSPOSED>
__device__ __forceinline__ void multiply(float (&acc)[BLOCK_C / 2], int depth, int consumer,
                                         char* shared, Barrier* full, Barrier* empty,
                                         Position<Ring<BLOCK_C>::STAGES>& at) {
  typedef Ring<BLOCK_C> R;
  constexpr uint64_t next_left = 32 >> 4, next_right = (TRANSPOSED ? 32 : 16 * ROW) >> 4;
  const uint64_t first_left = descriptor(shared + consumer * SLAB);
  const uint64_t first_right = descriptor(shared + R::LEFT);
  Barrier* read = nullptr;  // of the step before
  for (int d = 0; d < depth; d += BLOCK_D) {
    const uint64_t left = first_left + at.stage * (R::STAGE >> 4);
    const uint64_t right = first_right + at.stage * (R::STAGE >> 4);
    barrier_wait(full + at.stage, at.parity);
    wgmma_fence();
    if (depth - d > BLOCK_D - 16) {
#pragma unroll
      for (int k = 0; k < BLOCK_D / 16; ++k) {
        wgmma<T, !TRANSPOSED>(acc, left + k * next_left, right + k * next_right, 1);
      }
      wgmma_commit();
    } else {
      // What lies beyond the depth is zero; of a short tail it need not be multiplied.
      for (int k = 0; 16 * k < depth - d; ++k) {
        wgmma<T, !TRANSPOSED>(acc, left + k * next_left, right + k * next_right, 1);
      }
      wgmma_commit();
    }
    if (read) {
      wgmma_wait<1>();
      release(read);
    }
    read = empty + at.stage;
    at.advance();
  }
  wgmma_wait<0>();
  if (read) release(read);
}

// Zeros where the mask of [M, C] drops. A group of eight columns lies in the four lanes of a row:
// each lane draws every fourth group, of both of its rows, and the four tell each other.
template <int BLOCK_C>
__device__ __forceinline__ void drop(float (&acc)[BLOCK_C / 2], int row, int column,
                                     const Sizes& sizes) {
  constexpr int WORDS = BLOCK_C / 128;  // of bits per lane and row
  const int lane = int(threadIdx.x % 32), t = lane % 4;
  const uint64_t seed = uint64_t(*sizes.seed);
  uint32_t bits[2][WORDS];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint64_t first = sizes.first_group + uint64_t(row + 8 * i) * sizes.groups_per_row;
    const uint64_t group = first + uint64_t(column / 8 + t);
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
      bits[i][word] = 0;
#pragma unroll 2  // two calls hide each other; all at once would not fit beside the accumulators
      for (int byte = 0; byte < 4; ++byte) {
        const uint64_t here = group + uint64_t(4 * (4 * word + byte));
        bits[i][word] |= keep_bits(seed, here, 0, sizes.threshold) << (8 * byte);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
#pragma unroll
      for (int owner = 0; owner < 4; ++owner) {
        const uint32_t theirs = shuffle(bits[i][word], lane - t + owner) >> (2 * t);
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          const int j = 16 * word + 4 * byte + owner;  // the group's columns are 8 j ... 8 j + 7
          float* const pair = acc + 4 * j + 2 * i;
          pair[0] = theirs >> (8 * byte) & 1 ? pair[0] : 0.0f;
          pair[1] = theirs >> (8 * byte) & 2 ? pair[1] : 0.0f;
        }
      }
    }
  }
}

// A lane's numbers of two rows in the columns `column` and `column + 1`.
template <class T>
__device__ __forceinline__ void scale_and_shift(float* v, int column, const Sizes& sizes) {
  const T* const bias = static_cast<const T*>(sizes.bias);
  const T* const output_scale = static_cast<const T*>(sizes.output_scale);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (column + e >= sizes.columns) continue;
    if (output_scale) {
      const float scale = to_float(output_scale[column + e]);
      v[e] *= scale;
      v[2 + e] *= scale;
    }
    if (bias) {
      const float shift = to_float(bias[column + e]);
      v[e] += shift;
      v[2 + e] += shift;
    }
  }
}

// Scale, add the bias, round, and write 64 columns at a time through two boxes of shared memory.
template <class T, int BLOCK_C, bool PLAIN>
__device__ __forceinline__ void write(float (&acc)[BLOCK_C / 2], const TensorMap& out, int row,
                                      int column, int consumer, char* results, const Sizes& sizes) {
  const int thread = int(threadIdx.x % 128), lane = thread % 32, warp = thread / 32, t = lane % 4;
  // This lane's row of the blocks that store_blocks writes.
  const int block = lane / 8, inside = 16 * warp + 8 * (block % 2) + lane % 8;
#pragma unroll
  for (int part = 0; part < BLOCK_C / 64; ++part) {
    char* const box = results + (2 * consumer + part % 2) * SLAB;
    if (thread == 0) tma_store_wait_read<1>();
    sync_named(1 + consumer, 128);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 8 * part + 2 * pair + i;
        float* const v = acc + 4 * j;
        if (!PLAIN) scale_and_shift<T>(v, column + 8 * j + 2 * t, sizes);
        packed[2 * i] = pack<T>(v[0], v[1]);
        packed[2 * i + 1] = pack<T>(v[2], v[3]);
      }
      const int chunk = (2 * pair + block / 2) ^ (inside % 8);
      store_blocks(box + inside * ROW + 16 * chunk, packed[0], packed[1], packed[2], packed[3]);
    }
    fence_async_shared();
    sync_named(1 + consumer, 128);
    if (thread == 0) {
      tma_store(&out, box, column + 64 * part, row);
      tma_store_commit();
    }
  }
}

#endif  // LORA_SM90A

template <class T, int BLOCK_C, bool TRANSPOSED, bool DROPOUT>
__global__ void __launch_bounds__(THREADS, 1)
    gemm_tail_kernel(const __grid_constant__ TensorMap left,        // [M, D]
                     const __grid_constant__ TensorMap right,       // [C, D] or [D, C]
                     const __grid_constant__ TensorMap tail_left,   // [M, R]
                     const __grid_constant__ TensorMap tail_right,  // [C, R] or [R, C]
                     const __grid_constant__ TensorMap out,         // [M, C]
                     const Sizes sizes) {
#ifdef LORA_SM90A
  typedef Ring<BLOCK_C> R;
  char* const shared = shared_memory();
  Barrier* const full = reinterpret_cast<Barrier*>(shared + R::BARRIERS);
  Barrier* const empty = full + R::STAGES;
  const int warpgroup = int(threadIdx.x / 128);
  const int tiles = sizes.row_tiles * sizes.column_tiles;
  const int first = int(blockIdx.x / cluster_size()), step = int(gridDim.x / cluster_size());

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < R::STAGES; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, 4 * CONSUMERS * cluster_size());
    }
    barrier_init_fence();
  }
  sync_warp();
  cluster_arrive();
  cluster_wait();

  Position<R::STAGES> at;
  if (warpgroup == 0) {
    registers_fewer<40>();
    if (threadIdx.x == 0) {
      for (int index = first; index < tiles; index += step) {
        const Tile tile = tile_at<BLOCK_C>(index, sizes);
        if (DROPOUT) {
          copy<BLOCK_C, TRANSPOSED>(tail_left, tail_right, sizes.rank, tile, shared, full, empty,
                                    at);
        }
        copy<BLOCK_C, TRANSPOSED>(left, right, sizes.depth, tile, shared, full, empty, at);
        if (!DROPOUT) {
          copy<BLOCK_C, TRANSPOSED>(tail_left, tail_right, sizes.rank, tile, shared, full, empty,
                                    at);
        }
      }
      // What the other block has read is told by messages that the cluster's barrier does not wait
      // for: none may come when this block has ended.
      for (int stage = 0; stage < R::STAGES; ++stage) {
        barrier_wait(empty + at.stage, at.parity ^ 1);
        at.advance();
      }
    }
    sync_warp();
  } else {
    registers_more<232>();
    const int consumer = warpgroup - 1;
    const int lane_row = int(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
    for (int index = first; index < tiles; index += step) {
      const Tile tile = tile_at<BLOCK_C>(index, sizes);
      const int row = tile.row + 64 * consumer;
      float acc[BLOCK_C / 2] = {};
      if (DROPOUT) {
        multiply<T, BLOCK_C, TRANSPOSED>(acc, sizes.rank, consumer, shared, full, empty, at);
        drop<BLOCK_C>(acc, row + lane_row, tile.column, sizes);
      }
      multiply<T, BLOCK_C, TRANSPOSED>(acc, sizes.depth, consumer, shared, full, empty, at);
      if (!DROPOUT) {
        multiply<T, BLOCK_C, TRANSPOSED>(acc, sizes.rank, consumer, shared, full, empty, at);
      }
      char* const results = shared + R::RESULTS;
      if (sizes.bias || sizes.output_scale) {
        write<T, BLOCK_C, false>(acc, out, row, tile.column, consumer, results, sizes);
      } else {
        write<T, BLOCK_C, true>(acc, out, row, tile.column, consumer, results, sizes);
      }
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
    sync_warp();
  }
  // The other block may still copy into this one's ring.
  cluster_arrive();
  cluster_wait();
#else
  __trap();  // built for another architecture: never a silent result
#endif
}

template <class T, int BLOCK_C, bool TRANSPOSED, bool DROPOUT>
void run(const GemmTail& call, const Place& place) {
  const auto what = [&] {
    return described("gemm_tail", "tokens", call.tokens, "depth", call.depth, "columns",
                     call.columns, "rank", call.rank, "tile columns", BLOCK_C, "cluster",
                     call.cluster);
  };
  const int cluster = call.cluster;
  const int64_t row_tiles = ceil_div(call.tokens, BLOCK_M * cluster);
  const int64_t column_tiles = ceil_div(call.columns, BLOCK_C);
  const auto map_of_left = [&](const char* name, const void* data, int64_t depth, int64_t stride) {
    return matrix_map(name, data, call.dtype, call.tokens, depth, stride, BLOCK_M, what);
  };
  const auto map_of_right = [&](const char* name, const void* data, int64_t depth, int64_t stride) {
    return TRANSPOSED
               ? matrix_map(name, data, call.dtype, call.columns, depth, stride, BLOCK_C / cluster,
                            what)
               : matrix_map(name, data, call.dtype, depth, call.columns, stride, BLOCK_D, what);
  };
  const Sizes sizes{int(call.tokens), int(call.columns), int(call.depth),  int(call.rank),
                    int(row_tiles),   int(column_tiles), call.bias,        call.output_scale,
                    call.seed,        call.threshold,    call.first_group, call.groups_per_row};
  const int64_t clusters = std::min<int64_t>(row_tiles * column_tiles,
                                             std::max(multiprocessors(place, what) / cluster, 1));
  launch(
      what, gemm_tail_kernel<T, BLOCK_C, TRANSPOSED, DROPOUT>,
      Grid{clusters * cluster, THREADS, Ring<BLOCK_C>::BYTES, cluster}, place,
      map_of_left("left", call.left, call.depth, call.left_stride),
      map_of_right("right", call.right, call.depth, call.right_stride),
      map_of_left("tail_left", call.tail_left, call.rank, call.tail_left_stride),
      map_of_right("tail_right", call.tail_right, call.rank, call.tail_right_stride),
      matrix_map("out", call.out, call.dtype, call.tokens, call.columns, call.out_stride, 64, what),
      sizes);
}

template <class T, int BLOCK_C>
void run(const GemmTail& call, const Place& place) {
  if (call.transposed) return run<T, BLOCK_C, true, false>(call, place);
  if (call.seed) return run<T, BLOCK_C, false, true>(call, place);
  return run<T, BLOCK_C, false, false>(call, place);
}

template <class T>
void run(const GemmTail& call, const Place& place) {
  if (call.tile_columns == 128) return run<T, 128>(call, place);
  return run<T, 256>(call, place);
}

}  // namespace

void gemm_tail(const GemmTail& call, Place place) {
  if (call.tokens == 0 || call.columns == 0) return;
  const auto what = [] { return std::string("gemm_tail"); };
  use(place, what);
  if (call.dtype == DType::bf16) return run<bf16>(call, place);
  return run<fp16>(call, place);
}

}  // namespace lora::cuda
