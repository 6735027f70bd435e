// Warpgroup products: read late from shared memory, seen in the registers only after wgmma_wait.
//
// The lanes of a warp ask one after another, without waiting for each other; the product number n
// of each lane has to be the same one. A warp does its 16 of the 64 rows.
#include <cstring>

#include "emulator.h"

namespace emulator {
namespace {

constexpr int DEPTH = 16, ROWS = 16, MOST_COLUMNS = 256;
constexpr uint32_t UNKNOWN = 0xffffffff;  // NaN

// A matrix in shared memory, as a descriptor says.
struct Operand {
  int64_t start, leading, stride;  // bytes

  Operand(uint64_t descriptor, const char* name)
      : start(int64_t(descriptor & 0x3fff) << 4),
        leading(int64_t(descriptor >> 16 & 0x3fff) << 4),
        stride(int64_t(descriptor >> 32 & 0x3fff) << 4) {
    const uint64_t layout = descriptor >> 62, others = descriptor & 0x3fffc000c000c000;
    if (layout == 1 && others == 0) return;
    fail(std::string("wgmma: the descriptor of ") + name +
         " is not that of a 128-byte swizzle without an offset, " + here());
  }

  // Eight halves of which the first is at `address` before the swizzle.
  const char* halves(const Block& block, int64_t address) const {
    const int64_t offset = swizzled(address) - WINDOW;
    if (offset < 0 || offset + 16 > state.launch.shared_bytes) {
      fail("wgmma reads outside of the shared memory of " + name_of(block));
    }
    return block.shared + offset;
  }
};

// Memory runs along the depth: to[k * columns + m] for `count` m from `first` on.
void read_along_depth(const Block& block, const Operand& from, int first, int count, uint16_t* to) {
  for (int m = 0; m < count; ++m) {
    const int64_t row = from.start + (first + m) / 8 * from.stride + (first + m) % 8 * 128;
    uint16_t halves[DEPTH];
    std::memcpy(halves, from.halves(block, row), 16);
    std::memcpy(halves + 8, from.halves(block, row + 16), 16);
    for (int k = 0; k < DEPTH; ++k) to[k * count + m] = halves[k];
  }
}

// Memory runs along the columns, 64 of them beside each other.
void read_along_columns(const Block& block, const Operand& from, int columns, uint16_t* to) {
  for (int k = 0; k < DEPTH; ++k) {
    const int64_t row = from.start + k / 8 * from.stride + k % 8 * 128;
    for (int n = 0; n < columns; n += 8) {
      const int64_t address = row + n / 64 * from.leading + n % 64 * 2;
      std::memcpy(to + k * columns + n, from.halves(block, address), 16);
    }
  }
}

void numbers(const uint16_t* halves, int count, bool is_bf16, float* to) {
  if (is_bf16) {
    for (int i = 0; i < count; ++i) to[i] = float_of_bf16(halves[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = float_of_fp16(halves[i]);
  }
}

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2,fma", "default")))
#endif
void multiply(const float* a, const float* b, int columns, bool accumulate, float* sum) {
  for (int row = 0; row < ROWS; ++row) {
    float partial[MOST_COLUMNS] = {};
    for (int k = 0; k < DEPTH; ++k) {
      const float factor = a[k * ROWS + row];
      for (int n = 0; n < columns; ++n) partial[n] += factor * b[k * columns + n];
    }
    float* const total = sum + row * columns;
    for (int n = 0; n < columns; ++n) total[n] = accumulate ? total[n] + partial[n] : partial[n];
  }
}

void execute(Warp& warp, Product& product) {
  uint16_t halves[DEPTH * MOST_COLUMNS];
  float a[DEPTH * ROWS], b[DEPTH * MOST_COLUMNS];
  read_along_depth(*warp.block, Operand(product.a, "a"), warp.number % 4 * ROWS, ROWS, halves);
  numbers(halves, DEPTH * ROWS, product.is_bf16, a);
  const Operand right(product.b, "b");
  if (product.transposed) {
    read_along_columns(*warp.block, right, product.columns, halves);
  } else {
    read_along_depth(*warp.block, right, 0, product.columns, halves);
  }
  numbers(halves, DEPTH * product.columns, product.is_bf16, b);
  multiply(a, b, product.columns, product.accumulate, product.chain->sum.data());
  product.done = true;
}

// Where d[i] of a lane is in the sum.
int place(int lane, int i, int columns) {
  return (lane / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

// A lane's registers become those of a chain.
void take(Chain& chain, int lane, float* d) {
  chain.registers[lane] = d;
  for (int i = 0; i < chain.columns / 2; ++i) {
    chain.sum[size_t(place(lane, i, chain.columns))] = d[i];
    std::memcpy(d + i, &UNKNOWN, 4);
  }
}

void give_back(const Chain& chain) {
  for (int lane = 0; lane < LANES; ++lane) {
    float* const d = chain.registers[lane];
    for (int i = 0; i < chain.columns / 2; ++i) {
      if (std::memcmp(d + i, &UNKNOWN, 4)) {
        fail("accumulators were written before wgmma_wait, " + here());
      }
      d[i] = chain.sum[size_t(place(lane, i, chain.columns))];
    }
  }
}

// The first product of the warp that is not of a group before `limit`.
size_t before(const Products& products, int64_t limit) {
  size_t count = 0;
  while (count < products.queue.size() && products.queue[count].group < limit) count++;
  return count;
}

void finish(Warp& warp, int64_t limit) {
  Products& products = warp.products;
  for (size_t count = before(products, limit); count > 0; --count) {
    Product& product = products.queue.front();
    if (!product.done) execute(warp, product);
    product.chain->open--;
    products.queue.pop_front();
    products.first++;
  }
  for (auto chain = products.chains.begin(); chain != products.chains.end();) {
    if (chain->open) {
      ++chain;
      continue;
    }
    give_back(*chain);
    chain = products.chains.erase(chain);
    for (bool& fenced : products.fenced) fenced = false;
  }
}

void wait_all_lanes(Warp& warp) {
  Products& products = warp.products;
  const int pending = *static_cast<const int*>(warp.operands[0]);
  for (int lane = 0; lane < LANES; ++lane) {
    if (products.issued[lane] != products.issued[0] ||
        products.committed[lane] != products.committed[0] ||
        *static_cast<const int*>(warp.operands[lane]) != pending) {
      fail("the lanes of a warp ask for different products, " + here());
    }
  }
  const int64_t limit = products.committed[0] - pending;
  const size_t count = before(products, limit);
  if (count == 0 || eager()) {
    finish(warp, limit);
    wake(warp);
    return;
  }
  for (Fiber& fiber : warp.lanes) fiber.doing = Doing::AT_PRODUCTS;
  const auto work = [&warp, limit] {
    finish(warp, limit);
    wake(warp);
  };
  state.tasks.push_back({warp.block, nullptr, 0, "a product", work});
}

}  // namespace

void wgmma_fence() {
  needs_sm90a("wgmma");
  together(Doing::WGMMA_FENCE, nullptr, [](Warp& warp) {
    for (bool& fenced : warp.products.fenced) fenced = true;
  });
}

void wgmma(float* d, uint64_t a, uint64_t b, int columns, bool accumulate, bool transposed,
           bool is_bf16) {
  needs_sm90a("wgmma");
  Warp& warp = *state.current->warp;
  Products& products = warp.products;
  const int lane = state.current->lane;
  const int64_t number = products.issued[lane]++;
  const Product asked{a, b, columns, accumulate, transposed, is_bf16, products.committed[lane]};
  if (state.launch.threads % 128 && warp.number / 4 == state.launch.threads / 128) {
    fail("wgmma is for four warps together, " + here());
  }
  if (number == products.first + int64_t(products.queue.size())) {
    std::vector<Product>& issued = warp.block->issued[size_t(warp.number / 4)];
    if (number == int64_t(issued.size())) issued.push_back(asked);
    if (!issued[size_t(number)].same(asked)) {
      fail("the warps of a warpgroup ask for different products, " + here());
    }
    products.queue.push_back(asked);
    Product& product = products.queue.back();
    for (Chain& chain : products.chains) {
      if (chain.registers[lane] == d && chain.columns == columns) product.chain = &chain;
    }
    if (!product.chain) {
      products.chains.emplace_back();
      product.chain = &products.chains.back();
      product.chain->columns = columns;
      product.chain->sum.resize(size_t(ROWS * columns));
    }
    product.chain->open++;
  }
  Product& product = products.queue[size_t(number - products.first)];
  if (!product.same(asked)) fail("the lanes of a warp ask for different products, " + here());
  Chain& chain = *product.chain;
  if (!chain.registers[lane]) {
    if (!products.fenced[lane]) {
      fail("wgmma_fence is missing before the first wgmma on accumulators, " + here());
    }
    take(chain, lane, d);
  }
  if (chain.registers[lane] != d) fail("wgmma: other accumulators than other lanes, " + here());
  if (++product.lanes < LANES || !eager()) return;
  for (Product& earlier : products.queue) {
    if (earlier.lanes == LANES && !earlier.done) execute(warp, earlier);
  }
}

void wgmma_commit() {
  needs_sm90a("wgmma");
  state.current->warp->products.committed[state.current->lane]++;
}

void wgmma_wait(int pending) {
  needs_sm90a("wgmma");
  together(Doing::WGMMA_WAIT, &pending, &wait_all_lanes, STAY);
}

}  // namespace emulator
