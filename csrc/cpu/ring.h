// Host memory that a device reads fast, and how files are read into it.
#pragma once

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "driver.h"

namespace fp8_kernels::cpu {

using Clock = std::chrono::steady_clock;
constexpr int64_t kPage = 4096;  // alignment of direct reads
constexpr int64_t kHugePage = 2 << 20;

inline int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

inline int64_t nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

// Bytes [offset, offset + bytes) of a file to `to`. With `direct` whole pages around them are read, to memory that is
// aligned and two pages larger. Returns how far behind `to` they begin, -1 at the file's end, or -1 - errno.
inline int64_t read_run(int64_t fd, int64_t offset, int64_t bytes, char* to, bool direct) {
  const int64_t lead = direct ? offset % kPage : 0;
  const int64_t first = offset - lead, needed = lead + bytes;
  const int64_t wanted = direct ? ceil_to(needed, kPage) : needed;
  int64_t done = 0;
  while (done < needed) {
    const ssize_t got = pread(static_cast<int>(fd), to + done, wanted - done, first + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1 - errno;
    done += got;
    if (done >= needed) break;
    if (direct) done = done / kPage * kPage;  // where the next read may begin
    if (got == 0 || (direct && got < kPage)) return -1;
  }
  return lead;
}

// Slots of host memory in huge pages, one behind the other, page-locked in blocks of several: one copy may take what lies
// in neighbouring slots of a block, and none may reach over the end of what was locked as a whole.
class Ring {
 public:
  // `padding` is room behind each slot, so that whole pages around what it holds fit.
  Ring(int64_t slot_bytes, int64_t num_slots, int64_t padding, bool lock)
      : stride_(ceil_to(slot_bytes + padding, kPage)),
        num_slots_(num_slots),
        block_slots_(std::max<int64_t>(1, kBlock / stride_)),
        lock_(lock && Driver::get() != nullptr),
        state_((num_slots + block_slots_ - 1) / block_slots_) {
    mapped_bytes_ = stride_ * num_slots + kHugePage;
    void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapped_ = memory;
    base_ = reinterpret_cast<char*>(ceil_to(reinterpret_cast<intptr_t>(memory), kHugePage));
    // Whatever thread destroys it: memory that stays registered when it is gone would be taken for what is mapped next.
    if (lock_) Driver::get()->context_get(&context_);
#ifdef MADV_HUGEPAGE
    madvise(base_, stride_ * num_slots, MADV_HUGEPAGE);
#endif
#ifdef MADV_DONTFORK
    madvise(base_, stride_ * num_slots, MADV_DONTFORK);  // a child would write into pages that a device reads
#endif
  }

  ~Ring() {
    const ContextGuard guard(context_);
    for (int64_t i = 0; i < num_blocks(); ++i) {
      if (state_[i] == kPinned) Driver::get()->host_unregister(slot(i * block_slots_));
    }
    munmap(mapped_, mapped_bytes_);
  }

  char* slot(int64_t i) const { return base_ + i * stride_; }

  // May one copy go on from slot `i`, which holds that many bytes, into the next?
  bool adjoins_next(int64_t i, int64_t bytes) const {
    return bytes == stride_ && i + 1 < num_slots_ && (i + 1) % block_slots_ != 0;
  }

  // To be called between reading into a slot and copying out of it: by then its pages are there, made by the threads
  // that read and not by the driver under its lock. Where the system refuses, copies are slower, and right.
  void lock(int64_t i) {
    const int64_t block = i / block_slots_;
    if (state_[block] != kUnused) return;
    const std::lock_guard guard(locking_);
    if (state_[block] != kUnused) return;
    const int64_t first = block * block_slots_, bytes = slots_in(block) * stride_;
    const bool locked = lock_ && Driver::get()->host_register(slot(first), bytes, Driver::kPortable) == 0;
    state_[block] = locked ? kPinned : kRefused;
  }

  int64_t pinned_bytes() const { return slots_that_are(kPinned) * stride_; }
  int64_t unpinned_slots() const { return slots_that_are(kRefused); }

 private:
  static constexpr int64_t kBlock = 16 << 20;
  static constexpr char kUnused = 0, kPinned = 1, kRefused = 2;

  int64_t num_blocks() const { return static_cast<int64_t>(state_.size()); }
  int64_t slots_in(int64_t block) const { return std::min(block_slots_, num_slots_ - block * block_slots_); }
  int64_t slots_that_are(char state) const {
    int64_t found = 0;
    for (int64_t i = 0; i < num_blocks(); ++i) found += state_[i] == state ? slots_in(i) : 0;
    return found;
  }

  int64_t stride_, num_slots_, block_slots_, mapped_bytes_;
  bool lock_;
  std::mutex locking_;
  std::vector<std::atomic<char>> state_;  // of blocks
  void *mapped_ = nullptr, *context_ = nullptr;
  char* base_ = nullptr;
};

// As many threads as the system gives.
template <typename Function>
void start_threads(std::vector<std::thread>& threads, int64_t count, const Function& work) {
  threads.reserve(threads.size() + count);
  try {
    for (int64_t i = 0; i < count; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {
  }
}

}  // namespace fp8_kernels::cpu
