// The step on a GPU: which kernel a launch goes to.
#include "cuda/launch.h"

#include <stdexcept>

namespace cts {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

void launch(const Launch& l, const Step& step, const Counting& counting) {
  if (l.num_groups > MAX_GROUPS || (l.table == nullptr && l.count > MAX_POINTERS))
    throw std::length_error("more than a launch can hold");
  constexpr decltype(&float32::launch) by_dtype[] = {float32::launch, float64::launch, bfloat16::launch,
                                                     float16::launch};
  by_dtype[l.dtype](l, step, counting);
}

}  // namespace cts
