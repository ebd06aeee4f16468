#include "cpu/stepper.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <tuple>

namespace cts {

// One of each for every instruction set that csrc/cpu/shifting_step.cpp and csrc/cpu/method_ops.cpp are compiled for.
namespace plain {
Kernel kernel(DType);
MethodOps method_ops(DType);
}  // namespace plain
namespace avx2 {
Kernel kernel(DType);
MethodOps method_ops(DType);
}  // namespace avx2
namespace avx512 {
Kernel kernel(DType);
MethodOps method_ops(DType);
}  // namespace avx512

namespace {

constexpr size_t kTileBytes = 48 << 10;  // of all rows of a tile, about; twice that where they are stepped in turn
// Of one row of a tile, at least, a long run for DRAM, or twice that; tiles are whole multiples of it.
constexpr size_t kRunBytes = 2 << 10;
constexpr size_t kThreadBytes = 1 << 16;  // less than that is not worth another thread

size_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The code of one instruction set. Raises std::invalid_argument if it cannot run here.
std::pair<Kernel, MethodOps> code_for(const std::string& isa, DType dtype) {
  const auto names = instruction_sets();
  if (std::find(names.begin(), names.end(), isa) == names.end())
    throw std::invalid_argument("instruction set '" + isa + "' is not available on this machine");
#ifdef CTS_X86
  if (isa == "avx512") return {avx512::kernel(dtype), avx512::method_ops(dtype)};
  if (isa == "avx2") return {avx2::kernel(dtype), avx2::method_ops(dtype)};
#endif
  return {plain::kernel(dtype), plain::method_ops(dtype)};
}

// libgomp's entry for `#pragma omp parallel`; LLVM's and Intel's runtimes export it too.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<Parallel> shared_parallel{nullptr};
std::atomic<int (*)()> shared_thread_number{nullptr};
thread_local int own_thread_number = 0;

// body() once on each thread of a team.
template <class Body> void run_on_all(int threads, Body body) {
  run_team([](void* data) { (*static_cast<Body*>(data))(); }, &body, threads);
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#ifdef CTS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) names.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    names.push_back("avx2");  // f16c is older than avx2
#endif
  names.push_back("plain");
  return names;
}

bool share_openmp(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return false;
  shared_thread_number = reinterpret_cast<int (*)()>(dlsym(handle, "omp_get_thread_num"));
  if (shared_thread_number.load()) shared_parallel = reinterpret_cast<Parallel>(dlsym(handle, "GOMP_parallel"));
  return shared_parallel.load() != nullptr;
}

void run_team(void (*body)(void*), void* data, int threads) {
  if (threads <= 1) return body(data);
  if (Parallel parallel = shared_parallel) return parallel(body, data, unsigned(threads), 0);
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back([=] { own_thread_number = i, body(data); });
  body(data);
  for (auto& thread : team) thread.join();
}

int thread_number() { return shared_parallel.load() ? shared_thread_number.load()() : own_thread_number; }

void Tiles::add(const Columns& tile, int64_t rows) {
  list.push_back(tile);
  numbers.push_back((numbers.empty() ? 0 : numbers.back()) + (tile.end - tile.begin) * rows);
}

Queue::Queue(const Tiles& tiles, int threads) : count_(std::min(std::max(threads, 1), kShares)) {
  const int64_t all = tiles.numbers.empty() ? 0 : tiles.numbers.back();
  int64_t first = 0;
  for (int i = 0; i < count_; ++i) {
    const auto end = std::upper_bound(tiles.numbers.begin(), tiles.numbers.end(), all / count_ * (i + 1));
    const int64_t last = i + 1 == count_ ? int64_t(tiles.list.size()) : end - tiles.numbers.begin();
    shares_[i].next = first, shares_[i].last = last, shares_[i].chunk = std::max<int64_t>(1, (last - first) / 8);
    first = last;
  }
}

bool Queue::take(Range& range, bool steals) {
  const int own = thread_number();
  for (int i = 0; i < (steals ? count_ : 1); ++i) {
    Share& share = shares_[(own + i) % count_];
    if (share.next.load(std::memory_order_relaxed) >= share.last) continue;
    const int64_t first = share.next.fetch_add(share.chunk, std::memory_order_relaxed);
    if (first >= share.last) continue;
    range = {first, std::min(first + share.chunk, share.last)};
    return true;
  }
  return false;
}

Stepper::Stepper(DType dtype, std::vector<Flat> flats, std::vector<std::vector<Segment>> segments,
                 const std::string& isa)
    : flats_(std::move(flats)), segments_(std::move(segments)) {
  std::tie(kernel_, method_ops_) = code_for(isa, dtype);
  const size_t size = size_of(dtype);
  phi_element_ = std::max(size, sizeof(float));
  const auto cut = [&](size_t f, size_t s, int64_t length, Tiles& into) {
    const int64_t numel = segments_[f][s].numel;
    for (int64_t begin = 0; begin < numel; begin += length)
      into.add({int32_t(f), int32_t(s), begin, std::min(begin + length, numel)}, flats_[f].rows);
  };
  for (size_t f = 0; f < flats_.size(); ++f) {
    flats_[f].segments = segments_[f].data();
    flats_[f].num_segments = int32_t(segments_[f].size());
    const size_t column_bytes = (3 * size + (flats_[f].master ? sizeof(float) : 0)) * size_t(flats_[f].rows);
    const size_t longer = kernel_.fits_registers(flats_[f].rows) ? 1 : 2, run = longer * kRunBytes / size;
    const int64_t length =
        std::min(kTileElements, int64_t(std::max<size_t>(1, longer * kTileBytes / column_bytes / run) * run));
    for (size_t s = 0; s < segments_[f].size(); ++s) {
      cut(f, s, length, tiles_);
      if (f == 0 && flats_[f].phi) cut(f, s, kSpanElements, spans_);
      bytes_ += column_bytes * segments_[f][s].numel;
    }
  }
}

int Stepper::team_for(int threads, size_t pieces) const {
  return int(std::min<size_t>(
      {size_t(std::max(threads, 1)), std::max<size_t>(1, bytes_ / kThreadBytes), std::max<size_t>(1, pieces)}));
}

double Stepper::step(const Control& control, const PathSum* path, bool measure_phi, int threads) const {
  threads = team_for(threads, tiles_.list.size());
  Queue queue(tiles_, threads);
  std::vector<double> moved(measure_phi ? tiles_.list.size() : 0);
  run_on_all(threads, [&] {
    kernel_.step(flats_.data(), tiles_.list.data(), queue, control, method_ops_, path,
                 measure_phi ? moved.data() : nullptr);
  });
  return std::accumulate(moved.begin(), moved.end(), 0.0);  // in one order, whoever computed them
}

bool Stepper::any_nonfinite(const Control& control, int threads) const {
  threads = team_for(threads, tiles_.list.size());
  Queue queue(tiles_, threads);  // each thread looks at what it steps afterwards
  std::atomic<bool> found{false};
  run_on_all(threads, [&] {
    for (Range range; !found.load(std::memory_order_relaxed) && queue.take(range);)
      for (int64_t i = range.first; i < range.last; ++i)
        if (const Columns& tile = tiles_.list[size_t(i)]; kernel_.nonfinite(flats_[size_t(tile.flat)], tile, control))
          found.store(true, std::memory_order_relaxed);
  });
  return found.load();
}

void Stepper::partial(const Control& control, void* total, int threads) const {
  threads = team_for(threads, tiles_.list.size());
  Queue queue(tiles_, threads);
  run_on_all(threads, [&] { kernel_.partial(flats_.data(), tiles_.list.data(), queue, control, total); });
}

template <class Body> void Stepper::over_spans(int threads, Body body) const {
  threads = team_for(threads, spans_.list.size());
  Queue queue(spans_, threads);
  run_on_all(threads, [&] {
    for (Range range; queue.take(range);)
      for (int64_t i = range.first; i < range.last; ++i) {
        const Columns* const span = &spans_.list[size_t(i)];
        body(i, *span, i + 1 < range.last ? span + 1 : nullptr);
      }
  });
}

void Stepper::finish(const Control& control, const void* total, int threads) const {
  over_spans(threads,
             [&](int64_t, const Columns& span, const Columns*) { kernel_.finish(flats_[0], span, control, total); });
}

void Stepper::add_gradients(const void* const* gradients, void* target, double weight, int threads) const {
  over_spans(threads, [&](int64_t, const Columns& span, const Columns*) {
    method_ops_.add_gradients(flats_[0], span, gradients, target, weight);
  });
}

void Stepper::end_round(const RoundEnd& end, int threads) const {
  over_spans(threads, [&](int64_t, const Columns& span, const Columns* next) {
    method_ops_.end_round(flats_[0], span, next, end);
  });
}

bool Stepper::is_at_phi(int threads) const {
  const Flat& flat = flats_[0];
  const char *const phi = static_cast<const char*>(flat.phi), *const theta = static_cast<const char*>(
                                                                  flat.master ? flat.master : flat.theta);
  std::atomic<bool> same{true};
  over_spans(threads, [&](int64_t, const Columns& span, const Columns*) {
    if (!same.load(std::memory_order_relaxed)) return;
    const size_t first = size_t(flat.segments[span.segment].offset + span.begin) * phi_element_,
                 bytes = size_t(span.end - span.begin) * phi_element_, stride = size_t(flat.stride) * phi_element_;
    for (size_t t = 0; t < size_t(flat.rows); ++t)
      if (std::memcmp(theta + first + t * stride, phi + first, bytes)) same.store(false, std::memory_order_relaxed);
  });
  return same.load();
}

std::vector<double> Stepper::squared_distances(const void* rows, int64_t stride, int threads) const {
  const size_t tasks = size_t(flats_[0].rows);
  std::vector<double> parts(spans_.list.size() * tasks), result(tasks);
  over_spans(threads, [&](int64_t i, const Columns& span, const Columns*) {
    method_ops_.squared_distances(flats_[0], span, rows, stride, &parts[size_t(i) * tasks]);
  });
  for (size_t i = 0; i < parts.size(); ++i) result[i % tasks] += parts[i];
  return result;
}

void Stepper::add_signs(uint64_t key, uint64_t first, double scale, int threads) const {
  std::vector<uint64_t> of_segment;
  for (const Segment& segment : segments_[0]) of_segment.push_back(first), first += uint64_t(segment.numel + 63) / 64;
  over_spans(threads, [&](int64_t, const Columns& span, const Columns*) {
    method_ops_.add_signs(flats_[0], span, key, of_segment[size_t(span.segment)], scale);
  });
}

}  // namespace cts
