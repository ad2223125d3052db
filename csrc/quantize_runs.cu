// Quantize groups that are runs of memory, each with a scale of its own: rows, groups within rows, small weights. What
// per_channel, per_group and MX do nearly always; quantize_groups.cu takes what is unaligned or in pieces.
//
// One read and one write at the speed of the memory leave few instructions an element, and a group's first load should
// not wait for arithmetic. So a group's place is its number times a stride, and the threads of a team take vectors that
// lie kTeam apart.
#include <algorithm>

#include "kernels.h"

namespace fp8_kernels {
namespace {

template <typename T, int kTeam_, int kVecs_, int kGroups_ = 1>
struct Traits {
  using Element = T;
  static constexpr int kTeam = kTeam_;  // threads that share a group
  static constexpr int kVecs = kVecs_;  // loads in flight a thread
  static constexpr int kNumThreads = kTeam > 32 ? kTeam : 256;
  static constexpr int kGroups = kGroups_;  // that a team takes at once
  static_assert(kGroups == 1 || kTeam <= 32, "the shared memory of team_max is for one");
  static constexpr int kTeams = kNumThreads / kTeam;
  static constexpr int capacity() { return kTeam * kVecs; }
};

// The weight that a thread block belongs to; its first block becomes 0.
__device__ const Runs& find_weight(const RunsParams& p, int64_t& block) {
  int i = 0;
  while (block >= p.weights[i].num_blocks) block -= p.weights[i++].num_blocks;
  return p.weights[i];
}

template <typename Traits, Fp8Type kType>
__global__ void __launch_bounds__(Traits::kNumThreads) quantize_runs_kernel(const __grid_constant__ RunsParams p) {
  using T = typename Traits::Element;
  constexpr int kStep = Traits::kTeam * kVecElements;
  int64_t block = blockIdx.x;
  const Runs& runs = find_weight(p, block);
  const int lane = threadIdx.x % Traits::kTeam;
  const int64_t first = block * Traits::kTeams * Traits::kGroups + threadIdx.x / Traits::kTeam;

  // Load.
  Vec<T> vecs[Traits::kGroups][Traits::kVecs];
#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) {
    const int64_t group = first + g * Traits::kTeams;
    const int num_vecs = group < runs.num_groups ? static_cast<int>(runs.vecs) : 0;
    const T* source = static_cast<const T*>(runs.w) + group * runs.w_stride + lane * kVecElements;
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) {
      vecs[g][i] = i * Traits::kTeam + lane < num_vecs ? load_whole_vec(source + i * kStep) : Vec<T>{};
    }
  }

#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) {
    const int64_t group = first + g * Traits::kTeams;
    const int num_vecs = group < runs.num_groups ? static_cast<int>(runs.vecs) : 0;

    // Reduce.
    uint32_t acc = 0;
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) acc = vecs[g][i].max_abs(acc);
    const uint32_t amax = team_max<Traits::kTeam>(Elements<T>::amax_bits(acc));

    // Make the scale.
    const uint32_t stored = stored_scale(float_of(amax), kType, p.pow2, p.scale_type, p.rule);
    if (lane == 0 && num_vecs > 0) store_scale(stored, runs.scale, group * runs.scale_stride, p.scale_type);
    const ScaleDivider divide(scale_value(stored, p.scale_type), p.rule);

    // Cast and store.
    uint8_t* target = runs.q + group * runs.q_stride + lane * kVecElements;
    const auto cast = [&](auto plain) {
#pragma unroll
      for (int i = 0; i < Traits::kVecs; ++i) {
        if (i * Traits::kTeam + lane < num_vecs) {
          store_whole_vec(target + i * kStep, codes_of<kType, plain.value>(vecs[g][i], divide));
        }
      }
    };
    divide.is_plain() ? cast(std::true_type{}) : cast(std::false_type{});
  }
}

template <typename Traits>
void launch(RunsParams& params, Fp8Type type, cudaStream_t stream) {
  int64_t num_blocks = 0;
  for (int i = 0; i < params.num_weights; ++i) {
    Runs& runs = params.weights[i];
    constexpr int kPerBlock = Traits::kTeams * Traits::kGroups;
    runs.num_blocks = (runs.num_groups + kPerBlock - 1) / kPerBlock;
    num_blocks += runs.num_blocks;
  }
  dispatch_fp8(type, [&](auto fp8) {
    quantize_runs_kernel<Traits, fp8.value>
        <<<static_cast<unsigned>(num_blocks), Traits::kNumThreads, 0, stream>>>(params);
  });
  check_launch();
}

}  // namespace

int64_t max_run_vecs(InputType type) { return type == InputType::kFloat32 ? 4096 : 8192; }

void launch_quantize_runs(RunsParams& params, InputType type, cudaStream_t stream) {
  int64_t vecs = 0;
  for (int i = 0; i < params.num_weights; ++i) vecs = std::max(vecs, params.weights[i].vecs);
  dispatch_input(type, [&](auto element) {
    using T = decltype(element);
    const auto fits = [&](auto traits) {
      using Candidate = decltype(traits);
      if (vecs > Candidate::capacity()) return false;
      launch<Candidate>(params, params.fp8_type, stream);
      return true;
    };
    // Two vectors a thread, and twice the threads, are 1 to 2 us ahead of four; of groups of one vector, two groups.
    const bool launched = fits(Traits<T, 4, 1, 2>{}) || fits(Traits<T, 8, 2>{}) || fits(Traits<T, 64, 2>{}) ||
                          fits(Traits<T, 128, 2>{}) || fits(Traits<T, 256, 2>{}) || fits(Traits<T, 512, 2>{}) ||
                          fits(Traits<T, 1024, 2>{}) || fits(Traits<T, 512, 8>{});
    if constexpr (sizeof(T) == 2) {
      if (!launched) launch<Traits<T, 1024, 8>>(params, params.fp8_type, stream);
    }
  });
}

}  // namespace fp8_kernels
