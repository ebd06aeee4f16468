// The Python module cts_fast._cuda: raw addresses and numbers in, no logic. cts_fast/engine/backends/cuda.py uses it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"
#include "python/records.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using cts::FlatTuple;
using cts::pointer;

using CountingTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int32_t, bool>;

// What stays the same from step to step.
struct Plan {
  cts::Launch launch{};

  Plan(int dtype, int device, FlatTuple shared, FlatTuple heads, uintptr_t tiles, int num_tiles, int count,
       int shared_count, bool streams) {
    launch.dtype = dtype, launch.device = device, launch.num_tiles = num_tiles;
    launch.count = count, launch.shared_count = shared_count;
    launch.shared = cts::unpacked(shared), launch.heads = cts::unpacked(heads);
    launch.tiles = pointer<cts::Tile>(tiles), launch.streams = streams;
  }

  void step(uintptr_t gradients, uintptr_t table, uintptr_t started, uintptr_t nonfinite,
            const std::vector<cts::GroupTuple>& hyper, const std::vector<uintptr_t>& lr,
            const std::vector<uintptr_t>& meta_lr, bool meta_update, bool reset, bool reset_momentum,
            double inverse_scale, const CountingTuple& counting, uintptr_t stream) const {
    const std::vector<cts::SgdGroup> groups = cts::unpacked(hyper);
    const cts::Step step =
        cts::step_of(gradients, started, nonfinite, groups, inverse_scale, meta_update, reset, reset_momentum);
    auto [counters, ticket, found_inf, grad_scale, group_of, horizon, meta_interval, advances] = counting;
    const cts::Counting counts{pointer<int64_t>(counters),
                               pointer<unsigned>(ticket),
                               pointer<const float>(found_inf),
                               pointer<const float>(grad_scale),
                               pointer<const int32_t>(group_of),
                               horizon,
                               meta_interval,
                               advances};
    cts::Launch now = launch;
    now.num_groups = static_cast<int>(groups.size());
    now.table = pointer<void>(table), now.started = pointer<uint8_t>(started), now.stream = pointer<void>(stream);
    now.lr = lr.data(), now.meta_lr = meta_lr.data();
    cts::launch(now, step, counts);
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
  py::class_<Plan>(m, "Plan", "Buffers of one device and dtype and their tiles; all of it must outlive the plan.")
      .def(py::init<int, int, FlatTuple, FlatTuple, uintptr_t, int, int, int, bool>(), "dtype"_a, "device"_a,
           "shared"_a, "heads"_a, "tiles"_a, "num_tiles"_a, "count"_a, "shared_count"_a, "streams"_a,
           "dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16. shared, heads: (phi, theta, momentum, master, stride, "
           "rows), addresses or 0. streams: what is stored may leave the caches first.")
      .def("step", &Plan::step, "gradients"_a, "table"_a, "started"_a, "nonfinite"_a, "hyper"_a, "lr"_a, "meta_lr"_a,
           "meta_update"_a, "reset"_a, "reset_momentum"_a, "inverse_scale"_a, "counting"_a, "stream"_a,
           "Queue one step. gradients: address of the table in host memory; table: of its copy on the device, or 0. "
           "lr, meta_lr: addresses of tensors, or 0. counting: (counters, ticket, found_inf, grad_scale, groups, "
           "horizon, meta_interval, advances), 0 for none.");
}
