// The step on the CPU: a list of tiles, walked by one team of threads in one parallel region.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

#include "step.h"

namespace cts {

enum class DType : int { float32, float64, bfloat16, float16 };

// Columns begin ... end of one segment, all rows.
struct Columns {
  int32_t flat, segment;
  int64_t begin, end;
};

constexpr int64_t kTileElements = 4096;  // of one row of a tile, at most
// Of one row of a span, a tile for the methods' work: about a page, and many rows of it fit into the second cache.
constexpr int64_t kSpanElements = 1024;

// Tiles in the order in which memory is visited, and how many numbers they hold up to and with each.
struct Tiles {
  std::vector<Columns> list;
  std::vector<int64_t> numbers;

  void add(const Columns& tile, int64_t rows);
};

struct Range {
  int64_t first, last;
};

// Tiles that wait for a team. Each thread has a share of them, the same in every pass over the same columns, so that it
// finds in its caches what it left there; who is done helps the others.
class Queue {
 public:
  Queue(const Tiles& tiles, int threads);

  // The next tiles of the calling thread's share, else, if it steals, of another's; false: none are left.
  bool take(Range& range, bool steals = true);

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t last = 0, chunk = 1;
  };
  static constexpr int kShares = 64;

  int count_;
  Share shares_[kShares];
};

// A sum along the tasks' paths, which a step continues before it moves. total [S]; theta, gradient: [rows, S], `stride`
// apart: the last point of each path. The segment that ends at this point has a weight and a change of loss for every
// row; null if none does. Then the point is kept, if asked, and its gradients times scale.
struct PathSum {
  void *total, *theta, *gradient;
  int64_t stride;
  const double *weights, *loss_changes;
  double scale;
  bool keep_point;
};

// The end of a round: phi -= rates[group] * (total + weight * sum over the rows of gradients) and total <- 0, as far as
// they are given; then theta <- phi in every row and, if asked, momentum <- 0.
struct RoundEnd {
  const void* const* gradients;
  void* total;
  double weight;
  const double* rates;
  bool momentum;
};

// What methods do with a part of a flat that has a phi; Stepper has the same for all of it, the path as a part of the
// step.
struct MethodOps {
  void (*add_gradients)(const Flat& flat, const Columns& span, const void* const* gradients, void* target,
                        double weight);
  // next: fetched meanwhile, or null
  void (*end_round)(const Flat& flat, const Columns& span, const Columns* next, const RoundEnd& end);
  void (*squared_distances)(const Flat& flat, const Columns& span, const void* rows, int64_t stride, double* result);
  void (*extend_path)(const Flat& flat, const Columns& tile, const void* const* gradients, const PathSum& path);
  // first: word of the span's segment
  void (*add_signs)(const Flat& flat, const Columns& span, uint64_t key, uint64_t first, double scale);
};

// Steps tiles until the queue is empty, those of a flat that has a phi after the path's sum if there is one; every
// thread of a team runs it. moved: where each tile leaves the sum of the squares of what phi moves by there; null: not
// asked for.
struct Kernel {
  void (*step)(const Flat* flats, const Columns* tiles, Queue& queue, const Control& control,
               const MethodOps& method_ops, const PathSum* path, double* moved);
  // The halves of a step whose sum over the tasks is completed elsewhere. total: [S] of phi's type; the first half
  // leaves there what the rows of a flat that has a phi come to; the second one reads it.
  void (*partial)(const Flat* flats, const Columns* tiles, Queue& queue, const Control& control, void* total);
  void (*finish)(const Flat& flat, const Columns& span, const Control& control, const void* total);
  // Whether so many rows are stepped together in the usual kinds of step, in registers; else in turn.
  bool (*fits_registers)(int32_t rows);
  // Whether a gradient holds a NaN or an infinity in a tile; sets its entry of control.nonfinite if there is one.
  bool (*nonfinite)(const Flat& flat, const Columns& tile, const Control& control);
};

// Instruction sets that this module holds and this machine has, the widest first: of "avx512", "avx2", "plain".
std::vector<std::string> instruction_sets();

// Buffers of one dtype and how they are cut into tiles. Buffers must outlive it.
class Stepper {
 public:
  // segments[f] belongs to flats[f]; flats[f].segments is set here. isa: one of instruction_sets().
  Stepper(DType dtype, std::vector<Flat> flats, std::vector<std::vector<Segment>> segments, const std::string& isa);

  // One step in place, after the path's sum if there is one; returns, if measure_phi, the square of the way that phi
  // moves. At most `threads` threads; the result does not depend on how many.
  double step(const Control& control, const PathSum* path, bool measure_phi, int threads) const;

  // The inner step, and total <- sum over the rows of theta - phi, [S] as phi; at a reset that clears momentum, it
  // does.
  void partial(const Control& control, void* total, int threads) const;

  // What of the step is left, with a total that may come from more tasks than there are rows.
  void finish(const Control& control, const void* total, int threads) const;

  // Whether any gradient holds a NaN or an infinity; reads gradients and inverse_scale of the step alone.
  bool any_nonfinite(const Control& control, int threads) const;

  // The rest is about the first flat, which has a phi. Buffers of the methods are laid out as phi, [S], or as theta,
  // [rows, S] with rows `stride` apart, and are of phi's type.

  // target += weight * sum over the rows of their gradients; a null gradient adds nothing.
  void add_gradients(const void* const* gradients, void* target, double weight, int threads) const;

  void end_round(const RoundEnd& end, int threads) const;

  // Whether theta is phi in every row, bit for bit.
  bool is_at_phi(int threads) const;

  // |theta_t - rows_t|^2 of every row t.
  std::vector<double> squared_distances(const void* rows, int64_t stride, int threads) const;

  // theta_t += scale * signs in every row: a bit of the key's random words for each number, +1 where it is set, else
  // -1; every segment starts with a word of its own, the first one with word `first`.
  void add_signs(uint64_t key, uint64_t first, double scale, int threads) const;

 private:
  // At most `threads`, and no more than there is work for.
  int team_for(int threads, size_t pieces) const;

  // body(i, span i, the span after it for the same thread or null) for all spans of the first flat, once each.
  template <class Body> void over_spans(int threads, Body body) const;

  std::vector<Flat> flats_;
  std::vector<std::vector<Segment>> segments_;
  Tiles tiles_, spans_;  // of all flats, for the step; of the first, for the methods' work
  size_t bytes_ = 0, phi_element_ = 0;
  Kernel kernel_;
  MethodOps method_ops_;
};

// Runs body(data) once on each of up to `threads` threads and waits for all of them; they call themselves 0, 1, … in
// thread_number().
void run_team(void (*body)(void*), void* data, int threads);
int thread_number();

// Lets run_team use the OpenMP runtime that `library` (a loaded shared library) is linked with, so that its waiting
// threads do the work and do not contend for the cores. Returns false if there is none; teams are then started anew for
// every step.
bool share_openmp(const std::string& library);

}  // namespace cts
