// Quantize blocks of 128 x 128 elements, each with a scale of its own, of weights whose rows are aligned.
//
// A thread block takes one block. Its threads keep one column of vectors each and go down the rows, so nothing needs a
// division but the block's own place; the last blocks of a row or column may be smaller.
#include "kernels.h"

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 512;
constexpr int kVecsPerRow = kFastBlock / kVecElements;
constexpr int kRowsPerStep = kNumThreads / kVecsPerRow;
constexpr int kSteps = kFastBlock / kRowsPerStep;  // loads in flight a thread
template <typename T>
constexpr int kBlocksPerProcessor = sizeof(T) == 2 ? 3 : 2;  // as many as there are registers for

template <typename T, Fp8Type kType>
__global__ void __launch_bounds__(kNumThreads, kBlocksPerProcessor<T>)
    quantize_blocks_kernel(const __grid_constant__ QuantizeParams p) {
  const Group group = p.grouping.group32(blockIdx.x);
  const int first_row = threadIdx.x / kVecsPerRow, col = threadIdx.x % kVecsPerRow * kVecElements;
  const int num_rows = col < group.num_cols ? static_cast<int>(group.num_rows) - first_row : 0;

  // Load.
  const T* source = p.w.at<T>(group.unit, group.row + first_row, group.col + col);
  Vec<T> vecs[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    vecs[i] = i * kRowsPerStep < num_rows ? load_whole_vec(source + i * kRowsPerStep * p.w.row_stride) : Vec<T>{};
  }

  // Reduce.
  uint32_t acc = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) acc = vecs[i].max_abs(acc);
  const uint32_t amax = team_max<kNumThreads>(Elements<T>::amax_bits(acc));

  // Make the scale.
  const uint32_t stored = stored_scale(float_of(amax), kType, p.pow2, p.scale_type, p.rule);
  if (threadIdx.x == 0) {
    store_scale(stored, p.scale.data, p.scale.offset(group.unit, group.grid_row, group.grid_col), p.scale_type);
  }
  const ScaleDivider divide(scale_value(stored, p.scale_type), p.rule);

  // Cast and store.
  uint8_t* target = p.q.at<uint8_t>(group.unit, group.row + first_row, group.col + col);
  const auto cast = [&](auto plain) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i * kRowsPerStep < num_rows) {
        store_whole_vec(target + i * kRowsPerStep * p.q.row_stride, codes_of<kType, plain.value>(vecs[i], divide));
      }
    }
  };
  divide.is_plain() ? cast(std::true_type{}) : cast(std::false_type{});
}

}  // namespace

void launch_quantize_blocks(const QuantizeParams& params, InputType type, cudaStream_t stream) {
  dispatch_input(type, [&](auto element) {
    dispatch_fp8(params.fp8_type, [&](auto fp8) {
      quantize_blocks_kernel<decltype(element), fp8.value>
          <<<static_cast<unsigned>(params.grouping.num_groups), kNumThreads, 0, stream>>>(params);
    });
  });
  check_launch();
}

}  // namespace fp8_kernels
