// q * scale, one launch for any grouping.
#include "kernels.h"

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 256;

// A thread makes one vector of a row; vectors count over the rows of all units, so groups matter only for the
// scale that an element finds.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNumThreads)
    dequantize_kernel(const __grid_constant__ DequantizeParams p, const Divisor vecs_per_row, const Divisor num_rows,
                      const int64_t num_vecs) {
  using Raw = typename Elements<T>::Raw;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
  if (index >= num_vecs) return;
  const int64_t line = vecs_per_row.divide(index);
  const int64_t unit = num_rows.divide(line);
  const int64_t row = line - unit * num_rows.value;
  const int64_t col = (index - line * vecs_per_row.value) * kVecElements;
  const int64_t grid_row = p.grouping.block_n.divide(row);

  // Load the codes.
  const uint8_t* source = p.q.at<uint8_t>(unit, row, col);
  uint32_t words[2] = {};
  if constexpr (kAligned) {
    const uint2 loaded = __ldcs(reinterpret_cast<const uint2*>(source));
    words[0] = loaded.x;
    words[1] = loaded.y;
  } else {
#pragma unroll
    for (int i = 0; i < kVecElements; ++i) {
      const uint32_t code = col + i < p.grouping.num_cols ? source[i * p.q.col_stride] : 0;
      words[i / 4] |= code << (i % 4 * 8);
    }
  }

  // Multiply and round; aligned vectors lie in one group.
  Raw values[kVecElements];
  float scale = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecElements; ++i) {
    if (i == 0 || (!kAligned && col + i < p.grouping.num_cols)) {
      const int64_t grid_col = p.grouping.block_k.divide(col + i);
      const int64_t offset = p.scale.offset(unit, grid_row, grid_col);
      scale = scale_value(load_scale(p.scale.data, offset, p.scale_type), p.scale_type);
    }
    const float2 pair = from_fp8x2(words[i / 4] >> (i % 4 / 2 * 16) & 0xffff, p.fp8_type);
    const float value = (i % 2 == 0 ? pair.x : pair.y) * scale;
    values[i] = isnan(value) ? Elements<T>::kNan : Elements<T>::round(value);
  }

  // Store.
  Raw* target = p.w.at<Raw>(unit, row, col);
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kWords / 4; ++i) {
      uint4 packed;
      memcpy(&packed, values + i * sizeof(packed) / sizeof(Raw), sizeof(packed));
      __stcs(reinterpret_cast<uint4*>(target) + i, packed);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVecElements; ++i) {
      if (col + i < p.grouping.num_cols) target[i * p.w.col_stride] = values[i];
    }
  }
}

}  // namespace

void launch_dequantize(const DequantizeParams& params, InputType output_type, bool aligned, cudaStream_t stream) {
  const Grouping& grouping = params.grouping;
  const int64_t vecs_per_row = (grouping.num_cols + kVecElements - 1) / kVecElements;
  const int64_t num_vecs = grouping.num_units * grouping.num_rows * vecs_per_row;
  if (num_vecs == 0) return;
  const auto num_blocks = static_cast<unsigned>((num_vecs + kNumThreads - 1) / kNumThreads);
  dispatch_input(output_type, [&](auto element) {
    dispatch_bool(aligned, [&](auto is_aligned) {
      dequantize_kernel<decltype(element), is_aligned.value><<<num_blocks, kNumThreads, 0, stream>>>(
          params, Divisor(vecs_per_row), Divisor(grouping.num_rows), num_vecs);
    });
  });
  check_launch();
}

}  // namespace fp8_kernels
