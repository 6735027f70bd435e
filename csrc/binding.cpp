// The only file that knows Python. Tensors come as addresses, sizes and strides in elements, dtypes
// as the numbers of lora::DType; lora_kernels/native.py and native_cuda.py turn tensors into them.
// Absent tensors are address 0. Everything has been checked before; the lock is released while a
// kernel runs.
//
// LORA_KERNELS_CUDA: with the CUDA kernels; its text says what for.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "cpu/adapter.h"
#include "cpu/linear.h"
#include "cpu/routed.h"
#include "cpu/tasks.h"
#ifdef LORA_KERNELS_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using lora::DType;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int number) { return static_cast<DType>(number); }

void draw_mask(uintptr_t out, int64_t stride, int64_t first, int64_t rows, int64_t columns,
               int64_t seed, uint32_t stream, uint32_t threshold, int threads) {
  lora::draw_mask(at<uint8_t>(out), stride, first, rows, columns, uint64_t(seed), stream, threshold,
                  threads);
}

// Draws the mask if there is one; h [M, R], and y += s h B^T (or y = ...).
void adapter_forward(int dtype, int64_t rows, uintptr_t x, int64_t x_stride, int64_t in_columns,
                     int64_t out_columns, int64_t rank, uintptr_t a, int a_dtype,
                     int64_t a_rank_stride, int64_t a_column_stride, uintptr_t b, int b_dtype,
                     int64_t b_rank_stride, int64_t b_column_stride, uintptr_t h, double h_scale,
                     double scaling, uintptr_t mask, int64_t seed, uint32_t threshold, int threads,
                     uintptr_t y, int64_t y_stride, bool add) {
  const int64_t mask_stride = (in_columns + 7) / 8;
  lora::adapter_forward({at<uint8_t>(mask), mask_stride, uint64_t(seed), threshold},
                        {{at<char>(x), dtype_of(dtype), x_stride, nullptr, 0},
                         {at<uint8_t>(mask), mask_stride},
                         {at<char>(a), dtype_of(a_dtype), a_rank_stride, a_column_stride},
                         {at<float>(h), rank},
                         float(h_scale),
                         in_columns,
                         0,
                         0,
                         0,
                         0},
                        {{at<char>(y), dtype_of(dtype), y_stride, nullptr, 0},
                         {nullptr, 0},
                         {at<char>(b), dtype_of(b_dtype), b_rank_stride, b_column_stride},
                         {at<float>(h), rank},
                         nullptr,
                         1.0f,
                         float(scaling),
                         add,
                         rank,
                         0,
                         0,
                         0,
                         0},
                        rows, in_columns, out_columns, threads);
}

// The gradients lie in memory as A and B do, with strides of their own.
void adapter_backward(int dtype, int64_t rows, uintptr_t dy, int64_t dy_stride, int64_t out_columns,
                      uintptr_t x, int64_t x_stride, int64_t in_columns, uintptr_t mask,
                      int64_t rank, uintptr_t a, int a_dtype, int64_t a_rank_stride,
                      int64_t a_column_stride, uintptr_t b, int b_dtype, int64_t b_rank_stride,
                      int64_t b_column_stride, uintptr_t h, int64_t h_stride, double t_scale,
                      double scaling, uintptr_t grad_a, int grad_a_dtype,
                      int64_t grad_a_rank_stride, int64_t grad_a_column_stride, uintptr_t grad_b,
                      int grad_b_dtype, int64_t grad_b_rank_stride, int64_t grad_b_column_stride,
                      int threads, uintptr_t dx, int64_t dx_stride, bool add) {
  const lora::Wide wide_dy{at<char>(dy), dtype_of(dtype), dy_stride, nullptr, 0};
  const lora::Mask kept{at<uint8_t>(mask), (in_columns + 7) / 8};
  lora::adapter_backward({{wide_dy,
                           {nullptr, 0},
                           {at<char>(b), dtype_of(b_dtype), b_rank_stride, b_column_stride},
                           {nullptr, 0},
                           float(t_scale),
                           out_columns,
                           0,
                           0,
                           0,
                           0},
                          {wide_dy,
                           {nullptr, 0},
                           {at<float>(h), h_stride},
                           nullptr,
                           float(scaling),
                           at<char>(grad_b),
                           dtype_of(grad_b_dtype),
                           grad_b_rank_stride,
                           grad_b_column_stride,
                           rank,
                           rows,
                           0,
                           0},
                          {{at<char>(x), dtype_of(dtype), x_stride, nullptr, 0},
                           kept,
                           {nullptr, 0},
                           nullptr,
                           1.0f,
                           at<char>(grad_a),
                           dtype_of(grad_a_dtype),
                           grad_a_rank_stride,
                           grad_a_column_stride,
                           rank,
                           rows,
                           0,
                           0},
                          {{at<char>(dx), dtype_of(dtype), dx_stride, nullptr, 0},
                           kept,
                           {at<char>(a), dtype_of(a_dtype), a_rank_stride, a_column_stride},
                           {nullptr, 0},
                           nullptr,
                           1.0f,
                           1.0f,
                           add,
                           rank,
                           0,
                           0,
                           0,
                           0}},
                         rows, in_columns, out_columns, threads);
}

// A bank and a routing, as long as their tensors live.
class Routed {
 public:
  Routed(uintptr_t storage, int dtype, uintptr_t table, uintptr_t scaling, uintptr_t thresholds,
         const py::sequence& slice_columns, int64_t in_features, uintptr_t plan, int64_t groups,
         uintptr_t tokens, uintptr_t weights, int threads)
      : columns_(columns_of(slice_columns)),
        routed_(
            {at<char>(storage), dtype_of(dtype), at<int64_t>(table), at<double>(scaling),
             at<int32_t>(thresholds), int64_t(columns_.size()) - 1, columns_.data(), in_features},
            {at<int64_t>(plan), groups, at<int32_t>(tokens), at<float>(weights)}, threads) {}
  Routed(const Routed&) = delete;

  void draw_mask(uintptr_t mask, int64_t stride, int64_t seed) const {
    routed_.draw_mask(at<uint8_t>(mask), stride, uint64_t(seed));
  }
  void shrink(uintptr_t x, int dtype, int64_t stride, uintptr_t mask, int64_t mask_stride,
              uintptr_t h, int64_t h_stride) const {
    routed_.shrink({at<char>(x), dtype_of(dtype), stride}, {at<uint8_t>(mask), mask_stride},
                   {at<float>(h), h_stride});
  }
  void expand(uintptr_t out, int dtype, int64_t stride, uintptr_t h, int64_t h_stride) const {
    routed_.expand({at<char>(out), dtype_of(dtype), stride}, {at<float>(h), h_stride});
  }
  void expand_backward(uintptr_t dy, int dtype, int64_t stride, uintptr_t t, int64_t t_stride,
                       uintptr_t h, int64_t h_stride, uintptr_t grad_weights) const {
    const lora::Narrow saved{at<float>(h), h_stride};
    routed_.expand_backward({at<char>(dy), dtype_of(dtype), stride}, {at<float>(t), t_stride},
                            h ? &saved : nullptr, at<float>(grad_weights));
  }
  void gradient_b(uintptr_t dy, int dtype, int64_t stride, uintptr_t h, int64_t h_stride,
                  uintptr_t grad, uintptr_t offsets) const {
    routed_.gradient_b({at<char>(dy), dtype_of(dtype), stride}, {at<float>(h), h_stride},
                       at<char>(grad), at<int64_t>(offsets));
  }
  void gradient_a(uintptr_t x, int dtype, int64_t stride, uintptr_t mask, int64_t mask_stride,
                  uintptr_t t, int64_t t_stride, uintptr_t grad, uintptr_t offsets) const {
    routed_.gradient_a({at<char>(x), dtype_of(dtype), stride}, {at<uint8_t>(mask), mask_stride},
                       {at<float>(t), t_stride}, at<char>(grad), at<int64_t>(offsets));
  }
  void shrink_backward(uintptr_t dx, int dtype, int64_t stride, uintptr_t mask, int64_t mask_stride,
                       uintptr_t t, int64_t t_stride) const {
    routed_.shrink_backward({at<char>(dx), dtype_of(dtype), stride},
                            {at<uint8_t>(mask), mask_stride}, {at<float>(t), t_stride});
  }

 private:
  static std::vector<int64_t> columns_of(const py::sequence& given) {
    std::vector<int64_t> columns;
    for (const py::handle& column : given) columns.push_back(column.cast<int64_t>());
    return columns;
  }

  const std::vector<int64_t> columns_;
  const lora::Routed routed_;
};

#ifdef LORA_KERNELS_CUDA

// A stream is the number of a cudaStream_t, as torch has it.
lora::cuda::Place place_of(int device, uintptr_t stream) { return {device, at<void>(stream)}; }

void cuda_decode_linear(int device, uintptr_t stream, int dtype, int factor_dtype, uintptr_t x,
                        int64_t x_stride, uintptr_t weight, int64_t weight_stride, uintptr_t lora_a,
                        int64_t a_stride, uintptr_t lora_b, int64_t b_stride, uintptr_t bias,
                        uintptr_t scaling_at, double scaling, uintptr_t y, int64_t y_stride,
                        uintptr_t h, int64_t tokens, int64_t in_features, int64_t out_features,
                        int64_t rank) {
  lora::cuda::decode_linear({dtype_of(dtype),  dtype_of(factor_dtype),
                             at<void>(x),      x_stride,
                             at<void>(weight), weight_stride,
                             at<void>(lora_a), a_stride,
                             at<void>(lora_b), b_stride,
                             at<void>(bias),   at<float>(scaling_at),
                             float(scaling),   at<void>(y),
                             y_stride,         at<float>(h),
                             tokens,           in_features,
                             out_features,     rank},
                            place_of(device, stream));
}

void cuda_decode_routed(int device, uintptr_t stream, int dtype, int factor_dtype, uintptr_t x,
                        int64_t x_stride, uintptr_t y, int64_t y_stride, bool overwrite,
                        uintptr_t h, uintptr_t storage, uintptr_t table, uintptr_t scaling,
                        uintptr_t tiles, uintptr_t offsets, uintptr_t pair_tokens,
                        uintptr_t pair_weights, int64_t tokens, int64_t in_features, int64_t width,
                        int64_t num_tiles, int64_t block, const py::sequence& slice_columns) {
  int64_t columns[lora::cuda::MAX_SLICES + 1];
  const int64_t slices = int64_t(slice_columns.size()) - 1;
  for (int64_t s = 0; s <= slices && s <= lora::cuda::MAX_SLICES; ++s) {
    columns[s] = slice_columns[size_t(s)].cast<int64_t>();
  }
  py::gil_scoped_release released;
  lora::cuda::decode_routed({dtype_of(dtype),
                             dtype_of(factor_dtype),
                             at<void>(x),
                             x_stride,
                             at<void>(y),
                             y_stride,
                             overwrite,
                             at<float>(h),
                             at<void>(storage),
                             at<int64_t>(table),
                             at<double>(scaling),
                             at<int32_t>(tiles),
                             at<int32_t>(offsets),
                             at<int32_t>(pair_tokens),
                             at<float>(pair_weights),
                             tokens,
                             in_features,
                             width,
                             num_tiles,
                             block,
                             slices,
                             columns},
                            place_of(device, stream));
}

void cuda_gemm_tail(int device, uintptr_t stream, int dtype, uintptr_t left, int64_t left_stride,
                    uintptr_t right, int64_t right_stride, uintptr_t tail_left,
                    int64_t tail_left_stride, uintptr_t tail_right, int64_t tail_right_stride,
                    bool transposed, uintptr_t out, int64_t out_stride, uintptr_t bias,
                    uintptr_t output_scale, uintptr_t seed, uint32_t threshold, int64_t tokens,
                    int64_t depth, int64_t columns, int64_t rank, int tile_columns, int cluster) {
  lora::cuda::gemm_tail({dtype_of(dtype),
                         at<void>(left),
                         left_stride,
                         at<void>(right),
                         right_stride,
                         at<void>(tail_left),
                         tail_left_stride,
                         at<void>(tail_right),
                         tail_right_stride,
                         transposed,
                         at<void>(out),
                         out_stride,
                         at<void>(bias),
                         at<void>(output_scale),
                         at<int64_t>(seed),
                         threshold,
                         tokens,
                         depth,
                         columns,
                         rank,
                         tile_columns,
                         cluster},
                        place_of(device, stream));
}

#endif  // LORA_KERNELS_CUDA

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of lora_kernels; see lora_kernels/native.py and native_cuda.py.";
  m.def("best_level", &lora::best_level);
  m.def("level", &lora::level);
  m.def("set_level", &lora::set_level);

  typedef py::call_guard<py::gil_scoped_release> Released;
  m.def("draw_mask", &draw_mask, Released());
  m.def("adapter_forward", &adapter_forward, Released());
  m.def("adapter_backward", &adapter_backward, Released());
  // Local, so that a second build of this module may live in the process: tests have one.
  py::class_<Routed>(m, "Routed", py::module_local())
      .def(py::init<uintptr_t, int, uintptr_t, uintptr_t, uintptr_t, const py::sequence&, int64_t,
                    uintptr_t, int64_t, uintptr_t, uintptr_t, int>())
      .def("draw_mask", &Routed::draw_mask, Released())
      .def("shrink", &Routed::shrink, Released())
      .def("expand", &Routed::expand, Released())
      .def("expand_backward", &Routed::expand_backward, Released())
      .def("gradient_b", &Routed::gradient_b, Released())
      .def("gradient_a", &Routed::gradient_a, Released())
      .def("shrink_backward", &Routed::shrink_backward, Released());

#if defined(LORA_EMULATE)
  m.attr("cuda_built_for") = "emulated";
#elif defined(LORA_KERNELS_CUDA)
  m.attr("cuda_built_for") = LORA_KERNELS_CUDA;
#else
  m.attr("cuda_built_for") = "";
#endif
#ifdef LORA_KERNELS_CUDA
  m.def("cuda_decode_linear", &cuda_decode_linear, Released());
  m.def("cuda_decode_routed", &cuda_decode_routed);
  m.def("cuda_gemm_tail", &cuda_gemm_tail, Released());
#endif
}
