#include "python/gradients.h"

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
  if (api->header.major != 1 || !api->describe)
    throw std::runtime_error("this torch offers another version of DLPack's exchange functions");
  return api;
}

// Torch's objects are cold after a training step, and one leads to the next: tensor object, TensorImpl, then storage,
// version counter and autograd's metadata, then the gradient. So a parameter is worked on in stages, this many
// parameters before its gradient is read (and, for kCheck, after it). What is prefetched may be wrong or gone; what is
// read belongs to a live object.
constexpr size_t kObject = 24, kImpl = 16, kParts = 8, kCheck = 4;
constexpr size_t kFirstPart = 2, kLastPart = 5;  // words of a TensorImpl that lead on, in every torch so far

uintptr_t word(uintptr_t object, size_t i) { return reinterpret_cast<const uintptr_t*>(object)[i]; }

void prefetch(uintptr_t address, int lines) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const void*>(address + 64 * i));
}

uintptr_t address(const DLTensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset; }

// Which word of a tensor's Python object is the address of its TensorImpl; 0 if none: then nothing is read there.
size_t find_impl(py::handle tensor) {
  const auto impl = tensor.attr("_cdata").cast<uintptr_t>(), object = reinterpret_cast<uintptr_t>(tensor.ptr());
  const size_t words = size_t(Py_TYPE(tensor.ptr())->tp_basicsize) / sizeof(uintptr_t);
  for (size_t i = 1; i < words; ++i)
    if (word(object, i) == impl) return i;
  return 0;
}

// Tensors that have a bit and others that lack it, as alike as possible otherwise.
struct Samples {
  py::list with, without;
  unsigned pairs = 0;

  // The tensor with another dimension or two, each in a pair of views that were made in the same way: two or three lazy
  // minuses. In either order, so that no bit of an address tells one from the other.
  void add(py::object tensor) {
    for (int dims = 0; dims < 4; ++dims, ++pairs, tensor = tensor.attr("unsqueeze")(0)) {
      for (int i = 0; i < 2; ++i) {
        const bool odd = (__builtin_popcount(pairs) + i) % 2;
        py::object view = tensor.attr("_neg_view")().attr("_neg_view")();
        odd ? with.append(view.attr("_neg_view")()) : without.append(view);
      }
    }
  }

  // The bits of word i of a TensorImpl that all of `with` have and none of `without`.
  uintptr_t bits(size_t impl, size_t i) const {
    uintptr_t all = ~uintptr_t(0), any = 0;
    for (py::handle tensor : with) all &= word(word(reinterpret_cast<uintptr_t>(tensor.ptr()), impl), i);
    for (py::handle tensor : without) any |= word(word(reinterpret_cast<uintptr_t>(tensor.ptr()), impl), i);
    return all & ~any;
  }
};

bool is_one_bit(uintptr_t bits) { return bits && !(bits & (bits - 1)); }

// Torch's key set, in which every lazy operation has a bit, is found by what a minus changes. It is the last word in
// every torch so far, so nothing behind it is read. impl: as `find_impl` says.
LazyBits find_lazy_bits(size_t impl, py::object like, py::object negated) {
  constexpr size_t kLastWord = 23;
  if (!impl) return {};
  const py::object plain = negated.attr("resolve_neg")();
  Samples samples;
  for (const py::object& one : {like, plain, py::object(plain[py::int_(0)])})
    samples.add(one), samples.without.append(one);
  for (const py::object& one : {negated, py::object(negated[py::int_(0)])}) samples.with.append(one);
  size_t i = kLastPart + 1;
  while (i < kLastWord && !samples.bits(impl, i)) ++i;
  LazyBits found{i, samples.bits(impl, i)};
  if (!is_one_bit(found.bits)) return {};
  // zeros without memory: their views may have an address that is not null
  Samples zeros;
  zeros.without.append(plain);
  const auto make = py::module_::import("torch").attr("_efficientzerotensor");
  zeros.with.append(
      make(plain.attr("shape"), py::arg("dtype") = plain.attr("dtype"), py::arg("device") = plain.attr("device")));
  if (const uintptr_t bits = zeros.bits(impl, i); is_one_bit(bits)) found.bits |= bits;
  return found;
}

}  // namespace

bool same_objects(const py::list& a, const py::list& b) {
  const Py_ssize_t count = PyList_GET_SIZE(a.ptr());
  if (count != PyList_GET_SIZE(b.ptr())) return false;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  return true;
}

void prefetch_tensors(const py::tuple& tensors) {
  const size_t count = tensors.size(), impl = count ? find_impl(tensors[0]) : 0;
  if (!impl) return;
  const auto object = [&](size_t i) {
    return reinterpret_cast<uintptr_t>(PyTuple_GET_ITEM(tensors.ptr(), Py_ssize_t(i)));
  };
  constexpr size_t kHop = kImpl - kParts;  // from a tensor object to its TensorImpl, and on from there
  for (size_t i = 0; i < count + 2 * kHop; ++i) {
    if (i < count) prefetch(object(i), 1);
    if (i >= kHop && i - kHop < count) prefetch(word(object(i - kHop), impl), 3);
    if (i < 2 * kHop) continue;
    for (size_t part = kFirstPart; part <= kLastPart; ++part) prefetch(word(word(object(i - 2 * kHop), impl), part), 1);
  }
}

GradientTable::GradientTable(const std::vector<uintptr_t>& addresses, const std::vector<py::tuple>& layouts,
                             py::object like, py::object negated)
    : addresses_(addresses),
      pointers_(addresses.size()),
      last_(addresses.size()),
      name_(py::str("grad")),
      is_neg_(py::str("is_neg")) {
  if (layouts.size() != addresses.size()) throw std::invalid_argument("one address and one layout for each parameter");
  for (const py::tuple& given : layouts) {
    const Layout layout{given[0].cast<std::vector<int64_t>>(), given[1].cast<std::vector<int64_t>>()};
    if (layouts_.empty() || !(layouts_.back() == layout)) layouts_.push_back(layout);
    layout_of_.push_back(uint32_t(layouts_.size() - 1));
  }
  tensor_type_ = py::type::of(like);
  impl_ = find_impl(like);
  lazy_ = find_lazy_bits(impl_, like, negated);
  const ExchangeApi* api = exchange_api(tensor_type_);
  exchange_ = api;
  DLTensor described;
  if (api->describe(like.ptr(), &described)) throw py::error_already_set();
  device_type_ = described.device_type, device_id_ = described.device_id;
  type_code_ = described.type_code, type_bits_ = described.type_bits;
}

void GradientTable::prefetch_for(const py::list& params, size_t i) const {
  const size_t count = pointers_.size();
  const auto param = [&](size_t j) {
    return reinterpret_cast<uintptr_t>(PyList_GET_ITEM(params.ptr(), Py_ssize_t(j)));
  };
  if (i + kObject < count) prefetch(param(i + kObject), 1);
  if (i + kImpl < count) {
    prefetch(word(param(i + kImpl), impl_), 3);
    prefetch(last_[i + kImpl].object, 1);
    prefetch(last_[i + kImpl].impl, 3);
  }
  if (i + kParts < count)
    for (size_t part = kFirstPart; part <= kLastPart; ++part) prefetch(word(word(param(i + kParts), impl_), part), 2);
}

bool GradientTable::is_plain(PyObject* gradient, size_t i, const void** data) const {
  const auto describe = static_cast<const ExchangeApi*>(exchange_)->describe;
  DLTensor found;
  if (Py_TYPE(gradient) != reinterpret_cast<PyTypeObject*>(tensor_type_.ptr())) return false;
  if (describe(gradient, &found)) {  // sparse, or of a kind that DLPack does not know
    PyErr_Clear();
    return false;
  }
  *data = reinterpret_cast<const void*>(address(found));
  return found.type_code == type_code_ && found.type_bits == type_bits_ && found.device_type == device_type_ &&
         found.device_id == device_id_ && layout(i).fits(found.ndim, found.shape, found.strides) &&
         (*data || !addresses_[i]) && !is_lazy(gradient);
}

// Whether its values are others than what lies in its memory.
bool GradientTable::is_lazy(PyObject* gradient) const {
  if (lazy_.bits) return word(word(reinterpret_cast<uintptr_t>(gradient), impl_), lazy_.word) & lazy_.bits;
  return py::handle(gradient).attr(is_neg_)().cast<bool>();
}

bool GradientTable::Layout::fits(int32_t ndim, const int64_t* sizes, const int64_t* steps) const {
  if (ndim != int32_t(shape.size())) return false;
  for (size_t d = 0; d < shape.size(); ++d)
    if (sizes[d] != shape[d] || (shape[d] > 1 && steps[d] != strides[d])) return false;
  return true;
}

py::tuple GradientTable::collect(const py::list& params, const py::object& given) {
  if (params.size() != pointers_.size()) throw std::invalid_argument("one address for each parameter");
  if (!given.is_none() && (!py::isinstance<py::list>(given) || py::len(given) != pointers_.size()))
    throw std::invalid_argument("one gradient or None for each parameter, in a list");
  const auto describe = static_cast<const ExchangeApi*>(exchange_)->describe;
  py::list odd, moved;
  const size_t count = pointers_.size();
  size_t present = 0;
  auto gradients = py::reinterpret_steal<py::list>(PyList_New(Py_ssize_t(count)));
  for (size_t step = 0; step < count + kCheck; ++step) {
    if (step < count) {
      if (impl_) prefetch_for(params, step);
      PyObject* gradient = given.is_none()
                               ? PyObject_GetAttr(PyList_GET_ITEM(params.ptr(), Py_ssize_t(step)), name_.ptr())
                               : Py_NewRef(PyList_GET_ITEM(given.ptr(), Py_ssize_t(step)));
      if (!gradient) throw py::error_already_set();
      PyList_SET_ITEM(gradients.ptr(), Py_ssize_t(step), gradient);  // the list owns it now
      if (impl_ && Py_TYPE(gradient) == reinterpret_cast<PyTypeObject*>(tensor_type_.ptr())) {
        const auto object = reinterpret_cast<uintptr_t>(gradient);
        last_[step] = {object, word(object, impl_)};
        prefetch(word(last_[step].impl, kFirstPart), 2);
      }
    }
    if (step < kCheck) continue;
    const size_t i = step - kCheck;
    PyObject *param = PyList_GET_ITEM(params.ptr(), Py_ssize_t(i)),
             *gradient = PyList_GET_ITEM(gradients.ptr(), Py_ssize_t(i));
    const void* data = nullptr;
    if (gradient != Py_None) {
      ++present;
      if (!is_plain(gradient, i, &data)) data = nullptr, odd.append(i);
    }
    pointers_[i] = data;
    if (!addresses_[i]) continue;
    DLTensor found;
    if (describe(param, &found)) throw py::error_already_set();
    if (address(found) != addresses_[i] || !layout(i).fits(found.ndim, found.shape, found.strides)) moved.append(i);
  }
  return py::make_tuple(gradients, present, odd, moved);
}

void GradientTable::enter(size_t i, uintptr_t address) { pointers_.at(i) = reinterpret_cast<const void*>(address); }

}  // namespace cts
