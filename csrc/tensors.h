// Torch's tensors as the kernels take them, without torch's headers: through the table of C
// functions that newer versions publish for DLPack, which reads a tensor in less time than Python
// takes for one of its properties; without it, through those properties.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/tasks.h"

namespace lora {

// For tests: reads as if torch had no table. Says whether it has one.
bool ignore_table(bool ignored);

// A dense tensor in the CPU's memory. Nothing here keeps it alive.
class Tensor {
 public:
  // False for anything but a dense torch.Tensor that is no wrapper (a transform's, a lazy zero) and
  // of a dtype of ours; never raises.
  bool read(pybind11::handle object) { return read_any(object) && number_ < BYTES; }
  bool read_bytes(pybind11::handle object) { return read_any(object) && number_ == BYTES; }

  char* data = nullptr;
  int64_t ndim = 0, numel = 0;

  DType dtype() const { return static_cast<DType>(number_); }

  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }

  // Below, some stride has to be 1 even where it means nothing: torch's lazily negated tensors are
  // every other number of complex ones, and nothing else tells them apart here.
  bool contiguous() const;
  // [..., D] as [M, D], unit stride in D and `pitch` from row to row, if it lies like that.
  bool has_rows() const {
    return ndim > 0 && columns() > 0 && (contiguous() || (ndim == 2 && strides_[1] == 1));
  }
  int64_t columns() const { return sizes_[ndim - 1]; }
  int64_t rows() const { return numel / columns(); }
  int64_t pitch() const { return contiguous() ? columns() : strides_[0]; }

  bool is_shape(int64_t m, int64_t d) const {
    return ndim == 2 && sizes_[0] == m && sizes_[1] == d;
  }
  // [., .] with unit stride in one dimension.
  bool is_matrix() const {
    return ndim == 2 && numel > 0 && (strides_[0] == 1 || strides_[1] == 1);
  }

 private:
  static constexpr int64_t MOST = 8;  // dimensions that are read without torch's table
  static constexpr int BYTES = 3;     // after the numbers of DType

  bool read_any(pybind11::handle object);
  bool has_memory(pybind11::handle object) const;
  bool read_table(pybind11::handle object);
  bool read_properties(pybind11::handle object);

  int number_ = 0;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;
  int64_t copied_[2 * MOST];
};

}  // namespace lora
