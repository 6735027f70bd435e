// Versions of a bank as Python publishes them: written whole, then published with one store.
// Whoever reads one keeps it, and the memory of its adapters, alive.
//
// L slots, S slices, K in_features, N out_features of all slices, H the width of h.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "cpu/routed.h"

using lora::DType;

constexpr int SLOTS = 6, SLICES = 2, FACTORS = 1 + SLICES;  // L, S, 1 + S
constexpr int64_t IN = 300, OUT = 343, WIDTH = 72;          // K, N, H
constexpr int64_t SLICE_COLUMNS[SLICES + 1] = {0, 300, OUT};

// Below 1, and the same for the same seed.
inline void fill(char* to, int64_t count, DType dtype, uint64_t seed) {
  std::mt19937 random{uint32_t(seed)};
  for (int64_t i = 0; i < count; i++) {
    const float value = float(int32_t(random())) * 0x1p-31f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const int exponent = int(bits >> 23 & 0xff) - 112;  // in fp16
    uint16_t half = uint16_t(bits >> 16);
    if (dtype == DType::f16)
      half = uint16_t((half & 0x8000) | (exponent > 0 ? exponent << 10 | (bits >> 13 & 0x3ff) : 0));
    if (dtype == DType::f32) std::memcpy(to + 4 * i, &value, 4);
    if (dtype != DType::f32) std::memcpy(to + 2 * i, &half, 2);
  }
}

struct Adapter {
  int64_t ranks[SLICES];
  double scaling;
  int32_t threshold;
};

// The first of each slot, and what replaces that of slot 0.
constexpr Adapter ADAPTERS[SLOTS + 1] = {
    {{8, 16}, 0.5, 6554}, {{5, 0}, 2.0, 0},     {{0, 12}, -1.5, 13107}, {{60, 0}, 0.25, 655},
    {{3, 3}, 1.0, 6554},  {{8, 1}, 0.75, 3277}, {{9, 12}, 0.4, 3277},
};

struct Change {
  int slot, adapter;  // -1 removes
};
constexpr Change FIRST[] = {{0, 0}, {1, 1}, {2, 2}, {3, 3}, {5, 5}};
// Adds, replaces and removes; the last leads to what was there before the first.
constexpr Change CYCLE[] = {{4, 4}, {0, 6}, {1, -1}, {4, -1}, {0, 0}, {1, 1}};
constexpr int STEPS = int(sizeof(CYCLE) / sizeof(Change));

inline int64_t columns_of(int index) {
  return index == 0 ? IN : SLICE_COLUMNS[index] - SLICE_COLUMNS[index - 1];
}

// The factors of an adapter, in memory of their own: A of all slices, B of each.
struct Region {
  Region() = default;
  Region(const Adapter& adapter, DType dtype) : dtype(dtype) {
    for (int64_t r : adapter.ranks) rank[0] += r;
    std::copy(adapter.ranks, adapter.ranks + SLICES, rank + 1);
    for (int i = 0; i < FACTORS; i++) {
      begin[i] = bytes;
      bytes += (rank[i] * columns_of(i) * lora::size_of(dtype) + 63) / 64 * 64;
    }
    data.reset(static_cast<char*>(std::aligned_alloc(64, size_t(bytes))), std::free);
    std::memset(data.get(), 0, size_t(bytes));
  }
  void write(uint64_t seed) const {
    for (int i = 0; i < FACTORS; i++)
      fill(data.get() + begin[i], rank[i] * columns_of(i), dtype, seed * FACTORS + uint64_t(i));
  }

  DType dtype = DType::f32;
  int64_t rank[FACTORS] = {}, begin[FACTORS] = {}, bytes = 0;
  std::shared_ptr<char> data;
};

// Relaxed: counting must not put threads in an order that nothing else gives them.
struct Counted {
  Counted() { alive.fetch_add(1, std::memory_order_relaxed); }
  Counted(const Counted&) : Counted() {}
  ~Counted() { alive.fetch_sub(1, std::memory_order_relaxed); }
  inline static std::atomic<int> alive{0};
};

struct Version : Counted {
  explicit Version(DType dtype) : dtype(dtype) {}

  void enter(int slot, const Adapter& adapter, const Region& region) {
    int64_t column = 0;
    for (int i = 0; i < FACTORS; i++) {
      int64_t* row = table[slot][i];
      row[2] = (region.data.get() + region.begin[i] - storage) / lora::size_of(dtype);
      row[1] = i < 2 ? 0 : column += region.rank[i - 1];
      row[0] = region.rank[i];
    }
    scaling[slot] = adapter.scaling;
    thresholds[slot] = adapter.threshold;
    regions[slot] = region;
  }
  void clear(int slot) {
    for (int64_t* row : table[slot]) row[0] = 0;
    regions[slot] = {};
  }
  lora::Bank bank() const {
    return {storage, -1,         dtype,  &table[0][0][0], SLOTS + 1, WIDTH,
            scaling, thresholds, SLICES, SLICE_COLUMNS,   IN};
  }

  // Factors lie before it and behind.
  alignas(64) inline static const char storage[64] = {};
  DType dtype;
  int step = 0;  // the change of the cycle that comes next
  int64_t table[SLOTS + 1][FACTORS][3] = {};
  double scaling[SLOTS + 1] = {};
  int32_t thresholds[SLOTS + 1] = {};
  Region regions[SLOTS];
};

typedef std::shared_ptr<const Version> Published;

inline void wait() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

// What a writer may do wrong: publish a table before the factors are written; write into a
// published table; take memory from a version that may still be read.
enum class Fault { none, early, in_place, recycled };

inline void publish(Published& bank, const Change& change, int step, Fault fault) {
  const Published last = std::atomic_load(&bank);
  const auto next = std::make_shared<Version>(*last);
  next->step = step;
  const int slot = change.slot;
  const Region old = last->regions[slot];
  if (change.adapter < 0) {
    next->clear(slot);
    std::atomic_store(&bank, Published(next));
  } else {
    const Adapter& adapter = ADAPTERS[change.adapter];
    const Region region(adapter, next->dtype);
    const uint64_t seed = uint64_t(change.adapter);
    if (fault != Fault::early) region.write(seed);
    if (fault == Fault::in_place) {
      const_cast<Version&>(*last).enter(slot, adapter, region);
    } else {
      next->enter(slot, adapter, region);
      std::atomic_store(&bank, Published(next));
    }
    if (fault == Fault::early) {
      // Until somebody beside this function and the bank has it.
      for (int i = 0; i < 1000 && next.use_count() < 3; i++) wait();
      region.write(seed);
    }
  }
  if (fault == Fault::recycled && old.data) std::memset(old.data.get(), 0, size_t(old.bytes));
}

inline Published first_version(DType dtype) {
  Published bank = std::make_shared<Version>(dtype);
  for (const Change& change : FIRST) publish(bank, change, 0, Fault::none);
  return bank;
}
