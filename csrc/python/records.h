// What Python hands to both native modules, packed as tuples, and what both say about themselves.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "step.h"

// setup.py says both; another build has neither.
#ifndef CTS_BUILD
#define CTS_BUILD unknown
#define CTS_VERSION unknown
#endif

namespace cts {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// (phi, theta, momentum, master, stride, rows), addresses or 0.
using FlatTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int32_t>;

// Without its segments.
inline Flat unpacked(const FlatTuple& packed) {
  auto [phi, theta, momentum, master, stride, rows] = packed;
  Flat flat{};
  flat.phi = pointer<void>(phi), flat.theta = pointer<void>(theta);
  flat.momentum = pointer<void>(momentum), flat.master = pointer<void>(master);
  flat.stride = stride, flat.rows = rows;
  return flat;
}

// One tuple for each param group, its fields in the order of SGD_FIELDS.
template <class... T> std::tuple<T...> tuple_of(const std::tuple<Field<SgdGroup, T>...>&);
using GroupTuple = decltype(tuple_of(SGD_FIELDS));

inline std::vector<SgdGroup> unpacked(const std::vector<GroupTuple>& packed) {
  const auto one = [](const auto&... values) {
    SgdGroup group{};
    std::apply([&](const auto&... fields) { ((group.*fields.member = values), ...); }, SGD_FIELDS);
    return group;
  };
  std::vector<SgdGroup> groups;
  for (const GroupTuple& values : packed) groups.push_back(std::apply(one, values));
  return groups;
}

// (meta_update, reset, reset_momentum, num_tasks, inverse_scale)
using ControlTuple = std::tuple<bool, bool, bool, int32_t, double>;

// gradients, started, nonfinite: addresses; the last two may be 0. groups must outlive it.
inline Control control_of(uintptr_t gradients, uintptr_t started, uintptr_t nonfinite,
                          const std::vector<SgdGroup>& groups, const ControlTuple& packed) {
  Control control{};
  control.gradients = pointer<const void* const>(gradients), control.started = pointer<const uint8_t>(started);
  control.nonfinite = pointer<uint8_t>(nonfinite), control.groups = groups.data();
  std::tie(control.meta_update, control.reset, control.reset_momentum, control.num_tasks, control.inverse_scale) =
      packed;
  return control;
}

// What both modules show beside their functions.
inline void add_attributes(pybind11::module_& m) {
  const auto names = [](const auto&... fields) { return pybind11::make_tuple(fields.name...); };
  m.attr("sgd_fields") = std::apply(names, SGD_FIELDS);
#define CTS_TEXT_OF(x) #x
#define CTS_TEXT(x) CTS_TEXT_OF(x)
  m.attr("build") = CTS_TEXT(CTS_BUILD);
  m.attr("version") = CTS_TEXT(CTS_VERSION);
#undef CTS_TEXT
#undef CTS_TEXT_OF
}

}  // namespace cts
