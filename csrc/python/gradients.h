// Gradients where autograd left them: their addresses, read through the C functions that torch offers for DLPack
// exchange.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace cts {

// Fetches what torch reads when it advances the versions of these tensors.
void prefetch_tensors(const pybind11::tuple& tensors);

// The addresses of the gradients of a list of parameters of one device and dtype; works for any device.
class GradientTable {
 public:
  // params: torch tensors. addresses: where each one's own data has to be, 0 for empty ones. layouts[i]: (shape,
  // strides) of param i. like: a tensor of the dtype and device that gradients must have. Raises RuntimeError where
  // torch offers no exchange functions.
  GradientTable(pybind11::list params, const std::vector<uintptr_t>& addresses,
                const std::vector<pybind11::tuple>& layouts, pybind11::object like);

  // Reads every gradient: `.grad` of the parameters, or the entries of a list that is given in their place. Returns
  // (gradients, count, changed, odd, moved): a list of tensors or None, how many are tensors, whether an address is
  // another than the last time, the entries that are not plain dense tensors in their parameter's layout (null in the
  // table), and the parameters that are not where they should be.
  pybind11::tuple collect(const pybind11::object& given);

  void set(size_t i, uintptr_t address);

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
  void prefetch_for(size_t i) const;
  bool is_plain(PyObject* gradient, size_t i, const void** data) const;
  bool negated(PyObject* gradient, const Layout& layout) const;

  pybind11::list params_;
  std::vector<uintptr_t> addresses_;
  std::vector<Layout> layouts_;  // replicas, one after another, share one: few enough for the first cache
  std::vector<uint32_t> layout_of_;
  std::vector<const void*> pointers_;
  std::vector<Seen> last_;
  pybind11::object tensor_type_, name_, is_neg_;
  const void* exchange_;
  size_t impl_;
  int device_type_, device_id_, type_code_, type_bits_;
};

}  // namespace cts
