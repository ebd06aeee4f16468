// The Python module cts_fast._cuda: raw addresses and numbers in, no logic. cts_fast/engine/backends/cuda.py uses it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"
#include "python/notes.h"
#include "python/records.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using cts::FlatTuple;
using cts::pointer;

using CountingTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int32_t, bool>;
using RateTuple = std::pair<uintptr_t, bool>;

// What stays the same from step to step.
struct Stepper {
  cts::Launch launch{};
  cts::Notes notes;

  Stepper(int dtype, int device, FlatTuple shared, FlatTuple heads, uintptr_t tiles, int num_tiles,
          const std::vector<int32_t>& groups, int shared_count, bool streams)
      : notes(groups, size_t(shared_count)) {
    launch.dtype = dtype, launch.device = device, launch.num_tiles = num_tiles;
    launch.count = int32_t(groups.size()), launch.shared_count = shared_count;
    launch.shared = cts::unpacked(shared), launch.heads = cts::unpacked(heads);
    launch.tiles = pointer<cts::Tile>(tiles), launch.streams = streams;
  }

  void step(uintptr_t gradients, uintptr_t table, uintptr_t started, uintptr_t host_started, uintptr_t nonfinite,
            const std::vector<cts::GroupTuple>& hyper, const std::vector<std::pair<RateTuple, RateTuple>>& rates,
            const cts::ControlTuple& packed, const cts::AfterTuple& after, const CountingTuple& counting,
            uintptr_t stream) const {
    const std::vector<cts::SgdGroup> groups = cts::unpacked(hyper);
    const cts::Control control = cts::control_of(gradients, started, nonfinite, groups, packed);
    if (rates.size() != groups.size()) throw std::invalid_argument("one pair of rates for each group");
    std::vector<cts::DeviceRates> on_device;
    for (auto [lr, meta_lr] : rates) on_device.push_back({unpacked(lr), unpacked(meta_lr)});
    auto [counters, ticket, found_inf, grad_scale, group_of, horizon, meta_interval, advances] = counting;
    const cts::Counting counts{pointer<int64_t>(counters),
                               pointer<unsigned>(ticket),
                               pointer<const float>(found_inf),
                               pointer<const float>(grad_scale),
                               pointer<const int32_t>(group_of),
                               horizon,
                               meta_interval,
                               advances};
    cts::launch(completed(groups.size(), on_device.data(), table, started, stream), control, counts);
    notes.write(control, pointer<uint8_t>(host_started), false, after);
  }

  void partial(uintptr_t gradients, uintptr_t table, uintptr_t started, uintptr_t host_started, uintptr_t nonfinite,
               const std::vector<cts::GroupTuple>& hyper, const cts::ControlTuple& packed, uintptr_t total,
               uintptr_t stream) const {
    const std::vector<cts::SgdGroup> groups = cts::unpacked(hyper);
    const cts::Control control = cts::control_of(gradients, started, nonfinite, groups, packed);
    const std::vector<cts::DeviceRates> none(groups.size());
    cts::launch_partial(completed(groups.size(), none.data(), table, started, stream), control, pointer<void>(total));
    notes.write(control, pointer<uint8_t>(host_started), false, std::nullopt);
  }

  void finish(const std::vector<cts::GroupTuple>& hyper, const cts::ControlTuple& packed, const cts::AfterTuple& after,
              uintptr_t total, uintptr_t stream) const {
    const std::vector<cts::SgdGroup> groups = cts::unpacked(hyper);
    const cts::Control control = cts::control_of(0, 0, 0, groups, packed);
    cts::launch_finish(completed(groups.size(), nullptr, 1, 0, stream), control, pointer<const void>(total));
    notes.write(control, nullptr, true, after);
  }

 private:
  static cts::DeviceRate unpacked(const RateTuple& rate) { return {pointer<const void>(rate.first), rate.second}; }

  cts::Launch completed(size_t num_groups, const cts::DeviceRates* rates, uintptr_t table, uintptr_t started,
                        uintptr_t stream) const {
    cts::Launch now = launch;
    now.num_groups = static_cast<int>(num_groups), now.rates = rates;
    now.table = pointer<void>(table), now.started = pointer<uint8_t>(started), now.stream = pointer<void>(stream);
    return now;
  }
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The step on an NVIDIA GPU.";
  cts::add_attributes(m);
#ifdef CTS_HOST_SHIM
  m.attr("device_type") = "cpu";
#else
  m.attr("device_type") = "cuda";
#endif
  m.attr("max_pointers") = cts::MAX_POINTERS;
  m.attr("max_groups") = cts::MAX_GROUPS;
  m.def("driver_version", &cts::driver_version,
        "The CUDA version that the driver supports, as 1000 major + 10 minor; 0 without a driver.");
  m.def(
      "tile_columns",
      [](int tasks, int itemsize) {
        const cts::Shape shape = cts::shape_of(tasks);
        return std::pair(shape.lanes * 16 / itemsize, shape.lanes * shape.slices * 16 / itemsize);
      },
      "tasks"_a, "itemsize"_a,
      "The most columns of a shared tile and of a head's; itemsize: bytes of a number of phi.");
  m.attr("needs_driver") = cts::NEEDS_DRIVER;
  py::class_<Stepper>(m, "Stepper",
                      "Buffers of one device and dtype and their tiles; all of it must outlive the stepper.")
      .def(py::init<int, int, FlatTuple, FlatTuple, uintptr_t, int, const std::vector<int32_t>&, int, bool>(),
           "dtype"_a, "device"_a, "shared"_a, "heads"_a, "tiles"_a, "num_tiles"_a, "groups"_a, "shared_count"_a,
           "streams"_a,
           "dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16. shared, heads: (phi, theta, momentum, master, stride, "
           "rows), addresses or 0. groups: of each gradient, in collected order; the first shared_count are shared. "
           "streams: "
           "what is stored may leave the caches first.")
      .def(
          "step", &Stepper::step, "gradients"_a, "table"_a, "started"_a, "host_started"_a, "nonfinite"_a, "hyper"_a,
          "rates"_a, "control"_a, "after"_a, "counting"_a, "stream"_a,
          "Queue one step. gradients: address of the table in host memory; table: of its copy on the device, or 0. "
          "started: of the first-gradient flags on the device, or 0; host_started: of the host's, which are brought up "
          "to date once the step is queued, or 0. rates: for each group, of lr and of meta_lr (the address of a float, "
          "or "
          "of a double, whether it is a double), (0, False) for one that hyper holds. control: (meta_update, reset, "
          "reset_momentum, num_tasks, inverse_scale). after: None, or "
          "(address of the host's counters, their values after the step). counting: (counters, ticket, found_inf, "
          "grad_scale, groups, horizon, meta_interval, advances), 0 for none.")
      .def(
          "partial", &Stepper::partial, "gradients"_a, "table"_a, "started"_a, "host_started"_a, "nonfinite"_a,
          "hyper"_a, "control"_a, "total"_a, "stream"_a,
          "Queue the first half of a step, as `step` up to the inner step; total [S] on the device <- the sum over the "
          "rows of theta - phi. At a reset that clears momentum it is cleared.")
      .def("finish", &Stepper::finish, "hyper"_a, "control"_a, "after"_a, "total"_a, "stream"_a,
           "Queue the second half: meta-update with a total over all tasks, shift and reset.");
}
