// Bulk copies into shared memory and the barriers that they complete on: sm_90 and newer.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fp8_kernels {

// In shared memory. A phase is complete when all arrivals of `init` and all expected bytes are there; the next one then
// begins. wait(n) waits for phase n, counted from 0; it is to be called only while n or n + 1 is the current phase.
class Barrier {
 public:
  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  __device__ void expect_bytes(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  __device__ void wait(uint32_t phase) {
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address()), "r"(phase & 1)
          : "memory");
    }
  }
  __device__ uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&word_)); }

 private:
  uint64_t word_;
};

// How readily the L2 cache lets go of what is loaded.
enum class Hint { kLeaveFirst, kNormal, kStay };

__device__ inline uint64_t cache_policy(Hint hint) {
  uint64_t policy;
  if (hint == Hint::kStay) {
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  } else if (hint == Hint::kNormal) {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// `full` expects the bytes already; the addresses and the number are multiples of 16.
__device__ inline void load_bulk(void* target, const void* source, int bytes, const Barrier& full, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))), "l"(source), "r"(bytes), "r"(full.address()),
      "l"(policy)
      : "memory");
}

}  // namespace fp8_kernels
