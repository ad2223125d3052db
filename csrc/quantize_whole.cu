// Quantize a weight that has one scale. The scale needs the amax of all of it before the first cast, so the chip holds
// what it can meanwhile; the rest is read again, the newest first, which the L2 cache may still hold.
//
// One thread block per processor takes every gridDim.x-th chunk. Of a block's chunks, in their order,
//
//   kept      the first ones go to shared memory, by bulk copies that all begin at once;
//   streamed  the next ones pass through registers, for their amax alone;
//   held      the last ones stay in registers.
//
// Then all blocks meet in one grid-wide barrier, which is the only thing that a block ever waits for, and whose state
// the driver keeps for each cooperative launch. So launches share nothing, whatever streams or graphs they are in.
// Behind it every block reads the amaxes of all, and casts what it holds, then the streamed chunks from the last on,
// then what it keeps.
#include <cooperative_groups.h>

#include <algorithm>

#include "bulk_copy.cuh"
#include "kernels.h"

// Architectures without bulk copies get an empty kernel, which nobody launches, and use none of its functions.
#pragma nv_diag_suppress 177

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 1024;

// A chunk is one vector for each thread.
template <typename T>
struct Sizes {
  static constexpr int kVecBytes = kVecElements * sizeof(T);
  static constexpr int kChunkBytes = kNumThreads * kVecBytes;
  static constexpr int kKept = (224 << 10) / kChunkBytes;
  // In the 64 registers of a thread: what it holds, and loads in flight.
  static constexpr int kHeld = 24 / Vec<T>::kWords;
  static constexpr int kStreamed = 16 / Vec<T>::kWords;
};

// The chunks of a block.
template <typename T>
struct Chunks {
  using S = Sizes<T>;
  const WholeParams& p;
  int64_t first;    // this thread's byte of the block's first chunk
  uint32_t stride;  // bytes from one to the next
  int num, kept, streamed;

  __device__ explicit Chunks(const WholeParams& p)
      : p(p),
        first(static_cast<int64_t>(blockIdx.x) * S::kChunkBytes + threadIdx.x * S::kVecBytes),
        stride(gridDim.x * S::kChunkBytes),
        num(p.chunks_per_block + (blockIdx.x < p.blocks_with_more)),
        kept(min(num, S::kKept)) {
    // Whole steps, so that held chunks may be missing at the end but none is streamed and held.
    const int more = max(num - kept - S::kHeld, 0);
    streamed = (more + S::kStreamed - 1) / S::kStreamed * S::kStreamed;
  }

  __device__ int64_t offset(int i) const { return first + static_cast<int64_t>(i) * stride; }

  // Zeros, which no amax sees, where the weight has ended. What is read once leaves the L2 cache first, and to what is
  // read again.
  template <bool kOnce = false>
  __device__ Vec<T> load(int i) const {
    const int64_t at = offset(i);
    return at < p.bytes ? load_whole_vec<kOnce>(reinterpret_cast<const T*>(p.w + at)) : Vec<T>{};
  }

  template <Fp8Type kType, bool kPlain>
  __device__ void store(int i, const Vec<T>& vec, const ScaleDivider& divide) const {
    const int64_t at = offset(i);
    if (at < p.bytes) store_whole_vec(p.q + at / sizeof(T), codes_of<kType, kPlain>(vec, divide));
  }
};

template <typename T>
__device__ Vec<T> kept_vec(const uint8_t* memory, int i) {
  return load_whole_vec(reinterpret_cast<const T*>(memory + i * Sizes<T>::kChunkBytes + threadIdx.x * Sizes<T>::kVecBytes));
}

// Cast all chunks. Unless kPlain, which is rare but for vLLM's numerics, what is held is read again: less code before the
// usual one.
template <typename T, Fp8Type kType, bool kPlain>
__device__ void cast_chunks(const Chunks<T>& chunks, const Vec<T>* held, const uint8_t* memory,
                            const ScaleDivider& divide) {
  using S = Sizes<T>;
  int streamed = chunks.streamed;
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < S::kHeld; ++i) {
      chunks.template store<kType, true>(chunks.kept + streamed + i, held[i], divide);
    }
  } else {
    streamed = (chunks.num - chunks.kept + S::kStreamed - 1) / S::kStreamed * S::kStreamed;
  }
  for (int i = chunks.kept + streamed - S::kStreamed; i >= chunks.kept; i -= S::kStreamed) {
    Vec<T> vecs[S::kStreamed];
#pragma unroll
    for (int j = 0; j < S::kStreamed; ++j) vecs[j] = chunks.load(i + j);
#pragma unroll
    for (int j = 0; j < S::kStreamed; ++j) chunks.template store<kType, kPlain>(i + j, vecs[j], divide);
  }
#pragma unroll 1
  for (int i = 0; i < chunks.kept; ++i) {
    chunks.template store<kType, kPlain>(i, kept_vec<T>(memory, i), divide);
  }
}

// The FP8 type is a constant and the usual cast comes first, so that what is executed lies together: after other kernels
// the instructions come from memory, and the cast's would at the worst moment.
template <typename T, Fp8Type kType>
__global__ void __launch_bounds__(kNumThreads, 1) quantize_whole_kernel(const __grid_constant__ WholeParams p) {
#if __CUDA_ARCH__ >= 900
  using S = Sizes<T>;
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ Barrier full[S::kKept];
  __shared__ uint32_t warp_max[32];
  const int thread = threadIdx.x;
  const Chunks<T> chunks(p);

  // Begin to load what is kept. (A thread for each chunk takes a microsecond longer.)
  if (thread == 0) {
    for (int i = 0; i < S::kKept; ++i) full[i].init(1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const uint64_t policy = cache_policy(Hint::kLeaveFirst);
    for (int i = 0; i < chunks.kept; ++i) {
      const int64_t begin = chunks.offset(i);
      const auto bytes = static_cast<int>(min(static_cast<int64_t>(S::kChunkBytes), p.bytes - begin));
      full[i].expect_bytes(bytes);
      load_bulk(memory + i * S::kChunkBytes, p.w + begin, bytes, full[i], policy);
    }
  }

  // Load the others.
  uint32_t acc = 0;
  for (int i = chunks.kept; i < chunks.kept + chunks.streamed; i += S::kStreamed) {
    Vec<T> vecs[S::kStreamed];
#pragma unroll
    for (int j = 0; j < S::kStreamed; ++j) vecs[j] = chunks.load(i + j);
#pragma unroll
    for (int j = 0; j < S::kStreamed; ++j) acc = vecs[j].max_abs(acc);
  }
  Vec<T> held[S::kHeld];
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i) held[i] = chunks.template load<true>(chunks.kept + chunks.streamed + i);

  // Take the amax of the block.
  __syncthreads();  // the barriers are made
  for (int i = 0; i < chunks.kept; ++i) {
    full[i].wait(0);
    if (chunks.offset(i) < p.bytes) acc = kept_vec<T>(memory, i).max_abs(acc);
  }
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i) acc = held[i].max_abs(acc);
  acc = __reduce_max_sync(0xffffffff, Elements<T>::amax_bits(acc));
  if (thread % 32 == 0) warp_max[thread / 32] = acc;
  __syncthreads();
  if (thread < 32) {
    acc = __reduce_max_sync(0xffffffff, warp_max[thread]);
    if (thread == 0) p.block_amax[blockIdx.x] = acc;
  }

  // Exchange it.
  cooperative_groups::this_grid().sync();
  if (thread < 32) {
    acc = 0;
    for (int i = thread; i < gridDim.x; i += 32) acc = max(acc, __ldcg(p.block_amax + i));
    acc = __reduce_max_sync(0xffffffff, acc);
    if (thread == 0) warp_max[0] = acc;
  }
  __syncthreads();
  const uint32_t stored = stored_scale(float_of(warp_max[0]), kType, p.pow2, p.scale_type, p.rule);
  if (blockIdx.x == 0 && thread == 0) store_scale(stored, p.scale, 0, p.scale_type);

  // Cast.
  const ScaleDivider divide(scale_value(stored, p.scale_type), p.rule);
  if (!divide.is_plain()) {
    cast_chunks<T, kType, false>(chunks, held, memory, divide);
    return;
  }
  cast_chunks<T, kType, true>(chunks, held, memory, divide);
#endif
}

template <typename T, Fp8Type kType>
void launch(WholeParams params, cudaStream_t stream) {
  using S = Sizes<T>;
  const auto* kernel = reinterpret_cast<const void*>(quantize_whole_kernel<T, kType>);
  const int64_t chunks = (params.bytes + S::kChunkBytes - 1) / S::kChunkBytes;
  const int64_t blocks = std::min<int64_t>(num_processors(), chunks);
  params.chunks_per_block = static_cast<int32_t>(chunks / blocks);
  params.blocks_with_more = static_cast<int32_t>(chunks % blocks);
  constexpr int kMemory = S::kKept * S::kChunkBytes;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMemory);
  void* arguments[] = {&params};
  const dim3 grid(static_cast<unsigned>(blocks));
  cudaLaunchCooperativeKernel(kernel, grid, dim3(kNumThreads), arguments, kMemory, stream);
  check_launch();
}

}  // namespace

void launch_quantize_whole(const WholeParams& params, InputType type, cudaStream_t stream) {
  dispatch_input(type, [&](auto element) {
    dispatch_fp8(params.fp8_type, [&](auto fp8) { launch<decltype(element), fp8.value>(params, stream); });
  });
}

}  // namespace fp8_kernels
