// The copy engine: boxes of matrices from and to shared memory, done late.
#include <cstring>
#include <stdexcept>

#include "emulator.h"

namespace emulator {
namespace {

int64_t bytes_of_box(const TensorMap& map) { return int64_t(map.box_rows) * map.box_columns * 2; }

// Calls visit(global address or null, offset in the box in shared memory) for every element.
template <class Visit>
void for_each_element(const TensorMap& map, int64_t column, int64_t row, Visit visit) {
  for (int64_t r = 0; r < map.box_rows; ++r) {
    for (int64_t c = 0; c < map.box_columns; ++c) {
      const int64_t y = row + r, x = column + c;
      const bool inside = y >= 0 && y < map.rows && x >= 0 && x < map.columns;
      const int64_t offset = 2 * (r * map.box_columns + c);
      visit(inside ? map.base + y * map.stride + 2 * x : nullptr, offset);
    }
  }
}

char* at(const Block& block, int64_t offset, const TensorMap& map) {
  return block.shared + (map.swizzle ? swizzled(offset) : offset);
}

int64_t box_in_shared(const void* shared, const TensorMap& map, const char* what) {
  needs_sm90a(what);
  const int64_t offset = offset_of(this_block(), shared, what);
  const int64_t alignment = map.swizzle ? 1024 : 128;
  if (offset % alignment || offset + bytes_of_box(map) > state.launch.shared_bytes) {
    fail(std::string(what) + ": a box needs shared memory from a multiple of " +
         std::to_string(alignment) + " bytes on, not " + std::to_string(bytes_of_box(map)) +
         " bytes from byte " + std::to_string(offset) + " on, " + here());
  }
  return offset;
}

}  // namespace

TensorMap make_map(const void* base, int64_t columns, int64_t rows, int64_t stride, int box_columns,
                   int box_rows, bool swizzle) {
  const auto demand = [](bool holds, const char* text) {
    if (!holds) throw std::runtime_error(std::string("no tensor map: ") + text);
  };
  demand(base && uintptr_t(base) % 16 == 0, "the matrix must begin at a multiple of 16 bytes");
  demand(stride % 16 == 0, "rows must be a multiple of 16 bytes apart");
  demand(stride >= 2 * columns && stride < int64_t(1) << 40, "rows must not overlap");
  demand(columns >= 1 && columns <= int64_t(1) << 32 && rows >= 1 && rows <= int64_t(1) << 32,
         "sizes from 1 to 2^32");
  demand(box_columns >= 1 && box_columns <= 256 && box_rows >= 1 && box_rows <= 256,
         "boxes of 1 to 256 rows and columns");
  demand(box_columns % 8 == 0, "the rows of a box must be a multiple of 16 bytes");
  demand(!swizzle || box_columns <= 64, "the rows of a swizzled box have at most 128 bytes");
  demand(!swizzle || box_columns == 64, "the emulator swizzles rows of 128 bytes only");
  return {static_cast<char*>(const_cast<void*>(base)),
          columns,
          rows,
          stride,
          box_columns,
          box_rows,
          swizzle};
}

void tma_load(void* shared, const TensorMap& map, int column, int row, const void* barrier,
              uint32_t blocks) {
  const int64_t offset = box_in_shared(shared, map, "tma_load");
  const int64_t barrier_offset = offset_of(this_block(), barrier, "tma_load");
  if (blocks == 0 || blocks >> state.blocks.size()) {
    fail("tma_load_multicast: bits for blocks that the cluster does not have, " + here());
  }
  for (uint32_t rank = 0; rank < state.blocks.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Block& block = block_of_cluster(rank);
    const auto load = [=, &block] {
      for_each_element(map, column, row, [&](const char* global, int64_t inside) {
        static const char zero[2] = {};
        std::memcpy(at(block, offset + inside, map), global ? global : zero, 2);
      });
      barrier_complete(block, barrier_offset, bytes_of_box(map), "tma_load");
    };
    state.tasks.push_back({&block, nullptr, 0, "a bulk load", load});
  }
  maybe_yield();
}

void tma_store(const TensorMap& map, const void* shared, int column, int row) {
  const int64_t offset = box_in_shared(shared, map, "tma_store");
  Fiber& owner = *state.current;
  Block& block = this_block();
  const auto store = [=, &block, &owner] {
    for_each_element(map, column, row, [&](char* global, int64_t inside) {
      if (global) std::memcpy(global, at(block, offset + inside, map), 2);
    });
    if (owner.doing == Doing::AT_STORES) wake(owner);
  };
  state.tasks.push_back({&block, &owner, owner.stores_committed, "a bulk store", store});
  maybe_yield();
}

void tma_store_commit() {
  needs_sm90a("tma_store_commit");
  state.current->stores_committed++;
  maybe_yield();
}

void tma_store_wait_read(int pending) {
  needs_sm90a("tma_store_wait_read");
  Fiber& owner = *state.current;
  const auto must_wait = [&] {
    for (const Task& task : state.tasks) {
      if (task.owner == &owner && task.group < owner.stores_committed - pending) return true;
    }
    return false;
  };
  while (must_wait()) suspend(Doing::AT_STORES);
}

}  // namespace emulator
