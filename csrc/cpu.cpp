#include "cpu.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>

namespace cts {
namespace {

constexpr size_t kTileBytes = 48 << 10;   // of all rows of a tile, about
constexpr size_t kRunBytes = 2 << 10;     // of one row of a tile, at least: a long run for DRAM; tiles are whole multiples of it
constexpr int kTogether = 16;             // more rows are stepped in turn, and can do with twice the run
constexpr size_t kThreadBytes = 1 << 16;  // less than that is not worth another thread

size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

Kernel kernel_for(const std::string& isa, DType dtype) {
  const auto names = instruction_sets();
  if (std::find(names.begin(), names.end(), isa) == names.end())
    throw std::invalid_argument("instruction set '" + isa + "' is not available on this machine");
#ifdef CTS_X86
  if (isa == "avx512") return avx512::kernel(dtype);
  if (isa == "avx2") return avx2::kernel(dtype);
#endif
  return plain::kernel(dtype);
}

// libgomp's entry for `#pragma omp parallel`; LLVM's and Intel's runtimes export it too.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<Parallel> shared_parallel{nullptr};

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#ifdef CTS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) names.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) names.push_back("avx2");
#endif
  names.push_back("plain");
  return names;
}

bool share_openmp(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return false;
  shared_parallel = reinterpret_cast<Parallel>(dlsym(handle, "GOMP_parallel"));
  return shared_parallel != nullptr;
}

void run_team(void (*body)(void*), void* data, int threads) {
  if (threads <= 1) return body(data);
  if (Parallel parallel = shared_parallel) return parallel(body, data, unsigned(threads), 0);
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(body, data);
  body(data);
  for (auto& thread : team) thread.join();
}

Plan::Plan(DType dtype, std::vector<Flat> flats, std::vector<std::vector<Segment>> segments, const std::string& isa)
    : dtype_(dtype), flats_(std::move(flats)), segments_(std::move(segments)), kernel_(kernel_for(isa, dtype)) {
  const size_t size = size_of(dtype);
  const auto cut = [&](size_t f, size_t s, int64_t length, std::vector<Tile>& into) {
    const int64_t numel = segments_[f][s].numel;
    for (int64_t begin = 0; begin < numel; begin += length) into.push_back({int32_t(f), int32_t(s), begin, std::min(begin + length, numel)});
  };
  for (size_t f = 0; f < flats_.size(); ++f) {
    flats_[f].segments = segments_[f].data();
    flats_[f].num_segments = int32_t(segments_[f].size());
    const size_t column_bytes = size * 3 * flats_[f].rows;
    const size_t run = kRunBytes / size * (flats_[f].rows > kTogether ? 2 : 1);
    const int64_t length = std::min(kTileElements, int64_t(std::max<size_t>(1, kTileBytes / column_bytes / run) * run));
    for (size_t s = 0; s < segments_[f].size(); ++s) {
      cut(f, s, length, tiles_);
      if (f == 0 && flats_[f].phi) cut(f, s, kTileElements, spans_);
      bytes_ += column_bytes * segments_[f][s].numel;
    }
  }
}

int Plan::team_for(int threads, size_t pieces) const {
  return int(std::min<size_t>({size_t(std::max(threads, 1)), std::max<size_t>(1, bytes_ / kThreadBytes), std::max<size_t>(1, pieces)}));
}

void Plan::step(const Step& step, int threads) const {
  threads = team_for(threads, tiles_.size());
  struct Work {
    const Plan& plan;
    const Step& step;
    Queue queue;
  } work{*this, step, {int64_t(tiles_.size()), std::max<int64_t>(1, int64_t(tiles_.size()) / (8 * threads))}};
  run_team(
      [](void* data) {
        Work& work = *static_cast<Work*>(data);
        work.plan.kernel_(work.plan.flats_.data(), work.plan.tiles_.data(), work.queue, work.step);
      },
      &work, threads);
}

}  // namespace cts
