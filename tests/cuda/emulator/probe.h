// Kernels that prove the emulator, called from tests/cuda/test_emulator.py by ctypes. `fault`
// leaves something out or does it wrongly: 0 is right.
#pragma once

#include <exception>
#include <string>

#include "cuda/launch.cuh"

#define LORA_PROBE extern "C" __attribute__((visibility("default"))) const char*

namespace lora::cuda {

// Null, or the text of an error until the next call.
template <class Work>
const char* text_of_error(Work work) {
  static std::string text;
  try {
    work();
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  return nullptr;
}

inline std::string probe() { return "probe"; }
constexpr Place NOWHERE{0, nullptr};

}  // namespace lora::cuda
