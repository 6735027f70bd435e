// The kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "tasks.h"

// Of the functions below only: what the headers above define inline stays portable, whichever copy
// the linker keeps.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace lora {
namespace level_avx2 {
#include "portable.h"
#include "vec_avx2.h"
#include "vec_x86.h"
#include "kernels.h"
}  // namespace level_avx2

const Kernels avx2_kernels = level_avx2::ALL;
}  // namespace lora

#pragma GCC pop_options
#endif
