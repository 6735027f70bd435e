// What the compiler's undefined-behaviour checks call in kernels: the launch fails instead of the
// process. Every description of a check begins with the place in the source.
#include <cstdint>

#include "emulator.h"

namespace {

struct Place {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void found(const void* data, const char* what) {
  const Place& place = *static_cast<const Place*>(data);
  emulator::fail(std::string(what) + " at " + place.file + ":" + std::to_string(place.line) + ", " +
                 emulator::here());
}

}  // namespace

#define LORA_CHECK(name, what)                                                               \
  extern "C"                                                                                 \
      __attribute__((visibility("hidden"))) void __ubsan_handle_##name##_abort(void* data) { \
    found(data, what);                                                                       \
  }
LORA_CHECK(type_mismatch_v1, "a misaligned access")
LORA_CHECK(out_of_bounds, "an index outside of its array")
LORA_CHECK(shift_out_of_bounds, "a shift by too many bits")
LORA_CHECK(add_overflow, "a sum that overflows")
LORA_CHECK(sub_overflow, "a difference that overflows")
LORA_CHECK(mul_overflow, "a product that overflows")
LORA_CHECK(negate_overflow, "a negation that overflows")
LORA_CHECK(divrem_overflow, "a division by zero")
