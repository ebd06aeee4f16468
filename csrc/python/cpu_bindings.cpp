// The Python module cts_fast._cpu: raw addresses and numbers in, no logic. cts_fast/engine/backends/cpu.py and
// cts_fast/engine/gradients.py use it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "cpu/stepper.h"
#include "python/gradients.h"
#include "python/notes.h"
#include "python/records.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using cts::pointer;

using SegmentTuple = std::tuple<int64_t, int64_t, int32_t, int32_t>;
using PathTuple =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, std::vector<double>, std::vector<double>, double, bool>;

// What stays the same from step to step.
struct Stepper : cts::Stepper {
  cts::Notes notes;
};

Stepper make_stepper(int dtype, const std::vector<cts::FlatTuple>& flats,
                     const std::vector<std::vector<SegmentTuple>>& segments, const std::string& isa) {
  std::vector<cts::Flat> native;
  for (const auto& flat : flats) native.push_back(cts::unpacked(flat));
  std::vector<std::vector<cts::Segment>> places;
  std::vector<int32_t> groups;
  for (size_t f = 0; f < segments.size(); ++f) {
    places.emplace_back();
    for (auto [offset, numel, group, first] : segments[f]) {
      places.back().push_back({offset, numel, group, first});
      groups.resize(std::max(groups.size(), size_t(first + native[f].rows)));
      std::fill_n(groups.begin() + first, native[f].rows, group);
    }
  }
  const size_t shared_count = native[0].phi ? places[0].size() * size_t(native[0].rows) : 0;
  return {cts::Stepper(static_cast<cts::DType>(dtype), std::move(native), std::move(places), isa),
          cts::Notes(std::move(groups), shared_count)};
}

double step(const Stepper& stepper, uintptr_t gradients, uintptr_t started, bool all_started, uintptr_t nonfinite,
            const std::vector<cts::GroupTuple>& hyper, const cts::ControlTuple& packed, const cts::AfterTuple& after,
            const std::optional<PathTuple>& path, bool measure_phi, int threads) {
  const std::vector<cts::SgdGroup> groups = cts::unpacked(hyper);
  const cts::Control control = cts::control_of(gradients, all_started ? 0 : started, nonfinite, groups, packed);
  cts::PathSum native{};
  if (path) {
    const auto& [total, theta, gradient, stride, weights, loss_changes, scale, keep_point] = *path;
    native.total = pointer<void>(total), native.theta = pointer<void>(theta);
    native.gradient = pointer<void>(gradient), native.stride = stride;
    native.weights = weights.empty() ? nullptr : weights.data(), native.loss_changes = loss_changes.data();
    native.scale = scale, native.keep_point = keep_point;
  }
  py::gil_scoped_release release;
  const double moved = stepper.step(control, path ? &native : nullptr, measure_phi, threads);
  stepper.notes.write(control, pointer<uint8_t>(started), all_started, after);
  return moved;
}

bool any_nonfinite(const Stepper& stepper, uintptr_t gradients, int threads) {
  cts::Control control{};
  control.gradients = pointer<const void* const>(gradients), control.inverse_scale = 1;
  py::gil_scoped_release release;
  return stepper.any_nonfinite(control, threads);
}

void partial(const Stepper& stepper, uintptr_t gradients, uintptr_t started, bool all_started, uintptr_t nonfinite,
             const std::vector<cts::GroupTuple>& hyper, const cts::ControlTuple& packed, uintptr_t total, int threads) {
  const std::vector<cts::SgdGroup> groups = cts::unpacked(hyper);
  const cts::Control control = cts::control_of(gradients, all_started ? 0 : started, nonfinite, groups, packed);
  py::gil_scoped_release release;
  stepper.partial(control, pointer<void>(total), threads);
  stepper.notes.write(control, pointer<uint8_t>(started), all_started, std::nullopt);
}

void finish(const Stepper& stepper, const std::vector<cts::GroupTuple>& hyper, const cts::ControlTuple& packed,
            const cts::AfterTuple& after, uintptr_t total, int threads) {
  const std::vector<cts::SgdGroup> groups = cts::unpacked(hyper);
  const cts::Control control = cts::control_of(0, 0, 0, groups, packed);
  py::gil_scoped_release release;
  stepper.finish(control, pointer<const void>(total), threads);
  stepper.notes.write(control, nullptr, true, after);
}

void add_gradients(const Stepper& stepper, uintptr_t gradients, uintptr_t target, double weight, int threads) {
  py::gil_scoped_release release;
  stepper.add_gradients(pointer<const void* const>(gradients), pointer<void>(target), weight, threads);
}

void end_round(const Stepper& stepper, uintptr_t gradients, uintptr_t total, double weight,
               const std::vector<double>& rates, bool momentum, int threads) {
  py::gil_scoped_release release;
  stepper.end_round({pointer<const void* const>(gradients), pointer<void>(total), weight, rates.data(), momentum},
                    threads);
}

bool is_at_phi(const Stepper& stepper, int threads) {
  py::gil_scoped_release release;
  return stepper.is_at_phi(threads);
}

std::vector<double> squared_distances(const Stepper& stepper, uintptr_t rows, int64_t stride, int threads) {
  py::gil_scoped_release release;
  return stepper.squared_distances(pointer<const void>(rows), stride, threads);
}

void add_signs(const Stepper& stepper, uint64_t key, uint64_t first, double scale, int threads) {
  py::gil_scoped_release release;
  stepper.add_signs(key, first, scale, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The step on the CPU, and the addresses of gradients on any device.";
  cts::add_attributes(m);
  m.def("instruction_sets", &cts::instruction_sets, "Instruction sets that can run here, the widest first.");
  m.def("share_openmp", &cts::share_openmp, "library"_a,
        "Use the OpenMP runtime that a loaded library is linked with; False if none.");
  py::class_<Stepper>(m, "Stepper", "Buffers of one dtype, cut into tiles; the buffers must outlive it.")
      .def(py::init(&make_stepper), "dtype"_a, "flats"_a, "segments"_a, "isa"_a,
           "dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16. flats: (phi, theta, momentum, master, stride, rows), "
           "addresses or 0. segments: for each flat, (offset, numel, group, index of row 0's gradient).")
      .def(
          "step", &step, "gradients"_a, "started"_a, "all_started"_a, "nonfinite"_a, "hyper"_a, "control"_a, "after"_a,
          "path"_a, "measure_phi"_a, "threads"_a,
          "One step in place. gradients, nonfinite: addresses, the latter may be 0. started: address of the "
          "first-gradient flags, one a gradient; all_started: they are all 1. control: (meta_update, reset, "
          "reset_momentum, num_tasks, inverse_scale). after: None, or (address of the counters, their values after the "
          "step). The flags and the counters are brought up to date with it. path: None, or for a sum "
          "along the tasks' paths that takes place before the step (total, theta, gradient, stride of the last two, "
          "weights, loss changes, scale, whether to keep the point): the sum takes in the segment that ends here "
          "(weights empty: none); then this point is kept. Returns |phi - phi before|^2 if measure_phi, else 0.")
      .def(
          "partial", &partial, "gradients"_a, "started"_a, "all_started"_a, "nonfinite"_a, "hyper"_a, "control"_a,
          "total"_a, "threads"_a,
          "As `step` up to the inner step; total [S] <- the sum over the rows of theta - phi. The flags are brought up "
          "to date, and at a reset that clears momentum it is cleared.")
      .def("finish", &finish, "hyper"_a, "control"_a, "after"_a, "total"_a, "threads"_a,
           "Meta-update with a total over all tasks, shift and reset; then the counters are brought up to date.")
      .def("any_nonfinite", &any_nonfinite, "gradients"_a, "threads"_a,
           "Whether any gradient holds a NaN or an infinity.")
      .def("add_gradients", &add_gradients, "gradients"_a, "target"_a, "weight"_a, "threads"_a,
           "target [S] += weight times the sum over the rows of their gradients.")
      .def("end_round", &end_round, "gradients"_a, "total"_a, "weight"_a, "rates"_a, "momentum"_a, "threads"_a,
           "phi -= rates[group] * (total + weight * sum of gradients), total <- 0, theta <- phi, and if asked momentum "
           "<- 0. Addresses may be 0.")
      .def("is_at_phi", &is_at_phi, "threads"_a, "Whether theta is phi in every row, bit for bit.")
      .def("squared_distances", &squared_distances, "rows"_a, "stride"_a, "threads"_a,
           "|theta_t - rows_t|^2 of every row t.")
      .def("add_signs", &add_signs, "key"_a, "first"_a, "scale"_a, "threads"_a,
           "theta_t += scale * (1 where the bit of the key's words is set, else -1) in every row.");
  m.def("same_objects", &cts::same_objects, "a"_a, "b"_a, "Whether two lists hold the very same objects in one order.");
  m.def("prefetch_tensors", &cts::prefetch_tensors, "tensors"_a,
        "Fetch what torch reads when it advances the versions of a tuple of tensors.");
  py::class_<cts::GradientTable>(m, "GradientTable",
                                 "The addresses of the gradients of a list of parameters, which comes with every call.")
      .def(py::init<const std::vector<uintptr_t>&, const std::vector<py::tuple>&, py::object, py::object>(),
           "addresses"_a, "layouts"_a, "like"_a, "negated"_a)
      .def("collect", &cts::GradientTable::collect, "params"_a, "given"_a = py::none(),
           "(gradients, how many, odd, moved)")
      .def("enter", &cts::GradientTable::enter, "i"_a, "address"_a,
           "Enter the address of a gradient that was made dense.")
      .def_property_readonly(
          "address", [](const cts::GradientTable& t) { return reinterpret_cast<uintptr_t>(t.data()); },
          "Where the table is: one pointer for each parameter, null where there is no gradient.");
}
