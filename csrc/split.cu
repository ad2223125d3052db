// Groups too large for one thread block, of any layout: each is split over many blocks, whose amaxes meet in
// mailboxes. One launch. quantize reads a group twice, the second time from its end, which the L2 cache may still
// hold; quantize_whole.cu and quantize_ring.cu read once where the layout and the device allow.
//
// Nobody waits for ever: parts of a group are on different blocks, each block takes its parts in the order of the
// groups, and it posts a part before it waits for the others of that group or of an earlier one. So the earliest
// unfinished group always finishes.
#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "mailboxes.cuh"

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 256;
constexpr int kVecs = 4;  // loads in flight a thread
constexpr int kVecsPerStep = kNumThreads * kVecs;
// How many blocks a processor has registers for; so many are launched.
template <typename T, bool kAligned>
constexpr int kQuantizeBlocks = kAligned && sizeof(T) == 2 ? 3 : 2;
template <bool kAligned>
constexpr int kAmaxBlocks = kAligned ? 3 : 2;

// Part `index` of a group takes its steps index, index + parts, ...
struct Part {
  Group group;
  int64_t group_index, index, steps;

  __device__ Part(const Grouping& grouping, const Split& split, int64_t part) {
    group_index = split.parts.divide(part);
    index = part - group_index * split.parts.value;
    group = grouping.group(group_index);
    steps = split.parts.divide(split.steps - 1 - index) + 1;
  }

  // The calling thread's vectors of a step.
  template <typename F>
  __device__ void for_step(const Grouping& grouping, const Split& split, int64_t step, F&& f) const {
    const int64_t first = (index + step * split.parts.value) * kVecsPerStep + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      f(i, vec_position(grouping.vecs_per_row, group.num_rows, group.num_cols, first + i * kNumThreads));
    }
  }
};

template <typename T, bool kAligned>
__device__ uint32_t amax_of_part(const Grouping& grouping, const View& w, const Split& split, const Part& part) {
  const T* source = w.at<T>(part.group.unit, part.group.row, part.group.col);
  uint32_t acc = 0;
  for (int64_t step = 0; step < part.steps; ++step) {
    Vec<T> vecs[kVecs];
    part.for_step(grouping, split, step,
                  [&](int i, const auto& at) { vecs[i] = load_vec<T, kAligned>(source, w, at); });
#pragma unroll
    for (int i = 0; i < kVecs; ++i) acc = vecs[i].max_abs(acc);
  }
  return team_max<kNumThreads>(Elements<T>::amax_bits(acc));
}

// Cast a part from its end.
template <typename T, bool kAligned>
__device__ void cast_part(const QuantizeParams& p, const Split& split, const Part& part, uint32_t amax) {
  const Group& group = part.group;
  const uint32_t stored = stored_scale(float_of(amax), p.fp8_type, p.pow2, p.scale_type, p.rule);
  if (part.index == 0 && threadIdx.x == 0) {
    const int64_t offset = p.scale.offset(group.unit, group.grid_row, group.grid_col);
    store_scale(stored, p.scale.data, offset, p.scale_type);
  }
  const ScaleDivider divide(scale_value(stored, p.scale_type), p.rule);
  const T* source = p.w.at<T>(group.unit, group.row, group.col);
  uint8_t* target = p.q.at<uint8_t>(group.unit, group.row, group.col);
  for (int64_t step = part.steps - 1; step >= 0; --step) {
    Vec<T> vecs[kVecs];
    VecPosition<int64_t> positions[kVecs];
    part.for_step(p.grouping, split, step, [&](int i, const auto& at) {
      positions[i] = at;
      vecs[i] = load_vec<T, kAligned>(source, p.w, at);
    });
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      store_codes<T, kAligned>(vecs[i], divide, p.fp8_type, target, p.q, positions[i]);
    }
  }
}

__device__ uint32_t* mailboxes_of(uint32_t* mailboxes, const Split& split, int64_t group_index) {
  return mailboxes + group_index * mailbox_stride(split.parts.value);
}

__device__ void empty_own_mailboxes(uint32_t* mailboxes, const Split& split) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kNumThreads;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x; i < split.num_parts; i += step) {
    const int64_t group_index = split.parts.divide(i);
    uint32_t* group = mailboxes_of(mailboxes, split, group_index);
    empty_mailbox(group, i - group_index * split.parts.value, split.parts.value);
  }
}

__device__ uint32_t collect_amax(const uint32_t* group, const Split& split) {
  __syncthreads();  // team_max's memory is free again
  return team_max<kNumThreads>(collect_mailboxes<kNumThreads>(group, split.parts.value));
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNumThreads, kQuantizeBlocks<T, kAligned>)
    quantize_split_kernel(const __grid_constant__ QuantizeParams p, const __grid_constant__ Split split,
                          uint32_t* mailboxes) {
  empty_own_mailboxes(mailboxes, split);
  const auto grid = cooperative_groups::this_grid();
  auto token = grid.barrier_arrive();
  bool all_empty = false;
  // A part is posted before the part before it is cast: other blocks have until then to post theirs.
  for (int64_t i = blockIdx.x; i < split.num_parts + gridDim.x; i += gridDim.x) {
    if (i < split.num_parts) {
      const Part part(p.grouping, split, i);
      const uint32_t own = amax_of_part<T, kAligned>(p.grouping, p.w, split, part);
      if (threadIdx.x == 0) post_amax(mailboxes_of(mailboxes, split, part.group_index) + part.index, own);
    }
    if (i >= gridDim.x) {
      if (!all_empty) grid.barrier_wait(std::move(token));
      all_empty = true;
      const Part part(p.grouping, split, i - gridDim.x);
      const uint32_t amax = collect_amax(mailboxes_of(mailboxes, split, part.group_index), split);
      cast_part<T, kAligned>(p, split, part, amax);
    }
    __syncthreads();
  }
}

// The amax is given.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNumThreads)
    cast_split_kernel(const __grid_constant__ QuantizeParams p, const __grid_constant__ Split split) {
  const Part part(p.grouping, split, blockIdx.x);
  const Group& group = part.group;
  cast_part<T, kAligned>(p, split, part, *p.amax.at<uint32_t>(group.unit, group.grid_row, group.grid_col));
}

// No mailboxes: the block of a group's first part sets the result, and behind the barrier all parts raise it.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNumThreads, kAmaxBlocks<kAligned>)
    amax_split_kernel(const __grid_constant__ AmaxParams p, const __grid_constant__ Split split) {
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x; i < split.num_parts;
       i += static_cast<int64_t>(kNumThreads) * gridDim.x) {
    const int64_t group_index = split.parts.divide(i);
    if (i == group_index * split.parts.value) store_amax(0, p, p.grouping.group(group_index));
  }
  const auto grid = cooperative_groups::this_grid();
  auto token = grid.barrier_arrive();
  bool all_set = false;
  for (int64_t i = blockIdx.x; i < split.num_parts; i += gridDim.x) {
    const Part part(p.grouping, split, i);
    const uint32_t own = amax_of_part<T, kAligned>(p.grouping, p.w, split, part);
    if (!all_set) grid.barrier_wait(std::move(token));
    all_set = true;
    const Group& group = part.group;
    if (threadIdx.x == 0) {
      atomicMax(p.amax.at<uint32_t>(group.unit, group.grid_row, group.grid_col), is_nan(own) ? kNanBits : own);
    }
    __syncthreads();  // team_max's memory is free again
  }
}

template <typename Kernel, typename... Params>
void launch_cooperative(Kernel* kernel, int64_t num_blocks, cudaStream_t stream, Params... params) {
  void* arguments[] = {&params...};
  const dim3 grid(static_cast<unsigned>(num_blocks));
  cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kNumThreads), arguments, 0, stream);
  check_launch();
}

Split split_groups(const Grouping& grouping, int blocks_per_processor) {
  Split split;
  split.steps = std::max<int64_t>(1, (grouping.vecs_per_group + kVecsPerStep - 1) / kVecsPerStep);
  split.num_blocks = static_cast<int64_t>(num_processors()) * blocks_per_processor;
  const int64_t steps_per_part = (split.steps + split.num_blocks - 1) / split.num_blocks;
  split.parts = Divisor((split.steps + steps_per_part - 1) / steps_per_part);
  split.num_parts = grouping.num_groups * split.parts.value;
  split.num_blocks = std::min(split.num_blocks, split.num_parts);
  split.num_mailboxes = grouping.num_groups * mailbox_stride(split.parts.value);
  return split;
}

}  // namespace

Split quantize_split(const Grouping& grouping, InputType type, bool aligned) {
  int blocks = 0;
  dispatch_input(type, [&](auto element) {
    dispatch_bool(aligned, [&](auto is_aligned) { blocks = kQuantizeBlocks<decltype(element), is_aligned.value>; });
  });
  return split_groups(grouping, blocks);
}

void launch_quantize_split(const QuantizeParams& params, const Split& split, uint32_t* mailboxes, InputType type,
                           bool aligned, cudaStream_t stream) {
  dispatch_input(type, [&](auto element) {
    dispatch_bool(aligned, [&](auto is_aligned) {
      launch_cooperative(quantize_split_kernel<decltype(element), is_aligned.value>,
                         split.num_blocks, stream, params, split, mailboxes);
    });
  });
}

void launch_cast_split(const QuantizeParams& params, InputType type, bool aligned, cudaStream_t stream) {
  // Enough parts to fill the device evenly.
  constexpr int64_t kPartsPerProcessor = 16;
  Split split;
  split.steps = (params.grouping.vecs_per_group + kVecsPerStep - 1) / kVecsPerStep;
  const int64_t wanted = std::max<int64_t>(1, num_processors() * kPartsPerProcessor / params.grouping.num_groups);
  split.parts = Divisor(std::min(split.steps, wanted));
  split.num_parts = params.grouping.num_groups * split.parts.value;
  dispatch_input(type, [&](auto element) {
    dispatch_bool(aligned, [&](auto is_aligned) {
      cast_split_kernel<decltype(element), is_aligned.value>
          <<<static_cast<unsigned>(split.num_parts), kNumThreads, 0, stream>>>(params, split);
    });
  });
  check_launch();
}

void launch_amax_split(const AmaxParams& params, InputType type, bool aligned, cudaStream_t stream) {
  const Split split = split_groups(params.grouping, aligned ? kAmaxBlocks<true> : kAmaxBlocks<false>);
  dispatch_input(type, [&](auto element) {
    dispatch_bool(aligned, [&](auto is_aligned) {
      launch_cooperative(amax_split_kernel<decltype(element), is_aligned.value>, split.num_blocks, stream, params,
                         split);
    });
  });
}

}  // namespace fp8_kernels
