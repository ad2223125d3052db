// Cast groups that are long runs of memory, whose amaxes are given: whole weights and experts whose maximum was found
// while their shards arrived, long rows.
//
// A thread takes few vectors and ends, and nothing waits for the amax but the arithmetic: as near to a plain copy as a
// cast comes. Shorter groups are quantize_groups.cu's.
#include <algorithm>

#include "kernels.h"

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 256;
constexpr int kVecs = 2;  // loads in flight a thread
constexpr int kVecsPerPart = kNumThreads * kVecs;

template <typename T, Fp8Type kType>
__global__ void __launch_bounds__(kNumThreads)
    cast_runs_kernel(const __grid_constant__ CastParams p, const Divisor parts) {
  const int64_t group = parts.divide(blockIdx.x);
  const int64_t part = blockIdx.x - group * parts.value;
  const int64_t first = part * kVecsPerPart + threadIdx.x;

  // Load.
  const T* source = static_cast<const T*>(p.runs.w) + group * p.runs.w_stride + first * kVecElements;
  Vec<T> vecs[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    vecs[i] = first + i * kNumThreads < p.runs.vecs
                  ? load_whole_vec(source + i * kNumThreads * kVecElements)
                  : Vec<T>{};
  }

  // Make the scale.
  const float amax = p.amax[group * p.amax_stride];
  const uint32_t stored = stored_scale(amax, kType, p.pow2, p.scale_type, p.rule);
  if (part == 0 && threadIdx.x == 0) store_scale(stored, p.runs.scale, group * p.runs.scale_stride, p.scale_type);
  const ScaleDivider divide(scale_value(stored, p.scale_type), p.rule);

  // Cast and store. Floats may exceed the amax that they come with, and `plain` is not for those.
  uint8_t* target = p.runs.q + group * p.runs.q_stride + first * kVecElements;
  const auto cast = [&](auto plain) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (first + i * kNumThreads < p.runs.vecs) {
        store_whole_vec(target + i * kNumThreads * kVecElements, codes_of<kType, plain.value>(vecs[i], divide));
      }
    }
  };
  sizeof(T) == 2 && divide.is_plain() ? cast(std::bool_constant<sizeof(T) == 2>{}) : cast(std::false_type{});
}

}  // namespace

void launch_cast_runs(const CastParams& params, InputType type, cudaStream_t stream) {
  const Divisor parts((params.runs.vecs + kVecsPerPart - 1) / kVecsPerPart);
  const auto num_blocks = static_cast<unsigned>(params.runs.num_groups * parts.value);
  dispatch_input(type, [&](auto element) {
    dispatch_fp8(params.fp8_type, [&](auto fp8) {
      cast_runs_kernel<decltype(element), fp8.value><<<num_blocks, kNumThreads, 0, stream>>>(params, parts);
    });
  });
  check_launch();
}

}  // namespace fp8_kernels
