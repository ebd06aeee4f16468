#include "gradients.h"

#include <pybind11/stl.h>

#include <stdexcept>

namespace py = pybind11;

namespace cts {
namespace {

// The parts of DLPack 1.3's C ABI that are used here (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void *allocate, *to_managed, *from_managed;
  int (*describe)(void* py_object, DLTensor* out);  // borrowed: valid until control returns to torch
  void* current_stream;
};

const ExchangeApi* exchange_api(py::handle tensor_type) {
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__"))
    throw std::runtime_error("this torch does not offer __dlpack_c_exchange_api__");
  py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.major != 1 || !api->describe) throw std::runtime_error("this torch offers another version of DLPack's exchange functions");
  return api;
}

constexpr size_t kHintDistance = 6;  // parameters ahead

// Asks for `lines` cache lines from wherever `address` is; any address will do.
void prefetch(uintptr_t address, int lines) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const void*>(address + 64 * i));
}

uintptr_t address(const DLTensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset; }

}  // namespace

GradientTable::GradientTable(py::list params, const std::vector<uintptr_t>& addresses, const std::vector<py::tuple>& layouts,
                             py::object like)
    : params_(params), addresses_(addresses), pointers_(addresses.size()), name_(py::str("grad")) {
  if (params.size() != addresses.size() || params.size() != layouts.size())
    throw std::invalid_argument("one address and one layout for each parameter");
  for (const py::tuple& layout : layouts)
    layouts_.push_back({layout[0].cast<std::vector<int64_t>>(), layout[1].cast<std::vector<int64_t>>()});
  for (py::handle param : params)
    hints_.push_back({param.attr("_cdata").cast<uintptr_t>(), param.attr("untyped_storage")().attr("_cdata").cast<uintptr_t>(), 0, 0});
  tensor_type_ = py::type::of(like);
  const ExchangeApi* api = exchange_api(tensor_type_);
  exchange_ = api;
  DLTensor described;
  if (api->describe(like.ptr(), &described)) throw py::error_already_set();
  device_type_ = described.device_type, device_id_ = described.device_id;
  type_code_ = described.type_code, type_bits_ = described.type_bits;
}

py::tuple GradientTable::collect() {
  const auto describe = static_cast<const ExchangeApi*>(exchange_)->describe;
  py::list odd, moved;
  const size_t count = pointers_.size();
  size_t present = 0;
  auto gradients = py::reinterpret_steal<py::list>(PyList_New(Py_ssize_t(count)));
  bool changed = false;
  for (size_t i = 0; i < count; ++i) {
    if (i + kHintDistance < count) {
      const Hint& hint = hints_[i + kHintDistance];
      prefetch(reinterpret_cast<uintptr_t>(PyList_GET_ITEM(params_.ptr(), i + kHintDistance)), 1);
      prefetch(hint.param, 3);
      prefetch(hint.param_storage, 2);
      prefetch(hint.gradient, 1);
      prefetch(hint.gradient_sizes - 64, 3);
    }
    PyObject* param = PyList_GET_ITEM(params_.ptr(), i);
    PyObject* gradient = PyObject_GetAttr(param, name_.ptr());
    if (!gradient) throw py::error_already_set();
    PyList_SET_ITEM(gradients.ptr(), Py_ssize_t(i), gradient);  // the list owns it now
    DLTensor described;
    const void* pointer = nullptr;
    if (gradient != Py_None) {
      ++present;
      bool plain = Py_TYPE(gradient) == reinterpret_cast<PyTypeObject*>(tensor_type_.ptr());
      if (plain && describe(gradient, &described)) {  // sparse, or of a kind that DLPack does not know
        PyErr_Clear();
        plain = false;
      }
      const Layout& layout = layouts_[i];
      plain = plain && described.type_code == type_code_ && described.type_bits == type_bits_ && described.device_type == device_type_ &&
              described.device_id == device_id_ && described.ndim == int32_t(layout.shape.size());
      for (size_t d = 0; plain && d < layout.shape.size(); ++d)
        plain = described.shape[d] == layout.shape[d] && (layout.shape[d] < 2 || described.strides[d] == layout.strides[d]);
      if (plain) {
        pointer = reinterpret_cast<const void*>(address(described));
        hints_[i].gradient = reinterpret_cast<uintptr_t>(gradient);
        hints_[i].gradient_sizes = reinterpret_cast<uintptr_t>(described.shape);
      }
      else odd.append(i);
    }
    changed |= pointers_[i] != pointer;
    pointers_[i] = pointer;
    if (!addresses_[i]) continue;
    if (describe(param, &described)) throw py::error_already_set();
    if (address(described) != addresses_[i]) moved.append(i);
  }
  return py::make_tuple(gradients, present, changed, odd, moved);
}

void GradientTable::set(size_t i, uintptr_t address) {
  pointers_.at(i) = reinterpret_cast<const void*>(address);
}

}  // namespace cts
