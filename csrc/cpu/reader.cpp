// Bytes of files and of host memory to a device as fast as the machine moves them; fp8_kernels/loading/engine.py calls
// this through ctypes.
//
// A transfer takes runs of bytes in the order in which they are needed, and cuts them into chunks, which threads read
// into a ring of page-locked slots; one more thread enqueues the copies to the device as soon as they are read, what lies
// in neighbouring slots and goes to neighbouring addresses as one. None of them touches Python, so neither reading nor
// copying waits for the interpreter.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "ring.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fp8_kernels::cpu {
namespace {

constexpr int64_t kTask = 4 << 20;  // bytes of a plain read, for one thread

// These three are mirrored in engine.py.
struct Run {
  int64_t fd;      // -1: host memory
  int64_t offset;  // in the file; an address for host memory
  int64_t bytes;
  uint64_t to;    // address on the device
  int64_t group;  // that it is part of; groups are added whole, and count from 0
  int64_t after;  // copies of this group come after the release of that one; -1 for none
};

struct Options {
  int64_t num_threads;
  int64_t chunk_bytes;
  int64_t max_groups;  // that may be between being copied and being released
  int64_t direct;      // files are open with O_DIRECT
  int64_t on_device;   // 0: copy from host to host
  uint64_t stream;     // of the copies
};

struct Counters {
  int64_t bytes, read_ns, slot_wait_ns, pin_ns, release_wait_ns, pinned_bytes, unpinned_slots;
};

class Transfer {
 public:
  Transfer(Ring& ring, int64_t num_slots, const Options& options)
      : ring_(ring), options_(options), num_slots_(num_slots), batch_ends_(num_slots) {
    if (options_.on_device) {
      driver_ = Driver::get();
      if (driver_ == nullptr || driver_->context_get(&context_) != 0 || context_ == nullptr) {
        driver_ = nullptr;
        fail("no CUDA context is current");
        return;
      }
      batch_events_.resize(num_slots_);
      group_events_.resize(options_.max_groups), release_events_.resize(options_.max_groups);
      for (auto* events : {&batch_events_, &group_events_, &release_events_}) {
        for (void*& event : *events) check(driver_->event_create(&event, Driver::kNoTiming), "cuEventCreate");
      }
    }
    start_threads(threads_, 1, [this] { run(&Transfer::copy_chunks); });
    start_threads(threads_, options_.num_threads, [this] { run(&Transfer::read_chunks); });
    if (threads_.size() < 2) fail("no thread can be started");
  }

  ~Transfer() {
    stop();
    for (std::thread& thread : threads_) thread.join();
    const ContextGuard guard(context_);
    // What was enqueued reads the slots until it is done.
    for (int64_t i = batches_done_; driver_ != nullptr && i < batches_issued_; ++i) {
      while (driver_->event_query(batch_events_[i % num_slots_]) == Driver::kNotReady) std::this_thread::yield();
    }
    for (auto* events : {&batch_events_, &group_events_, &release_events_}) {
      for (void* event : *events) {
        if (event != nullptr) driver_->event_destroy(event);
      }
    }
  }

  void add(const Run* runs, int64_t count) {
    {
      std::lock_guard lock(mutex_);
      for (const Run* run = runs; run != runs + count; ++run) {
        for (int64_t start = 0; start < run->bytes; start += options_.chunk_bytes) {
          Run chunk = *run;
          chunk.offset += start, chunk.to += start;
          chunk.bytes = std::min(options_.chunk_bytes, run->bytes - start);
          chunks_.push_back({chunk, kNotRead});
        }
      }
    }
    added_.notify_all();
    copier_.notify_one();
  }

  // Waits until the copies of a group are enqueued, and then lets `stream` come after them; returns whether they are.
  // What they were read from may change then.
  bool wait(int64_t group, bool follow, void* stream) {
    {
      std::unique_lock lock(mutex_);
      group_issued_.wait(lock, [&] { return stopped_ || groups_issued_ > group; });
      if (groups_issued_ <= group) return false;
    }
    return driver_ == nullptr || !follow ||
           check(driver_->stream_wait(stream, group_events_[group % options_.max_groups], 0), "cuStreamWaitEvent");
  }

  // What is enqueued on `stream` now is the last that uses where the groups up to this one were copied to.
  bool release(int64_t group, void* stream) {
    if (driver_ != nullptr &&
        !check(driver_->event_record(release_events_[group % options_.max_groups], stream), "cuEventRecord")) {
      return false;
    }
    {
      std::lock_guard lock(mutex_);
      released_ = group + 1;
    }
    copier_.notify_one();
    return true;
  }

  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    notify();
  }

  // The first error, and the group that it is of, or -1.
  std::pair<int64_t, std::string> error() {
    std::lock_guard lock(mutex_);
    return {failed_group_, error_};
  }

  Counters counters() const {
    return {bytes_, read_ns_, slot_wait_ns_, pin_ns_, release_wait_ns_, ring_.pinned_bytes(), ring_.unpinned_slots()};
  }

 private:
  static constexpr int32_t kNotRead = -1;

  struct State {
    Run chunk;
    int32_t lead;  // where it begins in its slot, once it is read
  };

  void run(void (Transfer::*work)()) {
    if (driver_ != nullptr && !check(driver_->context_set(context_), "cuCtxSetCurrent")) return;
    try {
      (this->*work)();
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }

  void read_chunks() {
    for (;;) {
      Run chunk;
      int64_t i, slot;
      {
        std::unique_lock lock(mutex_);
        i = next_++, slot = i % num_slots_;
        added_.wait(lock, [&] { return stopped_ || i < num_chunks(); });
        const auto start = Clock::now();
        chunk_issued_.wait(lock, [&] { return stopped_ || issued_ > i - num_slots_; });
        if (stopped_) return;
        slot_wait_ns_ += nanoseconds_since(start);
        chunk = chunks_[i].chunk;
      }
      if (driver_ != nullptr && i >= num_slots_ && !wait_for_copy(i - num_slots_)) return;
      auto start = Clock::now();
      int64_t lead = 0;
      if (chunk.fd < 0) {
        memcpy(ring_.slot(slot), reinterpret_cast<const void*>(chunk.offset), chunk.bytes);
      } else {
        lead = read_run(chunk.fd, chunk.offset, chunk.bytes, ring_.slot(slot), options_.direct);
      }
      read_ns_ += nanoseconds_since(start);
      if (lead < 0) {
        fail(lead == -1 ? "the file ends before its header says" : strerror(static_cast<int>(-1 - lead)), chunk.group);
        return;
      }
      bytes_ += chunk.bytes;
      if (driver_ != nullptr) {
        start = Clock::now();
        ring_.lock(slot);
        pin_ns_ += nanoseconds_since(start);
      }
      bool is_next;
      {
        std::lock_guard lock(mutex_);
        chunks_[i].lead = static_cast<int32_t>(lead);
        is_next = i == issued_;
      }
      if (is_next) copier_.notify_one();
    }
  }

  // Waits until the copy of a chunk, which is enqueued, is done. One thread at a time asks the driver, whose lock the
  // thread that enqueues needs too.
  bool wait_for_copy(int64_t i) {
    const auto start = Clock::now();
    while (copied_ <= i) {
      {
        const std::unique_lock asking(asking_, std::try_to_lock);
        if (asking && !ask_what_is_copied()) return false;
      }
      if (copied_ <= i) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    slot_wait_ns_ += nanoseconds_since(start);
    return true;
  }

  bool ask_what_is_copied() {
    for (; batches_done_ < batches_issued_; ++batches_done_) {
      const int64_t batch = batches_done_ % num_slots_;
      const int error = driver_->event_query(batch_events_[batch]);
      if (error == Driver::kNotReady) return true;
      if (!check(error, "cuEventQuery")) return false;
      copied_ = batch_ends_[batch];
    }
    return true;
  }

  void copy_chunks() {
    int64_t group = -1;  // that the last chunk was of
    for (int64_t i = 0, end; ; i = end) {
      Run run;  // chunks [i, end)
      const char* from;
      bool first, last;
      {
        std::unique_lock lock(mutex_);
        copier_.wait(lock, [&] { return stopped_ || is_read(i); });
        if (stopped_) return;
        run = chunks_[i].chunk, from = ring_.slot(i % num_slots_) + chunks_[i].lead;
        first = run.group != group, group = run.group;
        if (first && released_ <= run.after) {
          const auto start = Clock::now();
          copier_.wait(lock, [&] { return stopped_ || released_ > run.after; });
          release_wait_ns_ += nanoseconds_since(start);
          if (stopped_) return;
        }
        for (end = i + 1; is_read(end) && continues(end); ++end) run.bytes += chunks_[end].chunk.bytes;
        last = end == num_chunks() || chunks_[end].chunk.group != group;
      }
      if (driver_ == nullptr) {
        memcpy(reinterpret_cast<void*>(run.to), from, run.bytes);
      } else if (!enqueue(run, from, end, first, last)) {
        return;
      }
      {
        std::lock_guard lock(mutex_);
        issued_ = end;
        if (last) groups_issued_ = group + 1;
      }
      chunk_issued_.notify_all();
      if (last) group_issued_.notify_all();
    }
  }

  int64_t num_chunks() const { return static_cast<int64_t>(chunks_.size()); }
  bool is_read(int64_t i) const { return i < num_chunks() && chunks_[i].lead != kNotRead; }

  // Does a chunk go on where the one before it ends, in the ring, on the device and in its group?
  bool continues(int64_t i) const {
    const State &before = chunks_[i - 1], &state = chunks_[i];
    return before.chunk.group == state.chunk.group && before.chunk.to + before.chunk.bytes == state.chunk.to &&
           before.lead == 0 && state.lead == 0 && ring_.adjoins_next((i - 1) % num_slots_, before.chunk.bytes);
  }

  // A batch: the copy of chunks up to `end`, and the event after it. As each holds a slot at least, and a slot is used
  // again only when its batch is known to be done, so is a batch's event.
  bool enqueue(const Run& run, const char* from, int64_t end, bool first, bool last) {
    void* stream = reinterpret_cast<void*>(options_.stream);
    if (first && run.after >= 0) {
      void* released = release_events_[run.after % options_.max_groups];
      if (!check(driver_->stream_wait(stream, released, 0), "cuStreamWaitEvent")) return false;
    }
    const int64_t batch = batches_issued_ % num_slots_;
    void* copied = group_events_[run.group % options_.max_groups];
    if (!check(driver_->copy_to_device(run.to, from, run.bytes, stream), "cuMemcpyHtoDAsync") ||
        !check(driver_->event_record(batch_events_[batch], stream), "cuEventRecord")) {
      return false;
    }
    batch_ends_[batch] = end;
    ++batches_issued_;
    return !last || check(driver_->event_record(copied, stream), "cuEventRecord");
  }

  bool check(int error, const char* call) {
    if (error == 0) return true;
    const char* name = nullptr;
    driver_->error_name(error, &name);
    fail(std::string(call) + ": " + (name != nullptr ? name : std::to_string(error)));
    return false;
  }

  void fail(const std::string& what, int64_t group = -1) {
    {
      std::lock_guard lock(mutex_);
      if (error_.empty()) error_ = what, failed_group_ = group;
      stopped_ = true;
    }
    notify();
  }

  void notify() {
    for (auto* waiting : {&added_, &copier_, &chunk_issued_, &group_issued_}) waiting->notify_all();
  }

  Ring& ring_;
  const Options options_;
  const int64_t num_slots_;
  const Driver* driver_ = nullptr;
  void* context_ = nullptr;
  std::vector<void*> batch_events_, group_events_, release_events_;
  std::vector<std::thread> threads_;
  std::atomic<int64_t> batches_issued_{0}, copied_{0};  // chunks before this one are copied
  std::vector<int64_t> batch_ends_;                     // behind the last chunk of each
  std::mutex asking_;                                   // of the next
  int64_t batches_done_ = 0;
  std::atomic<int64_t> bytes_{0}, read_ns_{0}, slot_wait_ns_{0}, pin_ns_{0}, release_wait_ns_{0};

  std::mutex mutex_;  // of all that follows
  std::condition_variable added_, copier_, chunk_issued_, group_issued_;
  std::deque<State> chunks_;
  int64_t next_ = 0, issued_ = 0, groups_issued_ = 0, released_ = 0;
  bool stopped_ = false;
  std::string error_;
  int64_t failed_group_ = -1;
};

// Exceptions end here: the caller is C.
template <typename Function>
auto guarded(const Function& f, decltype(f()) otherwise) {
  try {
    return f();
  } catch (const std::exception&) {
    return otherwise;
  }
}

// Of an engine's slots; with `direct` they have room for the pages around a chunk.
EXPORT void* fp8_ring_create(int64_t slot_bytes, int64_t num_slots, int direct, int lock) {
  return guarded([&] { return static_cast<void*>(new Ring(slot_bytes, num_slots, direct ? 2 * kPage : 0, lock)); },
                 nullptr);
}
EXPORT void fp8_ring_destroy(void* ring) { delete static_cast<Ring*>(ring); }

EXPORT void* fp8_transfer_create(void* ring, int64_t num_slots, const Options* options) {
  return guarded([&] { return static_cast<void*>(new Transfer(*static_cast<Ring*>(ring), num_slots, *options)); },
                 nullptr);
}
EXPORT int fp8_transfer_add(void* transfer, const Run* runs, int64_t count) {
  return guarded([&] { return static_cast<Transfer*>(transfer)->add(runs, count), 1; }, 0);
}
EXPORT int fp8_transfer_wait(void* transfer, int64_t group, int follow, void* stream) {
  return static_cast<Transfer*>(transfer)->wait(group, follow, stream);
}
EXPORT int fp8_transfer_release(void* transfer, int64_t group, void* stream) {
  return static_cast<Transfer*>(transfer)->release(group, stream);
}
EXPORT int64_t fp8_transfer_error(void* transfer, char* text, int64_t size) {
  const auto [group, what] = static_cast<Transfer*>(transfer)->error();
  snprintf(text, size, "%s", what.c_str());
  return group;
}
EXPORT void fp8_transfer_counters(void* transfer, Counters* counters) {
  *counters = static_cast<Transfer*>(transfer)->counters();
}
EXPORT void fp8_transfer_destroy(void* transfer) { delete static_cast<Transfer*>(transfer); }

// Rows of `row_bytes` that begin `stride` apart in a file, one below the other in memory; 0, or as read_run fails.
EXPORT int64_t fp8_read_rows(int64_t fd, int64_t offset, int64_t stride, int64_t row_bytes, int64_t num_rows, void* to,
                             int64_t num_threads) {
  if (stride == row_bytes) {  // one run, cut for the threads
    const int64_t total = row_bytes * num_rows;
    stride = row_bytes = 1, num_rows = total;
  }
  const bool dense = row_bytes == 1 && stride == 1;
  const int64_t per_task = std::max<int64_t>(1, kTask / std::max<int64_t>(1, row_bytes));
  const int64_t tasks = (num_rows + per_task - 1) / per_task;
  std::atomic<int64_t> next{0}, failed{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t begin = task * per_task, end = std::min(num_rows, begin + per_task);
      for (int64_t row = begin; row < end && failed == 0; row = dense ? end : row + 1) {
        char* at = static_cast<char*>(to) + row * row_bytes;
        const int64_t result = read_run(fd, offset + row * stride, dense ? end - begin : row_bytes, at, false);
        if (result < 0) failed = result;
      }
    }
  };
  return guarded(
      [&] {
        std::vector<std::thread> threads;
        start_threads(threads, std::min(num_threads, tasks) - 1, work);
        work();
        for (std::thread& thread : threads) thread.join();
        return failed.load();
      },
      int64_t{-1 - EAGAIN});
}

}  // namespace
}  // namespace fp8_kernels::cpu
