// The step on the CPU: a list of tiles, walked by one team of threads in one parallel region.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

#include "shifting_step.h"

namespace cts {

enum class DType : int { float32, float64, bfloat16, float16 };

// Columns begin ... end of one segment, all rows: what is fetched row by row and then stepped together.
struct Tile {
  int32_t flat, segment;
  int64_t begin, end;
};

constexpr int64_t kTileElements = 4096;  // of one row of a tile, at most

// Tiles that wait for a thread, taken `chunk` at a time.
struct Queue {
  int64_t count, chunk;
  std::atomic<int64_t> next{0};
};

// Steps tiles until the queue is empty; every thread of a team runs it.
using Kernel = void (*)(const Flat* flats, const Tile* tiles, Queue& queue, const Step& step);

// One for each instruction set that csrc/shifting_step.cpp is compiled for.
namespace plain { Kernel kernel(DType); }
namespace avx2 { Kernel kernel(DType); }
namespace avx512 { Kernel kernel(DType); }

// Instruction sets that this module holds and this machine has, the widest first: of "avx512", "avx2", "plain".
std::vector<std::string> instruction_sets();

// total: [S]; theta, gradient: [rows, S] at the last point of each path.
struct LeapBuffers {
  void *total, *theta, *gradient;
  int64_t stride;
};

// Buffers of one dtype and how they are cut into tiles. Buffers must outlive it.
class Plan {
 public:
  // segments[f] belongs to flats[f]; flats[f].segments is set here. isa: one of instruction_sets().
  Plan(DType dtype, std::vector<Flat> flats, std::vector<std::vector<Segment>> segments, const std::string& isa);

  // One step in place. At most `threads` threads; the result does not depend on how many.
  void step(const Step& step, int threads) const;

  // The rest is about the first flat, which has a phi. Buffers of the methods are laid out as phi, [S], or as theta, [rows, S] with rows
  // `stride` apart, and are of phi's type.

  // target += weights[group] * sum over the rows of their gradients; a null gradient adds nothing.
  void add_gradients(const void* const* gradients, void* target, const std::vector<double>& weights, int threads) const;

  // theta <- phi in every row, and momentum <- 0.
  void reset(bool momentum, int threads) const;

  // |theta_t - rows_t|^2 of every row t.
  std::vector<double> squared_distances(const void* rows, int64_t stride, int threads) const;

  // Leap's sum takes in the segment from the kept point to this one, of weights[t], over which the loss changed by changes[t] (empty: no
  // segment ends here); then, if asked, this point is kept: theta, and gradients times scale.
  void leap(const void* const* gradients, const LeapBuffers& kept, const std::vector<double>& weights, const std::vector<double>& changes,
            double scale, bool keeps, int threads) const;

 private:
  const Flat& shared() const { return flats_.front(); }

  template <class C>
  const C* work_theta() const {
    return static_cast<const C*>(shared().master ? shared().master : shared().theta);
  }

  // At most `threads`, and no more than there is work for.
  int team_for(int threads, size_t pieces) const;

  // body(i, span i) for all spans of the first flat, once each.
  template <class Body>
  void over_spans(int threads, Body body) const;

  DType dtype_;
  std::vector<Flat> flats_;
  std::vector<std::vector<Segment>> segments_;
  std::vector<Tile> tiles_, spans_;  // of all flats, for the step; long ones of the first
  size_t bytes_ = 0;
  Kernel kernel_;
};

// Runs body(data) once on each of up to `threads` threads and waits for all of them.
void run_team(void (*body)(void*), void* data, int threads);

// Lets run_team use the OpenMP runtime that `library` (a loaded shared library) is linked with, so that its waiting threads do the
// work and do not contend for the cores. Returns false if there is none; teams are then started anew for every step.
bool share_openmp(const std::string& library);

}  // namespace cts
