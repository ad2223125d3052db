// How the thread blocks of one launch tell each other the amaxes of their parts of a group.
//
// A mailbox is one word for each part of each group, empty or an amax's bits. Nothing is expected of the memory: a
// kernel empties its mailboxes and then passes one grid-wide barrier, whose state the driver keeps for each
// cooperative launch. So launches share nothing, whatever streams or graphs they are in, and the words may come from
// torch's allocator and go back to it after every call. Value and flag are one word, so no atomics and no fences.
//
// All blocks of a cooperative launch are on the device together. A block waits only for posts that other blocks make
// without waiting for it, as each kernel says where it waits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fp8_kernels {

constexpr uint32_t kNoAmax = 0xffffffff;  // above the bits of every amax, NaN included
constexpr int kMailboxesPerLoad = 4;

// Mailboxes of a group, which start at a multiple of 16 bytes.
__host__ __device__ constexpr int64_t mailbox_stride(int64_t parts) {
  return (parts + kMailboxesPerLoad - 1) / kMailboxesPerLoad * kMailboxesPerLoad;
}

// Empty the mailbox of one part. The last part's thread also fills those that nobody posts to, with the least amax.
__device__ inline void empty_mailbox(uint32_t* group, int64_t part, int64_t parts) {
  group[part] = kNoAmax;
  if (part == parts - 1) {
    for (int64_t i = parts; i < mailbox_stride(parts); ++i) group[i] = 0;
  }
}

__device__ inline void post_amax(uint32_t* mailbox, uint32_t bits) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(mailbox), "r"(bits) : "memory");
}

// Wait for the calling thread's share of a group's mailboxes, one of kThreads, and return their maximum.
template <int kThreads>
__device__ uint32_t collect_mailboxes(const uint32_t* group, int64_t parts) {
  uint32_t amax = 0;
  for (int64_t i = threadIdx.x % kThreads * kMailboxesPerLoad; i < parts; i += kThreads * kMailboxesPerLoad) {
    uint32_t top = kNoAmax;
    while (top == kNoAmax) {
      uint4 boxes;
      asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(boxes.x), "=r"(boxes.y), "=r"(boxes.z), "=r"(boxes.w)
                   : "l"(group + i)
                   : "memory");
      top = max(max(boxes.x, boxes.y), max(boxes.z, boxes.w));
    }
    amax = max(amax, top);
  }
  return amax;
}

}  // namespace fp8_kernels
