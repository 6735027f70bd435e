// The dtypes of tensors, numbered as lora_kernels/runtime/cpu_extension.py does.
#pragma once

#include <cstdint>

namespace lora {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace lora
