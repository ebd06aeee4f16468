// What the host notes of a step: which momentum has taken its first gradient, and the counters. Native code writes it
// before Python goes on, so that nothing interrupts a program between a step and its notes.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "step.h"

namespace cts {

// Where the counters inner_step, round, meta_updates and skipped_steps are, and what they are after the step; or None.
using AfterTuple = std::optional<std::tuple<uintptr_t, std::array<int64_t, 4>>>;

class Notes {
 public:
  // groups: the param group of every gradient, those of shared tensors first.
  Notes(std::vector<int32_t> groups, size_t shared_count) : groups_(std::move(groups)), shared_count_(shared_count) {}

  // started: one flag a gradient, or null. all_started: they are all 1.
  void write(const Control& control, uint8_t* started, bool all_started, const AfterTuple& after) const {
    for (size_t i = 0; started && !all_started && i < groups_.size(); ++i)
      if (control.gradients[i] && control.groups[groups_[i]].momentum != 0) started[i] = 1;
    for (size_t i = 0; started && control.reset && control.reset_momentum && i < shared_count_; ++i) started[i] = 0;
    if (!after) return;
    const auto& [address, counters] = *after;
    for (size_t i = 0; i < counters.size(); ++i) reinterpret_cast<int64_t*>(address)[i] = counters[i];
  }

 private:
  std::vector<int32_t> groups_;
  size_t shared_count_;
};

}  // namespace cts
