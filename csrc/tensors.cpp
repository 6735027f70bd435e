#include "tensors.h"

namespace py = pybind11;

namespace lora {
namespace {

// DLPack 1.3's binary interface (https://dmlc.github.io/dlpack), as far as it is used here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeTable {
  uint32_t major, minor;
  ExchangeTable* older;
  void *allocate, *export_managed, *import_managed;
  int (*read)(void* object, DLTensor* out);  // may be absent
  void* current_stream;
};
constexpr int32_t CPU = 1;
constexpr uint8_t FLOAT = 2, BFLOAT = 4, UNSIGNED = 1;

// What is needed of torch. Kept for the life of the process: the interpreter may be gone when
// statics are destroyed.
struct Torch {
  py::object tensor, dtypes[4];
  const ExchangeTable* table = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor");
    int number = 0;
    for (const char* name : {"float32", "bfloat16", "float16", "uint8"})
      dtypes[number++] = torch.attr(name);
    const py::object table_of = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (table_of.is_none()) return;
    const void* found = PyCapsule_GetPointer(table_of.ptr(), "dlpack_exchange_api");
    if (!found) throw py::error_already_set();
    table = static_cast<const ExchangeTable*>(found);
    while (table && table->major != 1) table = table->older;
    if (table && !table->read) table = nullptr;
  }
};

// Not a static of the function: its initialisation would hold a lock while Python may give up its
// own.
const Torch* known = nullptr;
bool table_is_ignored = false;

const Torch& torch() {
  if (!known) known = new Torch;
  return *known;
}

// An index of `dtypes`; -1 for what is none of them.
int number_of(const DLTensor& t) {
  if (t.type_lanes != 1) return -1;
  if (t.type_code == FLOAT && t.type_bits == 32) return 0;
  if (t.type_code == BFLOAT && t.type_bits == 16) return 1;
  if (t.type_code == FLOAT && t.type_bits == 16) return 2;
  return t.type_code == UNSIGNED && t.type_bits == 8 ? 3 : -1;
}

}  // namespace

bool ignore_table(bool ignored) {
  table_is_ignored = ignored;
  return torch().table;
}

bool Tensor::read_any(py::handle object) {
  const bool by_table = torch().table && !table_is_ignored;
  if (!PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(torch().tensor.ptr())))
    return false;
  if (!(by_table ? read_table(object) : read_properties(object))) return false;
  numel = 1;
  for (int64_t i = 0; i < ndim; i++) numel *= sizes_[i];
  return numel == 0 || has_memory(object);
}

// The storage may have been freed; what is left is then its offset.
bool Tensor::has_memory(py::handle object) const {
  constexpr uintptr_t lowest = uintptr_t(1) << 40;  // where allocations begin, nearly everywhere
  if (reinterpret_cast<uintptr_t>(data) >= lowest) return true;
  return data && object.attr("untyped_storage")().attr("nbytes")().cast<int64_t>() > 0;
}

bool Tensor::read_table(py::handle object) {
  DLTensor t;
  if (torch().table->read(object.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  data = static_cast<char*>(t.data) + (t.data ? t.byte_offset : 0);
  number_ = number_of(t);
  ndim = t.ndim;
  sizes_ = t.shape;
  strides_ = t.strides;
  return t.device_type == CPU && number_ >= 0;
}

bool Tensor::read_properties(py::handle object) try {
  if (!object.attr("is_cpu").cast<bool>()) return false;
  const py::object dtype = object.attr("dtype");
  const py::tuple shape = object.attr("shape"), strides = object.attr("stride")();
  for (number_ = 0; number_ <= BYTES && torch().dtypes[number_].ptr() != dtype.ptr();) number_++;
  ndim = int64_t(shape.size());
  if (number_ > BYTES || ndim > MOST) return false;
  for (int64_t i = 0; i < ndim; i++) {
    copied_[i] = shape[size_t(i)].cast<int64_t>();
    copied_[MOST + i] = strides[size_t(i)].cast<int64_t>();
  }
  sizes_ = copied_;
  strides_ = copied_ + MOST;
  data = reinterpret_cast<char*>(object.attr("data_ptr")().cast<uintptr_t>());
  return true;
} catch (const std::exception&) {  // no dense memory: sparse, nested, a transform's wrapper
  return false;
}

bool Tensor::contiguous() const {
  if (numel == 0) return true;
  int64_t expected = 1;
  bool unit = false;
  for (int64_t i = ndim - 1; i >= 0; i--) {
    if (sizes_[i] != 1 && strides_[i] != expected) return false;
    expected *= sizes_[i];
    unit |= strides_[i] == 1;
  }
  return unit;
}

}  // namespace lora
