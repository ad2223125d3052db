// A stand-in for the CUDA driver, for machines without one: "device" addresses are the host's, copies are done later and
// in their order by a thread of its own. A copy out of memory that is page-locked in part, or by two registrations, is
// refused, as the real driver does; so is unlocking memory that is not locked.
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

namespace {

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};

// Never destroyed: the thread goes on to the very end of the process.
std::mutex& mutex = *new std::mutex;
std::condition_variable& changed = *new std::condition_variable;
std::deque<Copy>& queue = *new std::deque<Copy>;
std::map<uintptr_t, size_t>& locked = *new std::map<uintptr_t, size_t>;
int64_t enqueued = 0, done = 0, errors = 0, fail_after = -1;
bool running = false;
thread_local void* current = reinterpret_cast<void*>(1);

void work() {
  std::unique_lock lock(mutex);
  for (;;) {
    changed.wait(lock, [] { return !queue.empty(); });
    const Copy copy = queue.front();
    queue.pop_front();
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(copy.bytes / 20000 + 5));
    memcpy(copy.to, copy.from, copy.bytes);
    lock.lock();
    ++done;
  }
}

// 1: as a whole, 0: not at all, -1: in part.
int locked_as_one(uintptr_t from, size_t bytes) {
  for (const auto& [start, size] : locked) {
    if (from < start + size && start < from + bytes) return start <= from && from + bytes <= start + size ? 1 : -1;
  }
  return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t fake_copies() { return std::lock_guard(mutex), enqueued; }
EXPORT int64_t fake_locked() { return std::lock_guard(mutex), static_cast<int64_t>(locked.size()); }
EXPORT int64_t fake_errors() { return std::lock_guard(mutex), errors; }
EXPORT void fake_fail_after(int64_t copies) {
  std::lock_guard lock(mutex);
  fail_after = copies;
}

EXPORT int cuCtxGetCurrent(void** context) { return *context = current, 0; }
EXPORT int cuCtxSetCurrent(void* context) { return current = context, 0; }
EXPORT int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
  std::lock_guard lock(mutex);
  if (current == nullptr || locked_as_one(reinterpret_cast<uintptr_t>(memory), bytes) != 0) return ++errors, 712;
  return locked[reinterpret_cast<uintptr_t>(memory)] = bytes, 0;
}
EXPORT int cuMemHostUnregister(void* memory) {
  std::lock_guard lock(mutex);
  if (current == nullptr || locked.erase(reinterpret_cast<uintptr_t>(memory)) == 0) return ++errors, 713;
  return 0;
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
  std::lock_guard lock(mutex);
  if (!running) running = true, std::thread(work).detach();
  if (current == nullptr || locked_as_one(reinterpret_cast<uintptr_t>(from), bytes) < 0) return ++errors, 1;
  if (fail_after >= 0 && enqueued >= fail_after) return 700;
  queue.push_back({reinterpret_cast<char*>(to), static_cast<const char*>(from), bytes});
  ++enqueued;
  changed.notify_one();
  return 0;
}
EXPORT int cuEventCreate(void** event, unsigned) { return *event = new int64_t(0), 0; }
EXPORT int cuEventDestroy_v2(void* event) { return delete static_cast<int64_t*>(event), 0; }
EXPORT int cuEventRecord(void* event, void*) {
  std::lock_guard lock(mutex);
  return *static_cast<int64_t*>(event) = enqueued, 0;
}
EXPORT int cuEventQuery(void* event) {
  std::lock_guard lock(mutex);
  return done >= *static_cast<int64_t*>(event) ? 0 : 600;
}
EXPORT int cuStreamWaitEvent(void*, void*, unsigned) { return 0; }
EXPORT int cuGetErrorName(int, const char** name) { return *name = "FAKE_ERROR", 0; }
