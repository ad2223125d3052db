// The amax of groups: one launch where a group is one team's work; for larger groups maxima of parts, which
// either the cast (quantize_split.cu) or the second launch here reduces. No atomics, so nothing to set to zero.
#include <algorithm>

#include "kernels.h"

namespace fp8_kernels {
namespace {

template <typename T, int kTeam_>
struct Traits {
  using Element = T;
  static constexpr int kTeam = kTeam_;
  static constexpr int kNumThreads = 256;
  static constexpr int kTeams = kNumThreads / kTeam;
  static constexpr int kVecs = kTeam < 32 ? 2 : 4;  // loads in flight a thread
};

// The maximum over the calling team's share of vectors [begin, end) of a group, in every thread of the team.
template <typename Traits, bool kAligned, typename Index>
__device__ uint32_t amax_of_range(const AmaxParams& p, const Group& group, Index begin, Index end) {
  using T = typename Traits::Element;
  const T* source = p.w.at<T>(group.unit, group.row, group.col);
  const auto num_rows = static_cast<Index>(group.num_rows), num_cols = static_cast<Index>(group.num_cols);
  uint32_t acc = 0;
  for (Index base = begin + threadIdx.x % Traits::kTeam; base < end; base += Traits::kTeam * Traits::kVecs) {
    Vec<T> vecs[Traits::kVecs];
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) {
      const Index index = base + i * Traits::kTeam;
      auto at = vec_position(p.grouping.vecs_per_row, num_rows, num_cols, index);
      if (index >= end) at.valid = 0;
      vecs[i] = load_vec<T, kAligned, Reuse::kAgain>(source, p.w, at);
    }
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) acc = vecs[i].max_abs(acc);
  }
  return team_max<Traits::kTeam>(Elements<T>::amax_bits(acc));
}

__device__ void store_amax(uint32_t bits, const AmaxParams& p, const Group& group) {
  uint32_t* target = p.amax.at<uint32_t>(group.unit, group.grid_row, group.grid_col);
  if (p.accumulate) bits = max(bits, *target & 0x7fffffff);
  *target = is_nan(bits) ? kNanBits : bits;
}

template <typename Traits, bool kAligned>
__global__ void __launch_bounds__(Traits::kNumThreads) amax_kernel(const __grid_constant__ AmaxParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * Traits::kTeams + threadIdx.x / Traits::kTeam;
  const bool exists = index < p.grouping.num_groups;
  const Group group = p.grouping.group(exists ? index : 0);
  const int vecs = exists ? static_cast<int>(p.grouping.vecs_per_group) : 0;
  const uint32_t bits = amax_of_range<Traits, kAligned, int>(p, group, 0, vecs);
  if (exists && threadIdx.x % Traits::kTeam == 0) store_amax(bits, p, group);
}

template <typename Traits, bool kAligned>
__global__ void __launch_bounds__(Traits::kNumThreads)
    amax_partials_kernel(const __grid_constant__ AmaxParams p, const Split split, uint32_t* partials) {
  const int64_t group_index = blockIdx.x / split.parts, part = blockIdx.x - group_index * split.parts;
  const int64_t begin = part * split.vecs_per_part;
  const int64_t end = min(begin + split.vecs_per_part, p.grouping.vecs_per_group);
  const uint32_t bits = amax_of_range<Traits, kAligned, int64_t>(p, p.grouping.group(group_index), begin, end);
  if (threadIdx.x == 0) partials[blockIdx.x] = bits;
}

__global__ void __launch_bounds__(256)
    amax_finish_kernel(const __grid_constant__ AmaxParams p, const int64_t parts, const uint32_t* partials) {
  uint32_t bits = 0;
  for (int64_t i = threadIdx.x; i < parts; i += 256) bits = max(bits, partials[blockIdx.x * parts + i]);
  bits = team_max<256>(bits);
  if (threadIdx.x == 0) store_amax(bits, p, p.grouping.group(blockIdx.x));
}

template <typename Traits>
void launch(const AmaxParams& params, bool aligned, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>((params.grouping.num_groups + Traits::kTeams - 1) / Traits::kTeams);
  dispatch_bool(aligned, [&](auto is_aligned) {
    amax_kernel<Traits, is_aligned.value><<<num_blocks, Traits::kNumThreads, 0, stream>>>(params);
  });
  check_launch();
}

}  // namespace

// Enough parts to fill the device evenly, yet so few that their maxima are quickly reduced: two full waves.
Split split_groups(const Grouping& grouping) {
  constexpr int64_t kBlocksPerProcessor = 16, kVecsPerStep = 1024;
  int device = 0, num_processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t wanted = std::max<int64_t>(1, num_processors * kBlocksPerProcessor / grouping.num_groups);
  const int64_t steps = std::max<int64_t>(1, (grouping.vecs_per_group + kVecsPerStep - 1) / kVecsPerStep);
  const int64_t steps_per_part = (steps + wanted - 1) / wanted;
  return {(steps + steps_per_part - 1) / steps_per_part, steps_per_part * kVecsPerStep};
}

void launch_amax(const AmaxParams& params, InputType type, bool aligned, cudaStream_t stream) {
  dispatch_input(type, [&](auto element) {
    using T = decltype(element);
    const int64_t vecs = params.grouping.vecs_per_group;
    if (vecs <= 4) return launch<Traits<T, 2>>(params, aligned, stream);
    if (vecs <= 16) return launch<Traits<T, 8>>(params, aligned, stream);
    if (vecs <= 512) return launch<Traits<T, 32>>(params, aligned, stream);
    launch<Traits<T, 256>>(params, aligned, stream);
  });
}

void launch_amax_partials(const AmaxParams& params, Split split, uint32_t* partials, InputType type, bool aligned,
                          cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(params.grouping.num_groups * split.parts);
  dispatch_input(type, [&](auto element) {
    dispatch_bool(aligned, [&](auto is_aligned) {
      amax_partials_kernel<Traits<decltype(element), 256>, is_aligned.value>
          <<<num_blocks, 256, 0, stream>>>(params, split, partials);
    });
  });
  check_launch();
}

void launch_amax_finish(const AmaxParams& params, Split split, const uint32_t* partials, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(params.grouping.num_groups);
  amax_finish_kernel<<<num_blocks, 256, 0, stream>>>(params, split.parts, partials);
  check_launch();
}

}  // namespace fp8_kernels
