// Gradients where autograd left them: their addresses, read through the C functions that torch offers for DLPack
// exchange.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace cts {

// Fetches what torch reads when it advances the versions of these tensors.
void prefetch_tensors(const pybind11::tuple& tensors);

// Whether two lists hold the very same objects in one order.
bool same_objects(const pybind11::list& a, const pybind11::list& b);

// Where a tensor says that its values are not what its memory holds: bits of one word of its TensorImpl. No bits: it
// has to be asked.
struct LazyBits {
  size_t word = 0;
  uintptr_t bits = 0;
};

// The addresses of the gradients of a list of parameters of one device and dtype; works for any device. It keeps no
// tensor alive: the parameters come with every call.
class GradientTable {
 public:
  // addresses: where each parameter's own data has to be, 0 for empty ones. layouts[i]: (shape, strides) of param i.
  // like: a tensor of the dtype and device that gradients must have. negated: any with torch's lazy minus, of one
  // dimension, not empty. Raises RuntimeError where torch offers no exchange functions.
  GradientTable(const std::vector<uintptr_t>& addresses, const std::vector<pybind11::tuple>& layouts,
                pybind11::object like, pybind11::object negated);

  // Reads every gradient: `.grad` of the parameters, or the entries of a list that is given in their place. Returns
  // (gradients, count, odd, moved): a list of tensors or None, how many are tensors, the entries that are not plain
  // dense tensors in their parameter's layout (null in the table), and the parameters that are not where they should
  // be.
  pybind11::tuple collect(const pybind11::list& params, const pybind11::object& given);

  void enter(size_t i, uintptr_t address);

  const void* const* data() const { return pointers_.data(); }

 private:
  struct Layout {
    std::vector<int64_t> shape, strides;

    bool fits(int32_t ndim, const int64_t* sizes, const int64_t* steps) const;
    bool operator==(const Layout& other) const { return shape == other.shape && strides == other.strides; }
  };

  struct Seen {  // where the last gradient's tensor object and TensorImpl were: prefetched and never read
    uintptr_t object, impl;
  };

  const Layout& layout(size_t i) const { return layouts_[layout_of_[i]]; }
  void prefetch_for(const pybind11::list& params, size_t i) const;
  bool is_plain(PyObject* gradient, size_t i, const void** data) const;
  bool is_lazy(PyObject* gradient) const;

  std::vector<uintptr_t> addresses_;
  std::vector<Layout> layouts_;  // replicas, one after another, share one: few enough for the first cache
  std::vector<uint32_t> layout_of_;
  std::vector<const void*> pointers_;
  std::vector<Seen> last_;
  pybind11::object tensor_type_, name_, is_neg_;
  const void* exchange_;
  size_t impl_;  // word of a tensor's object
  LazyBits lazy_;
  int device_type_, device_id_, type_code_, type_bits_;
};

}  // namespace cts
