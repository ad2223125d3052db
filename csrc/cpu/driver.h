// The few calls of the CUDA driver that moving bytes takes, found at run time: building needs no CUDA, and where there
// is no driver the same code copies from host to host.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>

namespace fp8_kernels::cpu {

struct Driver {
  using Result = int;  // 0 is success, 600 "not ready"
  static constexpr Result kNotReady = 600;
  static constexpr unsigned kPortable = 1, kNoTiming = 2;

  Result (*context_get)(void** context);
  Result (*context_set)(void* context);
  Result (*host_register)(void* memory, size_t bytes, unsigned flags);
  Result (*host_unregister)(void* memory);
  Result (*copy_to_device)(uint64_t to, const void* from, size_t bytes, void* stream);
  Result (*event_create)(void** event, unsigned flags);
  Result (*event_destroy)(void* event);
  Result (*event_record)(void* event, void* stream);
  Result (*event_query)(void* event);
  Result (*stream_wait)(void* stream, void* event, unsigned flags);
  Result (*error_name)(Result, const char** name);

  // Null where there is no driver.
  static const Driver* get() {
    static Driver driver;
    static const bool found = driver.load();
    return found ? &driver : nullptr;
  }

 private:
  bool load() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return false;
    const auto find = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    return find("cuCtxGetCurrent", context_get) && find("cuCtxSetCurrent", context_set) &&
           find("cuMemHostRegister_v2", host_register) && find("cuMemHostUnregister", host_unregister) &&
           find("cuMemcpyHtoDAsync_v2", copy_to_device) && find("cuEventCreate", event_create) &&
           find("cuEventDestroy_v2", event_destroy) && find("cuEventRecord", event_record) &&
           find("cuEventQuery", event_query) && find("cuStreamWaitEvent", stream_wait) &&
           find("cuGetErrorName", error_name);
  }
};

// A context that is current in the calling thread for a while; null for whichever is.
class ContextGuard {
 public:
  explicit ContextGuard(void* context) : is_set_(context != nullptr) {
    if (is_set_) Driver::get()->context_get(&previous_), Driver::get()->context_set(context);
  }
  ~ContextGuard() {
    if (is_set_) Driver::get()->context_set(previous_);
  }
  ContextGuard(const ContextGuard&) = delete;

 private:
  bool is_set_;
  void* previous_ = nullptr;
};

}  // namespace fp8_kernels::cpu
