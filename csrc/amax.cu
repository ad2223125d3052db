// The amax of groups that are one team's work; split.cu finds those of larger ones.
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

// The amax of a group of that many vectors, in every thread of its team.
template <typename Traits, bool kAligned>
__device__ uint32_t amax_of_group(const AmaxParams& p, const Group& group, int num_vecs) {
  using T = typename Traits::Element;
  const T* source = p.w.at<T>(group.unit, group.row, group.col);
  const auto num_rows = static_cast<int>(group.num_rows), num_cols = static_cast<int>(group.num_cols);
  uint32_t acc = 0;
  for (int base = threadIdx.x % Traits::kTeam; base < num_vecs; base += Traits::kTeam * Traits::kVecs) {
    Vec<T> vecs[Traits::kVecs];
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) {
      const int index = base + i * Traits::kTeam;
      auto at = vec_position(p.grouping.vecs_per_row, num_rows, num_cols, index);
      if (index >= num_vecs) at.valid = 0;
      vecs[i] = load_vec<T, kAligned>(source, p.w, at);
    }
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) acc = vecs[i].max_abs(acc);
  }
  return team_max<Traits::kTeam>(Elements<T>::amax_bits(acc));
}

template <typename Traits, bool kAligned>
__global__ void __launch_bounds__(Traits::kNumThreads) amax_kernel(const __grid_constant__ AmaxParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * Traits::kTeams + threadIdx.x / Traits::kTeam;
  const bool exists = index < p.grouping.num_groups;
  const Group group = p.grouping.group(exists ? index : 0);
  const int vecs = exists ? static_cast<int>(p.grouping.vecs_per_group) : 0;
  const uint32_t bits = amax_of_group<Traits, kAligned>(p, group, vecs);
  if (exists && threadIdx.x % Traits::kTeam == 0) store_amax(bits, p, group);
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

}  // namespace fp8_kernels
