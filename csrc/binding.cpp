// What Python calls. The operation that a training step repeats most takes tensors (tensors.h), and
// reads and checks them itself. The others take addresses, sizes and strides in elements and dtypes
// as the numbers of lora::DType, into which lora_kernels/runtime/cpu_extension.py and
// cuda_extension.py turn tensors they have checked; absent tensors are address 0. The lock is
// released while a kernel runs.
//
// LORA_KERNELS_CUDA: with the CUDA kernels; its text says what for.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/adapter.h"
#include "cpu/linear.h"
#include "cpu/routed.h"
#include "cpu/tasks.h"
#ifdef LORA_KERNELS_CUDA
#include "cuda/kernels.h"
#endif
#include "tensors.h"

namespace py = pybind11;
using lora::DType;
using lora::Tensor;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int number) { return static_cast<DType>(number); }

// The mask of an activation whose first group the generator knows as `first_group`, and whose rows
// are `groups_per_row` apart there.
void draw_mask(uintptr_t out, int64_t stride, uint64_t first_group, uint64_t groups_per_row,
               int64_t rows, int64_t columns, int64_t seed, uint32_t stream, uint32_t threshold,
               int threads) {
  lora::draw_mask(at<uint8_t>(out), stride, {first_group, groups_per_row}, rows, columns,
                  uint64_t(seed), stream, threshold, threads);
}

// Of what was not read, nothing.
lora::Wide wide_of(const Tensor& t) {
  return {t.data, t.dtype(), t.data ? t.pitch() : 0, nullptr, 0};
}
lora::Narrow narrow_of(const Tensor& t) {
  return {at<float>(uintptr_t(t.data)), t.data ? t.pitch() : 0};
}
// A [R, K] and B [N, R], or what has their shapes.
lora::Factor down_of(const Tensor& t) {
  return {t.data, t.dtype(), t.data ? t.stride(0) : 0, t.data ? t.stride(1) : 0};
}
lora::Factor up_of(const Tensor& t) {
  const lora::Factor turned = down_of(t);
  return {turned.data, turned.dtype, turned.column_stride, turned.rank_stride};
}

bool read_matrix(Tensor& t, py::handle object) { return t.read(object) && t.is_matrix(); }

bool read_rows(Tensor& t, py::handle object, DType dtype, int64_t rows, int64_t columns) {
  return t.read(object) && t.has_rows() && t.dtype() == dtype && t.columns() == columns &&
         t.rows() == rows;
}

// None keeps everything.
bool read_mask(lora::Mask& mask, py::handle object, int64_t rows, int64_t columns) {
  mask = {nullptr, (columns + 7) / 8};
  Tensor t;
  if (object.is_none()) return true;
  if (!t.read_bytes(object) || !t.contiguous() || !t.is_shape(rows, mask.stride)) return false;
  mask.bits = at<uint8_t>(uintptr_t(t.data));
  return true;
}

// y [..., N] += s h B^T (or y = ...) with h [M, R] and the mask, which are written first; h is kept
// nowhere if it is None. False, and nothing is written, where a tensor is not as the kernels take
// it.
bool adapter_forward(py::handle y, py::handle x, py::handle a, py::handle b, py::handle h,
                     py::handle mask, double h_scale, double scaling, uint64_t first_group,
                     uint64_t groups_per_row, int64_t seed, uint32_t threshold, bool add,
                     int threads) {
  Tensor in, out, down, up, narrow;
  lora::Mask kept;
  if (!read_matrix(down, a) || !read_matrix(up, b) || !in.read(x)) return false;
  const int64_t rank = down.size(0), in_columns = down.size(1), out_columns = up.size(0);
  const int64_t rows = in.numel / in_columns;
  if (up.size(1) != rank || !read_rows(in, x, in.dtype(), rows, in_columns) ||
      !read_rows(out, y, in.dtype(), rows, out_columns) || !read_mask(kept, mask, rows, in_columns))
    return false;
  if (!h.is_none() && !read_rows(narrow, h, DType::f32, rows, rank)) return false;
  const std::unique_ptr<float[]> scratch(h.is_none() ? new float[rows * rank] : nullptr);
  const lora::Narrow product = h.is_none() ? lora::Narrow{scratch.get(), rank} : narrow_of(narrow);

  py::gil_scoped_release released;
  lora::adapter_forward(
      {const_cast<uint8_t*>(kept.bits),
       kept.stride,
       {first_group, groups_per_row},
       uint64_t(seed),
       threshold},
      {wide_of(in), kept, down_of(down), product, float(h_scale), in_columns, 0, 0, 0, 0},
      {wide_of(out),
       {nullptr, 0},
       up_of(up),
       product,
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
  return true;
}

// dx [..., K] += keep * (t A) (or dx = ...), grad_a = t^T (keep * x), grad_b = s dy^T h, where
// t = t_scale dy B; without what is None. False as above.
bool adapter_backward(py::handle dx, py::handle grad_a, py::handle grad_b, py::handle dy,
                      py::handle x, py::handle a, py::handle b, py::handle h, py::handle mask,
                      double t_scale, double scaling, bool add, int threads) {
  Tensor wide_dx, wide_dy, wide_x, into_a, into_b, down, up, narrow;
  lora::Mask kept;
  if (!read_matrix(down, a) || !read_matrix(up, b) || !wide_dy.read(dy)) return false;
  const int64_t rank = down.size(0), in_columns = down.size(1), out_columns = up.size(0);
  const int64_t rows = wide_dy.numel / out_columns;
  const DType dtype = wide_dy.dtype();
  if (up.size(1) != rank || !read_rows(wide_dy, dy, dtype, rows, out_columns) ||
      !read_mask(kept, mask, rows, in_columns))
    return false;
  if (!dx.is_none() && !read_rows(wide_dx, dx, dtype, rows, in_columns)) return false;
  if (!grad_a.is_none() && !(read_rows(wide_x, x, dtype, rows, in_columns) &&
                             read_matrix(into_a, grad_a) && into_a.is_shape(rank, in_columns)))
    return false;
  if (!grad_b.is_none() && !(read_rows(narrow, h, DType::f32, rows, rank) &&
                             read_matrix(into_b, grad_b) && into_b.is_shape(out_columns, rank)))
    return false;

  const lora::Factor at_b = up_of(into_b), at_a = down_of(into_a);
  const lora::Narrow none{nullptr, 0};
  py::gil_scoped_release released;
  lora::adapter_backward(
      {{wide_of(wide_dy), {nullptr, 0}, up_of(up), none, float(t_scale), out_columns, 0, 0, 0, 0},
       {wide_of(wide_dy),
        {nullptr, 0},
        narrow_of(narrow),
        nullptr,
        float(scaling),
        into_b.data,
        at_b.dtype,
        at_b.rank_stride,
        at_b.column_stride,
        rank,
        rows,
        0,
        0},
       {wide_of(wide_x), kept, none, nullptr, 1.0f, into_a.data, at_a.dtype, at_a.rank_stride,
        at_a.column_stride, rank, rows, 0, 0},
       {wide_of(wide_dx), kept, down_of(down), none, nullptr, 1.0f, 1.0f, add, rank, 0, 0, 0, 0}},
      rows, in_columns, out_columns, threads);
  return true;
}

// A bank and a routing, as long as their tensors live.
class Routed {
 public:
  Routed(uintptr_t storage, int64_t numel, int dtype, uintptr_t table, int64_t slots, int64_t width,
         uintptr_t scaling, uintptr_t thresholds, const py::sequence& slice_columns,
         int64_t in_features, uintptr_t plan, int64_t groups, uintptr_t tokens, int64_t pairs,
         uintptr_t weights, int threads)
      : columns_(columns_of(slice_columns)),
        routed_({at<char>(storage), numel, dtype_of(dtype), at<int64_t>(table), slots, width,
                 at<double>(scaling), at<int32_t>(thresholds), int64_t(columns_.size()) - 1,
                 columns_.data(), in_features},
                {at<int64_t>(plan), groups, at<int32_t>(tokens), pairs, at<float>(weights)},
                threads) {}
  Routed(const Routed&) = delete;

  void draw_mask(uintptr_t mask, int64_t stride, uint64_t first_group, uint64_t groups_per_row,
                 int64_t seed) const {
    routed_.draw_mask(at<uint8_t>(mask), stride, {first_group, groups_per_row}, uint64_t(seed));
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
                  uintptr_t grad, int64_t numel, uintptr_t offsets) const {
    routed_.gradient_b({at<char>(dy), dtype_of(dtype), stride}, {at<float>(h), h_stride},
                       {at<char>(grad), numel, at<int64_t>(offsets)});
  }
  void gradient_a(uintptr_t x, int dtype, int64_t stride, uintptr_t mask, int64_t mask_stride,
                  uintptr_t t, int64_t t_stride, uintptr_t grad, int64_t numel,
                  uintptr_t offsets) const {
    routed_.gradient_a({at<char>(x), dtype_of(dtype), stride}, {at<uint8_t>(mask), mask_stride},
                       {at<float>(t), t_stride}, {at<char>(grad), numel, at<int64_t>(offsets)});
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
                    uintptr_t output_scale, uintptr_t seed, uint32_t threshold,
                    uint64_t first_group, uint64_t groups_per_row, int64_t tokens, int64_t depth,
                    int64_t columns, int64_t rank, int tile_columns, int cluster) {
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
                         first_group,
                         groups_per_row,
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
  m.doc() =
      "Compiled kernels of lora_kernels; see lora_kernels/runtime/cpu_extension.py and "
      "cuda_extension.py.";
  m.def("best_level", &lora::best_level);
  m.def("level", &lora::level);
  m.def("set_level", &lora::set_level);

  typedef py::call_guard<py::gil_scoped_release> Released;
  m.def("draw_mask", &draw_mask, Released());
  m.def("ignore_table", &lora::ignore_table);
  m.def("adapter_forward", &adapter_forward);
  m.def("adapter_backward", &adapter_backward);
  // Local, so that a second build of this module may live in the process: tests have one.
  py::class_<Routed>(m, "Routed", py::module_local())
      .def(py::init<uintptr_t, int64_t, int, uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t,
                    const py::sequence&, int64_t, uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t,
                    int>())
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
  m.attr("cuda_max_slices") = lora::cuda::MAX_SLICES;
  m.def("cuda_decode_linear", &cuda_decode_linear, Released());
  m.def("cuda_decode_routed", &cuda_decode_routed);
  m.def("cuda_gemm_tail", &cuda_gemm_tail, Released());
#endif
}
