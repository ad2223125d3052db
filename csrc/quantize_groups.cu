// Quantize groups of any shape, stride and alignment that fit one thread block's registers. Each element is read once;
// one launch. What lies as most weights do has faster kernels: quantize_runs.cu and quantize_blocks.cu.
#include "kernels.h"

namespace fp8_kernels {
namespace {

// kTeam threads share a group and hold kVecs vectors of it each. Where a group is so small that this is little, a
// team takes kGroups groups, so that enough loads are in flight.
template <typename T, int kTeam_, int kVecs_, int kGroups_>
struct Traits {
  using Element = T;
  static constexpr int kTeam = kTeam_;
  static constexpr int kVecs = kVecs_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kNumThreads = kTeam > 32 ? kTeam : 256;
  static constexpr int kTeams = kNumThreads / kTeam;
  static constexpr int capacity() { return kTeam * kVecs; }
  static_assert((kTeam & (kTeam - 1)) == 0 && kTeam <= 1024, "teams are powers of two within a thread block");
  static_assert(kTeam <= 32 || kGroups == 1, "a team wider than a warp reduces once");
};

template <typename Traits, bool kAligned>
__global__ void __launch_bounds__(Traits::kNumThreads)
    quantize_groups_kernel(const __grid_constant__ QuantizeParams p) {
  using T = typename Traits::Element;
  const int team = threadIdx.x / Traits::kTeam, lane = threadIdx.x % Traits::kTeam;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (Traits::kTeams * Traits::kGroups) + team;

  // Locate the groups, kTeams apart: most often in the row of the one before. Past the last one they are empty.
  const T* sources[Traits::kGroups];
  uint8_t* targets[Traits::kGroups];
  int64_t scale_offsets[Traits::kGroups];
  int num_rows[Traits::kGroups], num_cols[Traits::kGroups];
  Group group;
#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) {
    const int64_t index = first + g * Traits::kTeams;
    const bool exists = index < p.grouping.num_groups;
    const int64_t grid_k = p.grouping.grid_k.value, block_k = p.grouping.block_k.value;
    if (g > 0 && group.grid_col + Traits::kTeams < grid_k) {
      group.grid_col += Traits::kTeams;
      group.num_cols = min(block_k, p.grouping.num_cols - group.col - Traits::kTeams * block_k);
      sources[g] = sources[g - 1] + Traits::kTeams * block_k * (kAligned ? 1 : p.w.col_stride);
      targets[g] = targets[g - 1] + Traits::kTeams * block_k * (kAligned ? 1 : p.q.col_stride);
      scale_offsets[g] = scale_offsets[g - 1] + Traits::kTeams * p.scale.col_stride;
      group.col += Traits::kTeams * block_k;
    } else {
      group = p.grouping.group(exists ? index : 0);
      sources[g] = p.w.at<T>(group.unit, group.row, group.col);
      targets[g] = p.q.at<uint8_t>(group.unit, group.row, group.col);
      scale_offsets[g] = p.scale.offset(group.unit, group.grid_row, group.grid_col);
    }
    num_rows[g] = exists ? static_cast<int>(group.num_rows) : 0;
    num_cols[g] = static_cast<int>(group.num_cols);
  }
  const auto position = [&](int g, int vec) {
    return vec_position(p.grouping.vecs_per_row, num_rows[g], num_cols[g], vec);
  };

  // Load everything.
  Vec<T> vecs[Traits::kGroups][Traits::kVecs];
#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) {
      vecs[g][i] = load_vec<T, kAligned>(sources[g], p.w, position(g, i * Traits::kTeam + lane));
    }
  }

#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) {
    const bool exists = first + g * Traits::kTeams < p.grouping.num_groups;

    // Reduce.
    uint32_t amax = 0;
    if (p.amax.data == nullptr) {
      uint32_t acc = 0;
#pragma unroll
      for (int i = 0; i < Traits::kVecs; ++i) acc = vecs[g][i].max_abs(acc);
      amax = team_max<Traits::kTeam>(Elements<T>::amax_bits(acc));
    } else if (exists) {
      const Group group = p.grouping.group(first + g * Traits::kTeams);
      amax = *p.amax.at<uint32_t>(group.unit, group.grid_row, group.grid_col);
    }

    // Make the scale.
    const uint32_t stored = stored_scale(float_of(amax), p.fp8_type, p.pow2, p.scale_type, p.rule);
    if (lane == 0 && exists) store_scale(stored, p.scale.data, scale_offsets[g], p.scale_type);
    const ScaleDivider divide(scale_value(stored, p.scale_type), p.rule);

    // Cast and store. The positions are computed anew, which is cheaper than the registers to keep them: the
    // compiler must not see that they are the same.
    int first_vec = lane;
    asm volatile("" : "+r"(first_vec));
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) {
      const auto at = position(g, i * Traits::kTeam + first_vec);
      store_codes<T, kAligned>(vecs[g][i], divide, p.fp8_type, targets[g], p.q, at);
    }
  }
}

template <typename Traits, bool kAligned>
void launch_kernel(const QuantizeParams& params, cudaStream_t stream) {
  const int64_t groups_per_block = Traits::kTeams * Traits::kGroups;
  const auto num_blocks = static_cast<unsigned>((params.grouping.num_groups + groups_per_block - 1) / groups_per_block);
  quantize_groups_kernel<Traits, kAligned><<<num_blocks, Traits::kNumThreads, 0, stream>>>(params);
  check_launch();
}

template <typename Traits>
void launch(const QuantizeParams& params, bool aligned, cudaStream_t stream) {
  dispatch_bool(aligned, [&](auto is_aligned) { launch_kernel<Traits, is_aligned.value>(params, stream); });
}

template <typename T>
using Largest = Traits<T, 512, 8, 1>;

template <typename T>
void launch_smallest_that_fits(const QuantizeParams& params, bool aligned, cudaStream_t stream) {
  const int64_t vecs = params.grouping.vecs_per_group;
  const auto fits = [&](auto traits) {
    using Candidate = decltype(traits);
    if (vecs > Candidate::capacity()) return false;
    launch<Candidate>(params, aligned, stream);
    return true;
  };
  fits(Traits<T, 2, 2, 2>{}) || fits(Traits<T, 8, 2, 2>{}) || fits(Traits<T, 32, 4, 1>{}) ||
      fits(Traits<T, 64, 4, 1>{}) || fits(Traits<T, 128, 4, 1>{}) || fits(Traits<T, 256, 4, 1>{}) ||
      fits(Traits<T, 256, 8, 1>{}) || fits(Largest<T>{});
}

}  // namespace

int64_t max_resident_vecs() { return Largest<float>::capacity(); }

void launch_quantize_groups(const QuantizeParams& params, InputType type, bool aligned, cudaStream_t stream) {
  dispatch_input(type, [&](auto element) { launch_smallest_that_fits<decltype(element)>(params, aligned, stream); });
}

}  // namespace fp8_kernels
