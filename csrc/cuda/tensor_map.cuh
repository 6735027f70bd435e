// Tensor maps: how the copy engine sees a matrix.
#pragma once

#include "cuda/launch.cuh"

namespace lora::cuda {

constexpr int BOX_COLUMNS = 64;  // 128 bytes, what the swizzle spans

#ifndef LORA_EMULATE

// The driver's function, found at run time: the extension is not linked with the driver.
template <class What>
decltype(&cuTensorMapEncodeTiled) map_encoder(const What& what) {
  static void* const found = [&] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &result),
          what);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result),
          what);
#endif
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(what() + ": the driver has no cuTensorMapEncodeTiled");
    }
    return function;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

#endif

// A matrix [rows, columns] of halves in boxes of `box_rows` rows and 64 columns, swizzled so that
// neither the copy nor the products have bank conflicts. `name` is the argument's, for errors.
template <class What>
TensorMap matrix_map(const char* name, const void* data, DType dtype, int64_t rows, int64_t columns,
                     int64_t stride, int box_rows, const What& what) {
#ifdef LORA_EMULATE
  (void)name, (void)dtype, (void)what;
  return make_emulated_map(data, columns, rows, 2 * stride, BOX_COLUMNS, box_rows, true);
#else
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t pitch[1] = {cuuint64_t(2 * stride)};
  const cuuint32_t box[2] = {cuuint32_t(BOX_COLUMNS), cuuint32_t(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  TensorMap map;
  const CUresult result = map_encoder(what)(
      &map,
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(what() + ": no tensor map for " + name + " (CUDA error " +
                             std::to_string(int(result)) + ")");
  }
  return map;
#endif
}

}  // namespace lora::cuda
