// Servers run batches over published versions of a bank while a writer publishes the next ones, for
// the thread sanitizer (test_thread_sanitizer.py): csrc/cpu alone, without Python and torch.
//
//   threads_driver SECONDS [early | in_place | recycled]
//
// Each result must have the bits that a single thread computed when no other ran. The word plants a
// fault into the writer. Exit status 1: a result or a count is wrong; 66: the sanitizer's.
//
// P pairs of a token and an adapter; other dimensions as in published_bank.h.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/adapter.h"
#include "cpu/linear.h"
#include "cpu/routed.h"
#include "cpu/tasks.h"
#include "published_bank.h"

using lora::Mask;
using lora::Narrow;

namespace {

typedef std::chrono::steady_clock Clock;

constexpr int64_t ROWS = 300, PITCH = OUT + 5;  // of activations in memory
constexpr int64_t MASK_BYTES = (IN + 7) / 8;
constexpr uint64_t SEED = 0x123456789abcdef1u;
constexpr DType DTYPES[] = {DType::f32, DType::bf16, DType::f16};
constexpr int SERVERS = 3;  // on 1, 2 and 3 threads

// --- data --------------------------------------------------------------------------------------

// An activation [ROWS, PITCH].
std::vector<char> activation(DType dtype, uint64_t seed) {
  std::vector<char> rows(size_t(ROWS * PITCH * lora::size_of(dtype)));
  fill(rows.data(), ROWS * PITCH, dtype, seed);
  return rows;
}

// What every batch works on; nobody changes it.
struct Inputs {
  explicit Inputs(DType dtype)
      : dtype(dtype),
        x(activation(dtype, 1)),
        y(activation(dtype, 2)),
        dy(activation(dtype, 3)),
        dx(activation(dtype, 4)) {}
  DType dtype;
  std::vector<char> x, y, dy, dx;
};

// --- batches -----------------------------------------------------------------------------------

// Which tokens use which slot; the last group has no adapter.
struct Routes {
  Routes() {
    const struct {
      int64_t pairs, first;
    } groups[] = {{80, -1}, {17, 3}, {20, 40}, {46, -1}, {1, 9}, {20, -1}, {6, 0}};
    for (int64_t slot = 0; slot <= SLOTS; slot++) {
      const int64_t begin = int64_t(tokens.size()), first = groups[slot].first;
      for (int64_t i = 0; i < groups[slot].pairs; i++) {
        tokens.push_back(int32_t(first < 0 ? (7 * i + slot) % 83 : first + i));
        weights.push_back(0.3f + 0.01f * float(tokens.size() % 60));
      }
      plan.insert(plan.end(), {slot, begin, int64_t(tokens.size()), first});
    }
  }
  int64_t pairs() const { return int64_t(tokens.size()); }
  lora::Routing routing() const {
    return {plan.data(), int64_t(plan.size()) / 4, tokens.data(), pairs(), weights.data()};
  }
  std::vector<int64_t> plan;    // [G, 4]
  std::vector<int32_t> tokens;  // [P]
  std::vector<float> weights;   // [P]
};

struct Result {
  std::string name;
  std::vector<char> bytes;
};
typedef std::vector<Result> Results;

template <class T>
void keep(Results& results, const std::string& name, const std::vector<T>& values) {
  const char* begin = reinterpret_cast<const char*>(values.data());
  results.push_back({name, {begin, begin + values.size() * sizeof(T)}});
}

// routed_lora over all adapters, forward and backward.
void run_routed(Results& results, const Version& version, const Routes& routes, const Inputs& in,
                int threads) {
  const lora::Routed routed(version.bank(), routes.routing(), threads);
  const size_t pairs = size_t(routes.pairs());
  std::vector<uint8_t> bits(pairs * MASK_BYTES);
  std::vector<float> h_data(pairs * WIDTH), t_data(pairs * WIDTH), grad_weights(pairs);
  std::vector<char> x = in.x, y = in.y, dy = in.dy, dx = in.dx;
  const Mask mask{bits.data(), MASK_BYTES};
  const Narrow h{h_data.data(), WIDTH}, t{t_data.data(), WIDTH};

  int64_t offsets[SLOTS + 1][FACTORS], numel = 0;
  for (int slot = 0; slot <= SLOTS; slot++)
    for (int i = 0; i < FACTORS; i++) {
      offsets[slot][i] = slot == 2 && i == 0 ? -1 : numel;  // one is frozen
      numel += WIDTH * columns_of(i);
    }
  std::vector<char> grad_data(size_t(numel * lora::size_of(version.dtype)));
  const lora::Gradient grad{grad_data.data(), numel, &offsets[0][0]};

  routed.draw_mask(bits.data(), MASK_BYTES, {0, MASK_BYTES}, SEED);
  routed.shrink({x.data(), in.dtype, PITCH}, mask, h);
  routed.expand({y.data(), in.dtype, PITCH}, h);
  routed.expand_backward({dy.data(), in.dtype, PITCH}, t, &h, grad_weights.data());
  routed.gradient_b({dy.data(), in.dtype, PITCH}, h, grad);
  routed.gradient_a({x.data(), in.dtype, PITCH}, mask, t, grad);
  routed.shrink_backward({dx.data(), in.dtype, PITCH}, mask, t);
  keep(results, "routed mask", bits);
  keep(results, "routed h", h_data);
  keep(results, "routed y", y);
  keep(results, "routed t", t_data);
  keep(results, "routed grad_weights", grad_weights);
  keep(results, "routed gradients", grad_data);
  keep(results, "routed dx", dx);
}

// lora_linear over the first slice of one adapter, forward and backward.
void run_linear(Results& results, const Version& version, int slot, int64_t rows, const Inputs& in,
                int threads) {
  const int64_t rank = version.table[slot][1][0], out = SLICE_COLUMNS[1];
  const auto factor = [&](int i) {
    return version.storage + version.table[slot][i][2] * lora::size_of(version.dtype);
  };
  const lora::Factor a{factor(0), version.dtype, IN, 1}, b{factor(1), version.dtype, 1, rank};
  const uint32_t threshold = uint32_t(version.thresholds[slot]);
  const float scaling = float(version.scaling[slot]);
  const float keep_scale = float(65536.0 / (65536 - threshold));

  std::vector<uint8_t> bits(size_t(rows * MASK_BYTES));
  std::vector<float> h_data(size_t(rows * rank));
  std::vector<char> x_data = in.x, y_data = in.y, dy_data = in.dy, dx_data = in.dx;
  std::vector<char> grad_a(size_t(rank * IN * lora::size_of(version.dtype)));
  std::vector<char> grad_b(size_t(rank * out * lora::size_of(version.dtype)));
  const Mask all{nullptr, 0}, mask{threshold ? bits.data() : nullptr, MASK_BYTES};
  const Narrow h{h_data.data(), rank}, none{nullptr, 0};
  const auto wide = [&](std::vector<char>& rows_of) {
    return lora::Wide{rows_of.data(), in.dtype, PITCH, nullptr, 0};
  };
  const lora::Wide x = wide(x_data), y = wide(y_data), dy = wide(dy_data), dx = wide(dx_data);

  lora::adapter_forward(
      {threshold ? bits.data() : nullptr, MASK_BYTES, {0, MASK_BYTES}, SEED, threshold},
      {x, mask, a, h, keep_scale, IN, 0, 0, 0, 0},
      {y, all, b, h, nullptr, 1.0f, scaling, true, rank, 0, 0, 0, 0}, rows, IN, out, threads);
  lora::adapter_backward(
      {{dy, all, b, none, keep_scale * scaling, out, 0, 0, 0, 0},
       {dy, all, h, nullptr, scaling, grad_b.data(), version.dtype, 1, rank, rank, rows, 0, 0},
       {x, mask, none, nullptr, 1.0f, grad_a.data(), version.dtype, IN, 1, rank, rows, 0, 0},
       {dx, mask, a, none, nullptr, 1.0f, 1.0f, true, rank, 0, 0, 0, 0}},
      rows, IN, out, threads);
  const std::string name = "linear of slot " + std::to_string(slot);
  keep(results, name + " mask", bits);
  keep(results, name + " h", h_data);
  keep(results, name + " y", y_data);
  keep(results, name + " dx", dx_data);
  keep(results, name + " grad_a", grad_a);
  keep(results, name + " grad_b", grad_b);
}

// Of so many rows that no thread has drawn them all before another begins.
void run_mask(Results& results, int threads) {
  constexpr int64_t MANY = 10 * ROWS;
  std::vector<uint8_t> bits(size_t(MANY * MASK_BYTES));
  lora::draw_mask(bits.data(), MASK_BYTES, {0, MASK_BYTES}, MANY, IN, SEED, 0, 6554, threads);
  keep(results, "mask", bits);
}

constexpr int PARTS = 3;

Results run_part(int part, const Version& version, const Routes& routes, const Inputs& in,
                 int threads) {
  Results results;
  if (part == 0) run_routed(results, version, routes, in, threads);
  if (part == 1) run_mask(results, threads);
  if (part == 1) run_linear(results, version, 0, ROWS, in, threads);  // in one walk over the rows
  if (part == 2) run_linear(results, version, 3, 63, in, threads);    // too few for that
  return results;
}

// --- sessions ----------------------------------------------------------------------------------

// What one thread computes while no other runs.
typedef std::array<std::array<Results, PARTS>, STEPS> Quiet;

struct Served {
  int64_t batches = 0, wrong = 0;
};

// Each part at least once, then until the deadline; each on what is published when it begins.
Served serve(const Published& bank, const Routes& routes, const Inputs& in, int threads,
             const Quiet& expected, Clock::time_point deadline) {
  Served served;
  for (int part = 0; served.batches < PARTS || Clock::now() < deadline; part = (part + 1) % PARTS) {
    const Published version = std::atomic_load(&bank);
    const Results results = run_part(part, *version, routes, in, threads);
    const Results& quiet = expected[version->step][part];
    for (size_t i = 0; i < results.size(); i++) {
      if (results[i].bytes == quiet[i].bytes) continue;
      if (served.wrong++ == 0)
        std::fprintf(stderr, "step %d on %d threads: %s differs from a quiet thread's\n",
                     version->step, threads, results[i].name.c_str());
    }
    served.batches++;
  }
  return served;
}

// Whether all was right.
bool run_session(int level, DType dtype, const Inputs& in, const Routes& routes,
                 std::chrono::duration<double> length, Fault fault) {
  lora::set_level(level);
  Published bank = first_version(dtype);
  Quiet expected;
  for (int step = 0; step < STEPS; step++) {
    for (int part = 0; part < PARTS; part++)
      expected[step][part] = run_part(part, *bank, routes, in, 1);
    publish(bank, CYCLE[step], (step + 1) % STEPS, Fault::none);
  }

  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(length);
  std::vector<Served> served(SERVERS);
  std::vector<std::thread> servers;
  for (int s = 0; s < SERVERS; s++)
    servers.emplace_back(
        [&, s] { served[size_t(s)] = serve(bank, routes, in, 1 + s, expected, deadline); });
  int64_t versions = 0;
  int most = 0;
  for (int step = 0; Clock::now() < deadline; step = (step + 1) % STEPS, versions++) {
    publish(bank, CYCLE[step], (step + 1) % STEPS, fault);
    most = std::max(most, Counted::alive.load(std::memory_order_relaxed));
    wait();
  }
  for (std::thread& server : servers) server.join();
  bank.reset();

  Served all;
  for (const Served& one : served) all.batches += one.batches, all.wrong += one.wrong;
  const int left = Counted::alive.load(std::memory_order_relaxed);
  std::printf("level %d, dtypes %d and %d: %lld batches, %lld versions, %lld results wrong, ",
              level, int(in.dtype), int(dtype), (long long)all.batches, (long long)versions,
              (long long)all.wrong);
  std::printf("at most %d versions alive and %d in the end\n", most, left);
  // Each server's, and the one that is published.
  return all.wrong == 0 && most <= SERVERS + 1 && left == 0;
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 0;
  const std::string word = count > 2 ? arguments[2] : "";
  const Fault fault = word == "early"      ? Fault::early
                      : word == "in_place" ? Fault::in_place
                      : word == "recycled" ? Fault::recycled
                                           : Fault::none;
  if (seconds <= 0 || (fault == Fault::none && !word.empty())) {
    std::fprintf(stderr, "threads_driver SECONDS [early | in_place | recycled]\n");
    return 2;
  }
  // As parallel.cpp finds it.
  std::printf("calls run on %s\n",
              dlsym(RTLD_DEFAULT, "GOMP_parallel") ? "a team" : "threads of their own");
  const Routes routes;
  const int best = lora::best_level();
  bool right = true;
  for (int i = 0; i < best + 3; i++) {
    // The best level with adapters and activations of each dtype, the others with one.
    const int level = std::min(i, best);
    const Inputs in(DTYPES[(2 * i + 1) % 3]);
    right &= run_session(level, DTYPES[i % 3], in, routes,
                         std::chrono::duration<double>(seconds / (best + 3)), fault);
  }
  return right ? 0 : 1;
}
