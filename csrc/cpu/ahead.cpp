// Copies out of file mappings and of other host memory, for loaders that ask for one tensor after another;
// fp8_kernels/loading/prefetch.py calls this through ctypes.
//
// Threads read what was asked for, and beyond it as long as the asking goes on in the file's order, into a ring of
// page-locked slots; the caller enqueues the copies out of them on its own stream, of neighbouring slots as one. A guess
// that was wrong is forgotten: bytes are used only where the position that was asked for is the one that was read.
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>

#include "ring.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fp8_kernels::cpu {
namespace {

constexpr int64_t kMemory = -1;          // in the place of a file
constexpr int64_t kGap = 1 << 20;        // asking goes on in order if it leaves out no more than this
constexpr int64_t kSmallest = 256 << 10; // of a piece; a single smaller one is not worth two threads
constexpr int64_t kDeclined = 0, kDone = 1;

// Mirrored in prefetch.py.
struct Counters {
  int64_t asked_bytes, read_bytes, read_ns, wait_ns, declined, restarts, pinned_bytes;
};

// Equal runs of bytes in memory that begin `pitch` apart; the position of a byte is counted in what they are together.
struct Rows {
  const char* first = nullptr;
  int64_t bytes = 1, pitch = 1;

  void read(int64_t at, int64_t count, char* to) const {
    if (pitch == bytes) {
      memcpy(to, first + at, count);
      return;
    }
    for (const char* row = first + at / bytes * pitch; count > 0; row += pitch, to += bytes, count -= bytes) {
      memcpy(to, row, bytes);
    }
  }
};

// A thread that has not used the device yet has no context, or another's.
class InContext {
 public:
  InContext(const Driver* driver, void* context) : driver_(driver) {
    if (driver_ == nullptr || driver_->context_get(&before_) != 0 || before_ == context) driver_ = nullptr;
    if (driver_ != nullptr) driver_->context_set(context);
  }
  ~InContext() {
    if (driver_ != nullptr) driver_->context_set(before_);
  }

 private:
  const Driver* driver_;
  void* before_ = nullptr;
};

class Ahead {
 public:
  Ahead(int64_t slot_bytes, int64_t num_slots, int64_t num_threads, bool on_device)
      : ring_(slot_bytes, num_slots, 0, true), slots_(num_slots), slot_bytes_(slot_bytes) {
    if (on_device) {
      driver_ = Driver::get();
      if (driver_ == nullptr || driver_->context_get(&context_) != 0 || context_ == nullptr) {
        driver_ = nullptr;
        stopped_ = true;
        return;
      }
      events_.resize(num_slots);
      for (void*& event : events_) {
        if (driver_->event_create(&event, Driver::kNoTiming) != 0) stopped_ = true;
      }
    }
    start_threads(threads_, num_threads, [this] { read_pieces(); });
    if (threads_.empty()) stopped_ = true;
  }

  ~Ahead() {
    {
      std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    wanted_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    const InContext in_context(driver_, context_);
    for (void* event : events_) {  // one that was never recorded counts as done
      if (event == nullptr) continue;
      while (driver_->event_query(event) == Driver::kNotReady) std::this_thread::yield();
      driver_->event_destroy(event);
    }
  }

  bool usable() const { return !stopped_; }

  // Enqueues the copy of bytes [offset, offset + bytes) of a file (kMemory: of `rows`) to `to` on `stream`. What they
  // are read from is read when this returns; reading goes on up to `limit`. kDone, kDeclined where another way is
  // better, and nothing was done; or as read_run fails, or -1000 - error of the driver.
  int64_t copy(int64_t fd, int64_t offset, int64_t bytes, int64_t limit, uint64_t to, void* stream, Rows rows = {}) {
    std::lock_guard calling(calling_);
    const InContext in_context(driver_, context_);
    std::unique_lock lock(mutex_);
    if (stopped_ || rows.bytes > slot_bytes_) return kDeclined;
    rows_ = rows;
    if (!aim(fd, offset, bytes, limit)) {
      ++declined_;
      return kDeclined;
    }
    asked_bytes_ += bytes;
    while (bytes > 0) {
      Piece& piece = pieces_.front();
      if (piece.state < kRead) {
        const auto start = Clock::now();
        read_.wait(lock, [&] { return stopped_ || piece.state >= kRead; });
        wait_ns_ += nanoseconds_since(start);
      }
      if (stopped_ || piece.state == kFailed) {
        const int64_t error = stopped_ ? kDeclined : piece.error;
        forget_and_wait(lock);
        return error;
      }
      const int64_t skipped = offset - piece.offset;
      int64_t count = piece.bytes - skipped;
      size_t joined = 1;  // pieces that one copy takes
      while (count < bytes && joined < pieces_.size() && pieces_[joined].state == kRead &&
             ring_.adjoins_next((first_ + joined - 1) % num_slots(), pieces_[joined - 1].bytes)) {
        count += pieces_[joined++].bytes;
      }
      const int64_t whole = count <= bytes ? joined : joined - 1;  // those that nothing more is taken of
      count = std::min(count, bytes);
      const char* from = ring_.slot(first_ % num_slots()) + skipped;
      // The front pieces and their slots are the caller's until they are dropped.
      lock.unlock();
      const int64_t error = enqueue(from, count, to, stream);
      lock.lock();
      for (size_t i = 0; i < joined; ++i) slots_[(first_ + i) % num_slots()].batch = batches_closed_;
      batch_is_open_ = true;
      if (error != 0) {
        forget_and_wait(lock);
        return -1000 - error;
      }
      offset += count, to += count, bytes -= count;
      for (int64_t i = 0; i < whole; ++i) drop_front();
      extend();
    }
    reached_ = offset;
    return kDone;
  }

  // What was read ahead is not valid any more; no file is read when this returns.
  void forget_all() {
    std::lock_guard calling(calling_);
    std::unique_lock lock(mutex_);
    forget_and_wait(lock);
  }

  Counters counters() {
    std::lock_guard lock(mutex_);
    return {asked_bytes_, read_bytes_, read_ns_, wait_ns_, declined_, restarts_, ring_.pinned_bytes()};
  }

 private:
  enum State { kWanted, kReading, kRead, kFailed };

  struct Piece {
    int64_t fd, offset, bytes;
    State state;
    int64_t error;
  };

  struct Slot {
    int64_t batch = -1;  // that the last copy out of it is of
    bool reading = false;
  };

  int64_t num_slots() const { return static_cast<int64_t>(slots_.size()); }
  int64_t end() const { return first_ + static_cast<int64_t>(pieces_.size()); }

  // Makes the front piece the one that `offset` is in, and all of the asked bytes wanted; false where that is no use.
  bool aim(int64_t fd, int64_t offset, int64_t bytes, int64_t limit) {
    const bool is_file = fd != kMemory;
    const bool in_order = is_file && fd == fd_ && offset >= reached_ && offset - reached_ <= kGap;
    if (!in_order && is_file && bytes < kSmallest) {
      forget();
      fd_ = fd, reached_ = offset + bytes;  // whether it goes on in order shows with the next one
      return false;
    }
    while (in_order && !pieces_.empty() && pieces_.front().offset + pieces_.front().bytes <= offset) drop_front();
    if (!in_order || pieces_.empty() || offset < pieces_.front().offset) {
      forget();
      ++restarts_;
      fd_ = fd, next_ = offset;
    }
    limit_ = limit, asked_to_ = offset + bytes;
    const int64_t most = (num_slots() - 1) * slot_bytes_;
    ahead_ = in_order ? std::min(most, std::max(2 * ahead_, 4 * slot_bytes_)) : 0;
    // The less there is to read, the smaller its pieces, so that every thread has one.
    const int64_t share = ceil_to(bytes / static_cast<int64_t>(threads_.size()) + 1, kPage);
    piece_bytes_ = ahead_ > 0 ? slot_bytes_ : std::clamp(share, kSmallest, slot_bytes_);
    if (!is_file) piece_bytes_ = std::max(piece_bytes_ / rows_.bytes, int64_t{1}) * rows_.bytes;  // whole rows
    extend();
    return true;
  }

  void extend() {
    const int64_t to = std::min(limit_, asked_to_ + ahead_);
    while (next_ < to && end() - first_ < num_slots()) {
      const int64_t bytes = std::min(piece_bytes_, to - next_);
      pieces_.push_back({fd_, next_, bytes, kWanted, 0});
      next_ += bytes;
      wanted_.notify_one();
    }
  }

  void drop_front() {
    close_batch();
    pieces_.pop_front();
    ++first_;
    next_to_read_ = std::max(next_to_read_, first_);
  }

  void forget() {
    while (!pieces_.empty()) drop_front();
    fd_ = kMemory, ahead_ = 0;
  }

  // Nothing of what was asked for is read when this returns.
  void forget_and_wait(std::unique_lock<std::mutex>& lock) {
    forget();
    read_.wait(lock, [&] { return std::none_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.reading; }); });
  }

  // A batch is the copies up to where a piece is given up, used up or not, and the event after the last of them. It is
  // closed before another thread may read into the piece's slot: that thread waits for the event, and could wait for ever.
  void close_batch() {
    if (batch_is_open_) ++batches_closed_;
    batch_is_open_ = false;
  }

  void read_pieces() {
    if (driver_ != nullptr && driver_->context_set(context_) != 0) return;
    std::unique_lock lock(mutex_);
    for (;;) {
      wanted_.wait(lock, [&] {
        return stopped_ || (next_to_read_ < end() && !slots_[next_to_read_ % num_slots()].reading);
      });
      if (stopped_) return;
      const int64_t i = next_to_read_++, number = i % num_slots();
      const Piece piece = pieces_[i - first_];
      const Rows rows = rows_;
      pieces_[i - first_].state = kReading;
      Slot& slot = slots_[number];
      slot.reading = true;
      const int64_t batch = slot.batch;
      lock.unlock();
      int64_t error = wait_for_copies(batch);
      const auto start = Clock::now();
      if (error == 0 && piece.fd == kMemory) {
        rows.read(piece.offset, piece.bytes, ring_.slot(number));
      } else if (error == 0) {
        error = read_run(piece.fd, piece.offset, piece.bytes, ring_.slot(number), false);
      }
      if (error == 0 && driver_ != nullptr) ring_.lock(number);
      const int64_t spent = nanoseconds_since(start);
      lock.lock();
      slot.reading = false;
      read_ns_ += spent, read_bytes_ += piece.bytes;
      if (i >= first_) {  // else it was forgotten meanwhile
        pieces_[i - first_].error = error;
        pieces_[i - first_].state = error == 0 ? kRead : kFailed;
        if (i == first_) read_.notify_all();
      } else {
        wanted_.notify_all();  // whoever reads into this slot next
        read_.notify_all();
      }
    }
  }

  // Waits until a batch is done. One thread at a time asks the driver, whose lock the caller needs too.
  int64_t wait_for_copies(int64_t batch) {
    while (driver_ != nullptr && batches_done_ <= batch) {
      {
        const std::unique_lock asking(asking_, std::try_to_lock);
        for (; asking && batches_done_ < batches_closed_; ++batches_done_) {
          const int error = driver_->event_query(events_[batches_done_ % num_slots()]);
          if (error == Driver::kNotReady) break;
          if (error != 0) return -1000 - error;
        }
      }
      if (batches_done_ <= batch) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return 0;
  }

  int64_t enqueue(const char* from, int64_t bytes, uint64_t to, void* stream) {
    if (driver_ == nullptr) {
      memcpy(reinterpret_cast<void*>(to), from, bytes);
      return 0;
    }
    // Batches are done in their order, so a copy comes after those of other streams. An event that stands for an earlier
    // batch still then stands for this one too, and is only later.
    int error = last_event_ != nullptr && last_stream_ != stream ? driver_->stream_wait(stream, last_event_, 0) : 0;
    if (error == 0) error = driver_->copy_to_device(to, from, bytes, stream);
    if (error == 0) error = driver_->event_record(events_[batches_closed_ % num_slots()], stream);
    last_event_ = events_[batches_closed_ % num_slots()], last_stream_ = stream;
    return error;
  }

  Ring ring_;
  std::vector<Slot> slots_;
  const int64_t slot_bytes_;
  const Driver* driver_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> threads_;

  std::vector<void*> events_;  // of batches
  std::atomic<int64_t> batches_closed_{0}, batches_done_{0};
  std::mutex asking_;  // what is done

  std::mutex calling_;  // callers come one at a time
  void *last_event_ = nullptr, *last_stream_ = nullptr;
  bool batch_is_open_ = false;

  std::mutex mutex_;    // of all that follows, and of the slots
  std::condition_variable wanted_, read_;
  Rows rows_;                 // of memory that is copied
  std::deque<Piece> pieces_;  // the front is the one that was asked for last
  int64_t first_ = 0, next_to_read_ = 0;  // numbers of pieces; a piece's slot is its number modulo the slots
  int64_t fd_ = kMemory, reached_ = 0, next_ = 0, limit_ = 0, asked_to_ = 0, ahead_ = 0, piece_bytes_ = 0;
  bool stopped_ = false;
  int64_t asked_bytes_ = 0, read_bytes_ = 0, read_ns_ = 0, wait_ns_ = 0, declined_ = 0, restarts_ = 0;
};

// The kernel's PAGEMAP_SCAN (Linux 6.7), which headers may not have yet: finds pages by what they are, and passes over
// those that nobody touched, of which there is nothing to be told, a page table at a time.
struct PageScan {
  uint64_t size = sizeof(PageScan), flags = 0, start, end, walk_end = 0, found, num_found = 1, max_pages = 1;
  uint64_t inverted, all_of, any_of, told;
};
constexpr unsigned long kPageScan = _IOWR('f', 16, PageScan);
constexpr uint64_t kScanFile = 1 << 2, kScanPresent = 1 << 3, kScanSwapped = 1 << 4;

// Is every page of a private mapping still the file's? One that was written to is the process's own.
bool is_the_files(int pagemap, int64_t address, int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), first = address / page, last = (address + bytes - 1) / page;
  uint64_t region[3];
  PageScan scan;
  scan.start = first * page, scan.end = (last + 1) * page, scan.found = reinterpret_cast<uint64_t>(region);
  scan.inverted = scan.all_of = kScanFile, scan.any_of = scan.told = kScanPresent | kScanSwapped;
  if (const int found = ioctl(pagemap, kPageScan, &scan); found >= 0) return found == 0;
  constexpr int64_t kEntries = 512;
  constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kOfFile = uint64_t{1} << 61;
  uint64_t entries[kEntries];
  for (int64_t i = first; i <= last; i += kEntries) {
    const int64_t count = std::min(kEntries, last + 1 - i) * 8;
    if (pread(pagemap, entries, count, i * 8) != count) return false;
    for (int64_t k = 0; k < count / 8; ++k) {
      if ((entries[k] & (kPresent | kSwapped)) != 0 && (entries[k] & kOfFile) == 0) return false;
    }
  }
  return true;
}

EXPORT void* fp8_ahead_create(int64_t slot_bytes, int64_t num_slots, int64_t num_threads, int on_device) {
  try {
    auto* ahead = new Ahead(slot_bytes, num_slots, num_threads, on_device != 0);
    if (ahead->usable()) return ahead;
    delete ahead;
  } catch (const std::exception&) {
  }
  return nullptr;
}
EXPORT void fp8_ahead_destroy(void* ahead) { delete static_cast<Ahead*>(ahead); }
EXPORT void fp8_ahead_counters(void* ahead, Counters* counters) { *counters = static_cast<Ahead*>(ahead)->counters(); }

EXPORT void fp8_ahead_forget(void* ahead) { static_cast<Ahead*>(ahead)->forget_all(); }

EXPORT int64_t fp8_ahead_memory(void* ahead, const void* first, int64_t row_bytes, int64_t pitch, int64_t num_rows,
                                uint64_t to, void* stream) {
  const int64_t bytes = row_bytes * num_rows;
  const Rows rows = row_bytes == pitch ? Rows{static_cast<const char*>(first)}
                                       : Rows{static_cast<const char*>(first), row_bytes, pitch};
  return static_cast<Ahead*>(ahead)->copy(kMemory, 0, bytes, bytes, to, stream, rows);
}

// Bytes that lie at `address` in a private mapping of a file, at `offset` of it; `modified` is the file's time in
// nanoseconds when it was opened, `size` its size. Declines where the mapping or the file was written to since.
EXPORT int64_t fp8_ahead_file(void* ahead, int pagemap, int64_t address, int64_t bytes, int64_t fd, int64_t offset,
                              int64_t size, int64_t modified, uint64_t to, void* stream) {
  auto* self = static_cast<Ahead*>(ahead);
  struct stat now;
  if (fstat(static_cast<int>(fd), &now) != 0) return -1 - errno;
  if (now.st_size < offset + bytes) return -1;  // its mapping cannot be read either
  const int64_t time = now.st_mtim.tv_sec * int64_t{1000000000} + now.st_mtim.tv_nsec;
  if (now.st_size != size || time != modified || !is_the_files(pagemap, address, bytes)) {
    self->forget_all();
    return kDeclined;
  }
  return self->copy(fd, offset, bytes, size, to, stream);
}

}  // namespace
}  // namespace fp8_kernels::cpu
