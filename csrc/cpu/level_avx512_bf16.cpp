// The kernels for AVX-512 with BF16: bf16 activations are multiplied in pairs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "tasks.h"

// Of the functions below only: what the headers above define inline stays portable, whichever copy
// the linker keeps.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

#define LORA_AVX512_BF16
namespace lora {
namespace level_avx512_bf16 {
#include "portable.h"
#include "vec_avx512.h"
#include "vec_x86.h"
#include "kernels.h"
}  // namespace level_avx512_bf16

const Kernels avx512_bf16_kernels = level_avx512_bf16::ALL;
}  // namespace lora

#pragma GCC pop_options
#endif
