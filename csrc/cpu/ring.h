// Host memory that a device reads fast, and how files are read into it.
#pragma once

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
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

// Slots of host memory in huge pages, each page-locked when it is first used, by the thread that uses it.
class Ring {
 public:
  Ring(int64_t slot_bytes, int64_t num_slots, bool lock)
      : slot_bytes_(ceil_to(slot_bytes + 2 * kPage, kPage)), lock_(lock), state_(num_slots) {
    mapped_bytes_ = slot_bytes_ * num_slots + kHugePage;
    void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapped_ = memory;
    base_ = reinterpret_cast<char*>(ceil_to(reinterpret_cast<intptr_t>(memory), kHugePage));
#ifdef MADV_HUGEPAGE
    madvise(base_, slot_bytes_ * num_slots, MADV_HUGEPAGE);
#endif
#ifdef MADV_DONTFORK
    madvise(base_, slot_bytes_ * num_slots, MADV_DONTFORK);  // a child would write into pages that a device reads
#endif
  }

  ~Ring() {
    const ContextGuard guard(context_);
    for (int64_t i = 0; i < num_slots(); ++i) {
      if (state_[i] == kPinned) Driver::get()->host_unregister(slot(i));
    }
    munmap(mapped_, mapped_bytes_);
  }

  int64_t num_slots() const { return static_cast<int64_t>(state_.size()); }
  int64_t slot_bytes() const { return slot_bytes_; }
  char* slot(int64_t i) const { return base_ + i * slot_bytes_; }

  // Called by one thread at a time for a slot. Where the system refuses, the slot stays as it is: copies out of it are
  // slower, and right.
  void prepare(int64_t i) {
    if (state_[i] != kUnused) return;
    if (i == 0) Driver::get()->context_get(&context_);
    for (int64_t at = 0; at < slot_bytes_; at += kPage) slot(i)[at] = 0;  // here, not in the driver under its lock
    const bool locked = lock_ && Driver::get()->host_register(slot(i), slot_bytes_, Driver::kPortable) == 0;
    state_[i] = locked ? kPinned : kRefused;
  }

  int64_t count(char state) const { return std::count(state_.begin(), state_.end(), state); }

  static constexpr char kUnused = 0, kPinned = 1, kRefused = 2;

 private:
  int64_t slot_bytes_, mapped_bytes_;
  bool lock_;
  std::vector<std::atomic<char>> state_;
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
