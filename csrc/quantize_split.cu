// Quantize groups too large for one thread block's registers: above all whole weights and experts.
// Two launches: maxima of parts (amax.cu), then the cast here, in the opposite order, so that what the first
// launch read last, which the L2 cache still holds, is read again first.
#include "kernels.h"

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 256;
constexpr int kVecs = 4;  // loads in flight a thread
constexpr int kVecsPerStep = kNumThreads * kVecs;

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNumThreads)
    quantize_split_kernel(const __grid_constant__ QuantizeParams p, const Split split, const uint32_t* partials) {
  const int64_t part_index = gridDim.x - 1 - blockIdx.x;
  const int64_t group_index = part_index / split.parts, part = part_index - group_index * split.parts;
  const Group group = p.grouping.group(group_index);

  // Reduce the parts' maxima.
  uint32_t amax = 0;
  if (p.amax.data != nullptr) {
    amax = *p.amax.at<uint32_t>(group.unit, group.grid_row, group.grid_col);
  } else {
    for (int64_t i = threadIdx.x; i < split.parts; i += kNumThreads) {
      amax = max(amax, partials[group_index * split.parts + i]);
    }
    amax = team_max<kNumThreads>(amax);
  }

  // Make the scale; one block a group writes it.
  const uint32_t stored = stored_scale(float_of(amax), p.fp8_type, p.pow2, p.scale_type, p.rule);
  if (part == 0 && threadIdx.x == 0) {
    const int64_t offset = p.scale.offset(group.unit, group.grid_row, group.grid_col);
    store_scale(stored, p.scale.data, offset, p.scale_type);
  }
  const ScaleDivider divide(scale_value(stored, p.scale_type), p.rule);

  // Cast the part from its end.
  const T* source = p.w.at<T>(group.unit, group.row, group.col);
  uint8_t* target = p.q.at<uint8_t>(group.unit, group.row, group.col);
  const int64_t begin = part * split.vecs_per_part;
  const int64_t end = min(begin + split.vecs_per_part, p.grouping.vecs_per_group);
  for (int64_t step = (end - begin + kVecsPerStep - 1) / kVecsPerStep - 1; step >= 0; --step) {
    Vec<T> vecs[kVecs];
    VecPosition<int64_t> at[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int64_t index = begin + step * kVecsPerStep + i * kNumThreads + threadIdx.x;
      at[i] = vec_position(p.grouping.vecs_per_row, group.num_rows, group.num_cols, index);
      if (index >= end) at[i].valid = 0;
      vecs[i] = load_vec<T, kAligned, Reuse::kNever>(source, p.w, at[i]);
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      store_codes<T, kAligned>(vecs[i], divide, p.fp8_type, target, p.q, at[i]);
    }
  }
}

}  // namespace

void launch_quantize_split(const QuantizeParams& params, Split split, const uint32_t* partials, InputType type,
                           bool aligned, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(params.grouping.num_groups * split.parts);
  dispatch_input(type, [&](auto element) {
    dispatch_bool(aligned, [&](auto is_aligned) {
      quantize_split_kernel<decltype(element), is_aligned.value>
          <<<num_blocks, kNumThreads, 0, stream>>>(params, split, partials);
    });
  });
  check_launch();
}

}  // namespace fp8_kernels
