// Copy a weight and raise the amax of each group to its maximum, reading it once. One launch.
//
// Amaxes accumulate, so they are there before the launch, and parts of a group meet in an atomic maximum of bit
// patterns: the same result in any order, and nothing to set to zero.
#include "kernels.h"

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 256;
constexpr int kVecs = 4;                                 // loads in flight a thread
constexpr int64_t kVecsPerPart = 4 * kNumThreads * kVecs;  // of a group that several thread blocks share

template <typename T, bool kAligned, typename Index>
__device__ void store_vec(const Vec<T>& vec, T* group, const View& view, const VecPosition<Index>& at) {
  T* target = group + at.row * view.row_stride + (kAligned ? at.col : at.col * view.col_stride);
  if constexpr (kAligned) {
    if (at.valid == 0) return;
#pragma unroll
    for (int i = 0; i < Vec<T>::kWords / 4; ++i) {
      const uint32_t* words = vec.words + 4 * i;
      reinterpret_cast<uint4*>(target)[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  } else {
    using Raw = typename Elements<T>::Raw;
#pragma unroll
    for (int i = 0; i < kVecElements; ++i) {
      if (i >= at.valid) break;
      reinterpret_cast<Raw*>(target)[i * view.col_stride] =
          static_cast<Raw>(vec.words[i * sizeof(T) / 4] >> (i * sizeof(T) % 4 * 8));
    }
  }
}

// kTeam threads share a part of a group; only teams of a whole thread block have groups of several parts.
template <typename T, int kTeam, bool kAligned>
__global__ void __launch_bounds__(kNumThreads)
    copy_amax_kernel(const __grid_constant__ CopyAmaxParams p, const int64_t parts) {
  constexpr int kTeams = kNumThreads / kTeam;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / kTeam;
  const int64_t group_index = kTeam < kNumThreads ? index : index / parts;
  const bool exists = group_index < p.grouping.num_groups;
  const Group group = p.grouping.group(exists ? group_index : 0);
  const int64_t begin = kTeam < kNumThreads ? 0 : (index - group_index * parts) * kVecsPerPart;
  const int64_t end = exists ? min(begin + kVecsPerPart, p.grouping.vecs_per_group) : 0;
  const T* source = p.w.at<T>(group.unit, group.row, group.col);
  T* target = p.out.at<T>(group.unit, group.row, group.col);

  uint32_t acc = 0;
  for (int64_t base = begin + threadIdx.x % kTeam; base < end; base += kTeam * kVecs) {
    Vec<T> vecs[kVecs];
    VecPosition<int64_t> at[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int64_t vec = base + i * kTeam;
      at[i] = vec_position(p.grouping.vecs_per_row, group.num_rows, group.num_cols, vec);
      if (vec >= end) at[i].valid = 0;
      vecs[i] = load_vec<T, kAligned>(source, p.w, at[i]);
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      acc = vecs[i].max_abs(acc);
      store_vec<T, kAligned>(vecs[i], target, p.out, at[i]);
    }
  }
  const uint32_t bits = team_max<kTeam>(Elements<T>::amax_bits(acc));
  if (exists && threadIdx.x % kTeam == 0) {
    // As signed integers, so that a slot of -0 is below everything.
    int* slot = p.amax.at<int>(group.unit, group.grid_row, group.grid_col);
    atomicMax(slot, static_cast<int>(is_nan(bits) ? kNanBits : bits));
  }
}

template <typename T, int kTeam>
void launch(const CopyAmaxParams& params, bool aligned, cudaStream_t stream) {
  const Grouping& g = params.grouping;
  const int64_t parts = kTeam < kNumThreads ? 1 : (g.vecs_per_group + kVecsPerPart - 1) / kVecsPerPart;
  const int64_t teams = kNumThreads / kTeam;
  const auto num_blocks = static_cast<unsigned>((g.num_groups * parts + teams - 1) / teams);
  dispatch_bool(aligned, [&](auto is_aligned) {
    copy_amax_kernel<T, kTeam, is_aligned.value><<<num_blocks, kNumThreads, 0, stream>>>(params, parts);
  });
  check_launch();
}

}  // namespace

void launch_copy_amax(const CopyAmaxParams& params, InputType type, bool aligned, cudaStream_t stream) {
  dispatch_input(type, [&](auto element) {
    using T = decltype(element);
    const int64_t vecs = params.grouping.vecs_per_group;
    if (vecs <= 4) return launch<T, 2>(params, aligned, stream);
    if (vecs <= 16) return launch<T, 8>(params, aligned, stream);
    if (vecs <= 512) return launch<T, 32>(params, aligned, stream);
    launch<T, kNumThreads>(params, aligned, stream);
  });
}

}  // namespace fp8_kernels
