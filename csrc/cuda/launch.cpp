// The step on a GPU: which kernel a launch goes to.
#include "cuda/launch.h"

#include <stdexcept>

namespace cts {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

namespace {

void check_size(const Launch& l) {
  if (l.num_groups > MAX_GROUPS || (l.table == nullptr && l.count > MAX_POINTERS))
    throw std::length_error("more than a launch can hold");
}

}  // namespace

void launch(const Launch& l, const Control& control, const Counting& counting) {
  check_size(l);
  constexpr decltype(&float32::launch) by_dtype[] = {float32::launch, float64::launch, bfloat16::launch,
                                                     float16::launch};
  by_dtype[l.dtype](l, control, counting);
}

void launch_partial(const Launch& l, const Control& control, void* total) {
  check_size(l);
  constexpr decltype(&float32::launch_partial) by_dtype[] = {float32::launch_partial, float64::launch_partial,
                                                             bfloat16::launch_partial, float16::launch_partial};
  by_dtype[l.dtype](l, control, total);
}

void launch_finish(const Launch& l, const Control& control, const void* total) {
  check_size(l);
  constexpr decltype(&float32::launch_finish) by_dtype[] = {float32::launch_finish, float64::launch_finish,
                                                            bfloat16::launch_finish, float16::launch_finish};
  by_dtype[l.dtype](l, control, total);
}

}  // namespace cts
