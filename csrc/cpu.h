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

// Buffers of one dtype and how they are cut into tiles. Buffers must outlive it.
class Plan {
 public:
  // segments[f] belongs to flats[f]; flats[f].segments is set here. isa: one of instruction_sets().
  Plan(DType dtype, std::vector<Flat> flats, std::vector<std::vector<Segment>> segments, const std::string& isa);

  // One step in place. At most `threads` threads; the result does not depend on how many.
  void step(const Step& step, int threads) const;

 private:
  std::vector<Flat> flats_;
  std::vector<std::vector<Segment>> segments_;
  std::vector<Tile> tiles_;
  size_t bytes_ = 0;
  Kernel kernel_;
};

// Runs body(data) once on each of up to `threads` threads and waits for all of them.
void run_team(void (*body)(void*), void* data, int threads);

// Lets run_team use the OpenMP runtime that `library` (a loaded shared library) is linked with, so that its waiting threads do the
// work and do not contend for the cores. Returns false if there is none; teams are then started anew for every step.
bool share_openmp(const std::string& library);

}  // namespace cts
