// Tiles for one thread, prefetched: the order in which memory is visited, apart from the order in which the kernel computes.
//
// DRAM and the processor's own prefetchers want long runs, the kernel wants one coordinate of all rows at a time. So memory is visited
// here, stream by stream over a whole tile, some tiles before the kernel comes; it finds them in the second cache, where order costs little.
#pragma once

#include "cpu.h"

namespace cts {
inline namespace CTS_ISA {

constexpr int64_t kLine = 64;          // bytes of a cache line
constexpr int64_t kBurst = 8;          // lines of one stream that are asked for at a time
constexpr int64_t kAhead = 144 << 10;  // bytes on their way or waiting: more than a tile of 16 tasks, half of a small second cache

// S: elements of theta, momentum and gradients; C: of phi and the master.
template <class S, class C>
class Ahead {
 public:
  static constexpr bool has_master = sizeof(S) != sizeof(C);
  static constexpr int64_t row_lines = has_master ? 3 + sizeof(C) / sizeof(S) : 3;  // of one row, for a line of theta

  Ahead(const Flat* flats, const Tile* tiles, Queue& queue, const Step& step) : flats_(flats), tiles_(tiles), queue_(queue), step_(step) {
    allow(kAhead / kLine);
  }

  // The next tile for the kernel; null after the last.
  const Tile* follow() {
    if (!(followed_.first < followed_.last) && !next_range(followed_, followed_ranges_)) return nullptr;
    return &tiles_[followed_.first++];
  }

  // The kernel is done with so many lines.
  CTS_HD void allow(int64_t lines) {
    budget_ += lines;
    while (budget_ > 0) burst();
  }

 private:
  static constexpr size_t kRanges = 16;  // that may be taken and not yet followed

  // The next range that this thread has taken, or takes now.
  bool next_range(Range& range, size_t& ranges) {
    if (ranges == taken_) {
      if (taken_ - followed_ranges_ == kRanges) return false;
      if (!queue_.take(taken_ranges_[taken_ % kRanges])) return false;
      ++taken_;
    }
    range = taken_ranges_[ranges++ % kRanges];
    return true;
  }

  // A few lines of the current stream.
  void burst() {
    if (left_ <= 0 && !next_stream()) {
      budget_ = 0;
      return;
    }
    const int64_t lines = left_ < kBurst * kLine ? (left_ + kLine - 1) / kLine : kBurst;
    if (at_)
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(at_ + i * kLine, 0, 2);
    at_ += at_ ? lines * kLine : 0, left_ -= lines * kLine, budget_ -= lines;
  }

  template <class E>
  void visit(const void* base, int64_t first, int64_t columns) {
    at_ = base ? reinterpret_cast<const char*>(static_cast<const E*>(base) + first) : nullptr;
    left_ = columns * int64_t(sizeof(E));
  }

  // phi, then gradient, theta, momentum and master of one row after the other; then the next tile's.
  bool next_stream() {
    constexpr int64_t of_row = has_master ? 4 : 3;
    if (++stream_ >= streams_) {
      if (!(visited_.first < visited_.last) && !next_range(visited_, visited_ranges_)) {
        --stream_;
        return false;
      }
      tile_ = &tiles_[visited_.first++];
      stream_ = 0, streams_ = 1 + of_row * flats_[tile_->flat].rows;
    }
    const Flat& flat = flats_[tile_->flat];
    const Segment& segment = flat.segments[tile_->segment];
    const int64_t columns = tile_->end - tile_->begin, row = (stream_ - 1) / of_row, at = segment.offset + tile_->begin + row * flat.stride;
    if (stream_ == 0) visit<C>(flat.phi, segment.offset + tile_->begin, columns);
    else if ((stream_ - 1) % of_row == 0) visit<S>(step_.gradients[segment.first + row], tile_->begin, columns);
    else if ((stream_ - 1) % of_row == 1) visit<S>(flat.theta, at, columns);
    else if ((stream_ - 1) % of_row == 2) visit<S>(step_.groups[segment.group].momentum != 0 ? flat.momentum : nullptr, at, columns);
    else visit<C>(flat.master, at, columns);
    return true;
  }

  const Flat* flats_;
  const Tile* tiles_;
  Queue& queue_;
  const Step& step_;
  Range taken_ranges_[kRanges], visited_{0, 0}, followed_{0, 0};
  size_t taken_ = 0, visited_ranges_ = 0, followed_ranges_ = 0;
  const Tile* tile_ = nullptr;
  int64_t stream_ = 0, streams_ = 0, left_ = 0, budget_ = 0;
  const char* at_ = nullptr;
};

}  // namespace CTS_ISA
}  // namespace cts
