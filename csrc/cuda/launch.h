// One launch of the step on a GPU, as the host describes it.
#pragma once

#ifndef CTS_HOST_SHIM
#include <cuda_runtime_api.h>
#endif

#include <algorithm>

#include "step.h"

namespace cts {

// What a kernel's parameters hold by value; a larger table of gradients goes through device memory. 4 KiB hold all that
// before CUDA 12.1.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int MAX_PARAMETER_BYTES = 4096, SMALL_POINTERS = 320, SMALL_GROUPS = 8, MAX_POINTERS = SMALL_POINTERS,
              MAX_GROUPS = SMALL_GROUPS;
constexpr int NEEDS_PARAMETERS = 11000;
#else
constexpr int NEEDS_PARAMETERS = 12010;
constexpr int MAX_PARAMETER_BYTES = 32764, SMALL_POINTERS = 512, SMALL_GROUPS = 8, MAX_POINTERS = 3200, MAX_GROUPS = 64;
#endif

// The oldest driver that this build runs on, as a CUDA version: the runtime inside it works on drivers of its own major
// version or newer.
#if defined(CUDART_VERSION)
constexpr int NEEDS_DRIVER = std::max(NEEDS_PARAMETERS, CUDART_VERSION / 1000 * 1000);
#else
constexpr int NEEDS_DRIVER = NEEDS_PARAMETERS;
#endif

// How a block divides its work among its threads: `lanes` columns' threads, each 16 bytes of phi wide, and as many
// slices of the tasks as it takes for a slice's share to be HELD, or MAX_SLICES. A shared tile has up to `lanes` such
// columns, a head's, of one task, lanes * slices.
constexpr int THREADS = 128, HELD = 8, MAX_SLICES = 16;

struct Shape {
  int lanes, slices, share;
};

inline Shape shape_of(int tasks) {
  const int most = std::min((tasks + HELD - 1) / HELD, MAX_SLICES), share = (tasks + most - 1) / most,
            slices = (tasks + share - 1) / share;
  return {std::max(THREADS / slices / 32 * 32, 32), slices, share};
}

// Columns of one tensor that one block takes: column ... column + columns of its buffers, `at` of its tensor. first:
// index of row 0's gradient.
struct alignas(16) Tile {
  int64_t column, at;
  int32_t columns, group, first, head;
};

// For a captured step: what the device reads itself, and advances after the last block. counters:
// inner_step, round, meta_updates; null: the host has decided. ticket: 0 before and after every launch. groups: the
// group of each gradient's tensor.
struct Counting {
  int64_t* counters;
  unsigned* ticket;
  const float *found_inf, *grad_scale;
  const int32_t* groups;
  int64_t horizon;
  int32_t meta_interval;
  bool advances;
};

// A rate that the device reads, a float's address or a double's; null: the host passes the number.
struct DeviceRate {
  const void* address;
  bool is_double;
};

struct DeviceRates {
  DeviceRate lr, meta_lr;
};

// Buffers and tiles of one device and dtype (0 float32, 1 float64, 2 bfloat16, 3 float16), all in device memory. count:
// of gradients, those of shared tensors first. table: the gradients' addresses on the device; null: they travel with
// the launch. rates: one a group. streams: the buffers are too large for the L2 cache to keep.
struct Launch {
  int dtype, device, num_tiles, num_groups;
  int32_t count, shared_count;
  Flat shared, heads;
  const Tile* tiles;
  const void* table;
  uint8_t* started;
  const DeviceRates* rates;
  void* stream;
  bool streams;
};

// The CUDA version that the driver supports, as 1000 major + 10 minor; 0 without a driver.
int driver_version();

// Queues the step on the stream. Throws std::runtime_error with what CUDA said.
void launch(const Launch& l, const Control& control, const Counting& counting);

// The same in two halves, whose sum over the tasks is completed in between. total: [S] of phi's type on the device; the
// first half writes the sum over the rows of theta - phi, the second one reads that over all tasks. The rates are
// numbers.
void launch_partial(const Launch& l, const Control& control, void* total);
void launch_finish(const Launch& l, const Control& control, const void* total);

// What these call: one for each dtype that csrc/cuda/shifting_step.cu is compiled for.
#define CTS_LAUNCHES(dtype)                                       \
  namespace dtype {                                               \
  void launch(const Launch&, const Control&, const Counting&);    \
  void launch_partial(const Launch&, const Control&, void*);      \
  void launch_finish(const Launch&, const Control&, const void*); \
  }
CTS_LAUNCHES(float32)
CTS_LAUNCHES(float64)
CTS_LAUNCHES(bfloat16)
CTS_LAUNCHES(float16)
#undef CTS_LAUNCHES

}  // namespace cts
