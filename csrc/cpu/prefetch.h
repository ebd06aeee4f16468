// Tiles for one thread, prefetched: the order in which memory is visited, apart from the order in which the kernel
// computes.
//
// DRAM and the processor's own prefetchers want long runs. A kernel that steps one coordinate of all rows at a time
// finds its tiles in the second cache, where order costs little: memory is visited here stream by stream over a whole
// tile, some tiles before the kernel comes. A kernel that steps row after row makes long runs itself: here the next row
// is visited as it goes, line by line of all streams.
#pragma once

#include "cpu/stepper.h"
#include "cpu/vec.h"

namespace cts {
inline namespace CTS_ISA {

constexpr int64_t kLine = 64;  // bytes of a cache line
// Up to so many rows are stepped together, one coordinate of all of them at a time, where there are registers for them
// and a vector is a whole line; elsewhere rows are stepped in turn.
constexpr int kTogether = kVectorBytes < kLine ? 1 : 16;
constexpr bool kInTurn = kTogether == 1;
constexpr int64_t kBurst = kInTurn ? 1 : 8;  // lines of one stream that are asked for at a time
// Bytes on their way or waiting: two rows of a page; or half of a small second cache, and more than a tile whose rows
// are stepped together.
constexpr int64_t kAhead = (kInTurn ? 24 : 144) << 10;

// S: elements of theta, momentum and gradients; C: of phi and the master. Lines are counted in columns: as many as fill
// a line with S.
template <class S, class C> class Prefetcher {
 public:
  static constexpr bool has_master = sizeof(S) != sizeof(C);

  Prefetcher(const Flat* flats, const Columns* tiles, Queue& queue, const Control& control)
      : flats_(flats), tiles_(tiles), queue_(queue), control_(control) {
    allow(kAhead / kLine);
  }

  // The next tile for the kernel; null after the last.
  const Columns* follow() {
    if (followed_.first == followed_.last) {
      if (followed_ranges_ == taken_ && !take(true)) return nullptr;
      followed_ = ranges_[followed_ranges_++ % kRanges];
    }
    return &tiles_[followed_.first++];
  }

  // Lines of one stream over a tile.
  static CTS_HD int64_t lines(const Columns& tile) { return (tile.end - tile.begin + kColumns - 1) / kColumns; }

  // Whether phi is among what is visited.
  static CTS_HD bool visits_phi(const Control& control) { return control.meta_update || control.reset; }

  // What a row is made of: gradient, theta, momentum and master.
  static CTS_HD int64_t streams(const S* g, bool has_momentum) {
    return (g != nullptr) + 1 + has_momentum + has_master;
  }

  // The kernel is done with so many lines.
  CTS_HD void allow(int64_t lines) {
    budget_ += lines;
    if (budget_ > 0) spend();
  }

 private:
  static constexpr int64_t kColumns = kLine / int64_t(sizeof(S));
  static constexpr size_t kRanges = 16;  // that may be taken and not yet followed

  void spend() {
    while (budget_ > 0 && (left_ > 0 || next_streams())) {
      const int64_t lines = left_ < kBurst ? left_ : kBurst;
      for (int s = 0; s < count_; ++s) {
        for (int64_t i = 0; i < lines * bytes_[s]; i += kLine) __builtin_prefetch(at_[s] + i, 0, 2);
        at_[s] += lines * bytes_[s];
      }
      left_ -= lines, budget_ -= lines * count_;
    }
    if (budget_ > kAhead / kLine) budget_ = kAhead / kLine;  // nothing was left to visit for a while
  }

  // One more range: of this thread's own share, or, for a kernel that has nothing else to do, of anybody's.
  bool take(bool steals) {
    if (taken_ - followed_ranges_ == kRanges || !queue_.take(ranges_[taken_ % kRanges], steals)) return false;
    ++taken_;
    return true;
  }

  // The tile to visit next; null while the kernel has to come first, and at the end.
  const Columns* next_tile() {
    if (visited_.first == visited_.last) {
      if (visited_ranges_ + 1 < followed_ranges_) visited_ranges_ = followed_ranges_ - 1;  // the kernel has come past
      if (visited_ranges_ == taken_ && (own_is_empty_ || !take(false))) {
        own_is_empty_ |= taken_ - followed_ranges_ < kRanges;
        return nullptr;
      }
      visited_ = ranges_[visited_ranges_++ % kRanges];
    }
    return &tiles_[visited_.first++];
  }

  // phi, then gradient, theta, momentum and master of one row after the other; then the next tile's. Those that are not
  // there are left out. Row after row they come together, else each alone.
  bool next_streams() {
    constexpr int64_t of_row = has_master ? 4 : 3;
    count_ = 0;
    do {
      if (!tile_ || ++stream_ > of_row * flats_[tile_->flat].rows) {
        tile_ = next_tile();
        if (!tile_) return false;
        stream_ = 0;
      }
      const Flat& flat = flats_[tile_->flat];
      const Segment& segment = flat.segments[tile_->segment];
      const int64_t row = (stream_ - 1) / of_row, at = segment.offset + tile_->begin + row * flat.stride;
      if (stream_ == 0) visit<C>(visits_phi(control_) ? flat.phi : nullptr, segment.offset + tile_->begin);
      else if ((stream_ - 1) % of_row == 0) visit<S>(control_.gradients[segment.first + row], tile_->begin);
      else if ((stream_ - 1) % of_row == 1) visit<S>(flat.theta, at);
      else if ((stream_ - 1) % of_row == 2)
        visit<S>(control_.groups[segment.group].momentum != 0 ? flat.momentum : nullptr, at);
      else visit<C>(flat.master, at);
    } while (!count_ || (kInTurn && stream_ > 0 && stream_ % of_row != 0));
    left_ = lines(*tile_);
    return true;
  }

  template <class E> void visit(const void* base, int64_t first) {
    if (!base) return;
    at_[count_] = reinterpret_cast<const char*>(static_cast<const E*>(base) + first);
    bytes_[count_++] = kColumns * int64_t(sizeof(E));
  }

  const Flat* flats_;
  const Columns* tiles_;
  Queue& queue_;
  const Control& control_;
  Range ranges_[kRanges], visited_{0, 0}, followed_{0, 0};
  size_t taken_ = 0, visited_ranges_ = 0, followed_ranges_ = 0;
  bool own_is_empty_ = false;
  const Columns* tile_ = nullptr;
  int64_t stream_ = 0, left_ = 0, budget_ = 0;
  int count_ = 0;  // streams that are visited now, side by side
  int64_t bytes_[4];
  const char* at_[4];
};

}  // namespace CTS_ISA
}  // namespace cts
