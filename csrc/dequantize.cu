// q * scale, one launch for any grouping.
#include "kernels.h"

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 256;
constexpr int kVecs = 4;  // loads in flight a thread, where they are aligned
constexpr int kVecsPerBlock = kNumThreads * kVecs;

// Vectors of codes, counted over the rows of all units, so that groups matter only for the scale that an element finds.
struct Lines {
  Divisor vecs_per_row, num_rows;
  int64_t num_vecs;
};

// `Index` is uint32_t where there are fewer than 2^31 elements, which saves instructions.
template <typename Index>
struct Place {
  Index unit, row, col;
};

template <typename Index>
__device__ Index quotient(Index n, const Divisor& divisor) {
  if constexpr (sizeof(Index) == 4) {
    return divisor.divide32(n);
  } else {
    return divisor.divide(n);
  }
}

template <typename Index>
__device__ Place<Index> place_of(const Lines& lines, Index vec) {
  const Index line = quotient(vec, lines.vecs_per_row), unit = quotient(line, lines.num_rows);
  return {unit, line - unit * static_cast<Index>(lines.num_rows.value),
          (vec - line * static_cast<Index>(lines.vecs_per_row.value)) * kVecElements};
}

template <typename Index>
__device__ uint32_t stored_scale_at(const DequantizeParams& p, const Place<Index>& at, ScaleType type) {
  const int64_t offset =
      p.scale.offset(at.unit, quotient(at.row, p.grouping.block_n), quotient(at.col, p.grouping.block_k));
  return load_scale(p.scale.data, offset, type);
}

template <typename T>
__device__ typename Elements<T>::Raw rounded(float value) {
  return isnan(value) ? Elements<T>::kNan : Elements<T>::round(value);
}

// Whether one of four codes is a NaN or, which times 0 is one, an Inf.
template <Fp8Type kType>
__device__ bool has_special(uint32_t codes) {
  // Codes from the first special one on carry into their top bits.
  constexpr uint32_t kAdd = kType == Fp8Type::kE4M3 ? 0x01010101 : 0x04040404;
  return ((codes & 0x7f7f7f7f) + kAdd) & 0x80808080;
}

// Vectors that are whole and aligned, and so each within one group. `kPlain`: scales are fp32, and rows and units
// adjoin in q and w, so that vectors are found by their number.
template <typename T, Fp8Type kType, bool kPlain, typename Index>
__global__ void __launch_bounds__(kNumThreads)
    dequantize_vecs_kernel(const __grid_constant__ DequantizeParams p, const __grid_constant__ Lines lines) {
  const Index first = static_cast<Index>(blockIdx.x) * kVecsPerBlock + threadIdx.x;
  const auto num_vecs = static_cast<Index>(lines.num_vecs);
  const ScaleType scale_type = kPlain ? ScaleType::kFloat32 : p.scale_type;

  // Load; past the end the last vector, so that no branch keeps loads from being in flight together.
  Place<Index> places[kVecs];
  uint2 codes[kVecs];
  uint32_t stored[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const Index vec = min(first + i * kNumThreads, num_vecs - 1);
    places[i] = place_of(lines, vec);
    const int64_t offset = kPlain ? static_cast<int64_t>(vec) * kVecElements
                                  : p.q.offset(places[i].unit, places[i].row, places[i].col);
    codes[i] = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p.q.data) + offset);
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) stored[i] = stored_scale_at(p, places[i], scale_type);

#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first + i * kNumThreads >= num_vecs) break;
    // Multiply and round.
    const float scale = scale_value(stored[i], scale_type);
    Vec<T> vec;
#pragma unroll
    for (int pair = 0; pair < kVecElements / 2; ++pair) {
      const float2 values = from_fp8x2((pair < 2 ? codes[i].x : codes[i].y) >> (pair % 2 * 16) & 0xffff, kType);
      vec.set_pair(pair, values.x * scale, values.y * scale);
    }
    // Products of what is finite are no NaNs.
    if (has_special<kType>(codes[i].x) || has_special<kType>(codes[i].y) || !(fabsf(scale) < float_of(kInfBits))) {
#pragma unroll
      for (uint32_t& word : vec.words) word = Elements<T>::canonical(word);
    }

    // Store.
    const int64_t offset = kPlain ? static_cast<int64_t>(first + i * kNumThreads) * kVecElements
                                  : p.w.offset(places[i].unit, places[i].row, places[i].col);
    auto* target = reinterpret_cast<uint4*>(static_cast<T*>(p.w.data) + offset);
#pragma unroll
    for (int j = 0; j < Vec<T>::kWords / 4; ++j) {
      const uint32_t* words = vec.words + 4 * j;
      target[j] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// Any other, a vector a thread.
template <typename T>
__global__ void __launch_bounds__(kNumThreads)
    dequantize_kernel(const __grid_constant__ DequantizeParams p, const __grid_constant__ Lines lines) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
  if (index >= lines.num_vecs) return;
  Place<int64_t> at = place_of(lines, index);
  const int64_t left = p.grouping.num_cols - at.col;
  const uint8_t* source = p.q.at<uint8_t>(at.unit, at.row, at.col);
  auto* target = p.w.at<typename Elements<T>::Raw>(at.unit, at.row, at.col);
  uint32_t codes[kVecElements];
#pragma unroll
  for (int i = 0; i < kVecElements; ++i) codes[i] = i < left ? source[i * p.q.col_stride] : 0;
#pragma unroll
  for (int i = 0; i < kVecElements; ++i, ++at.col) {
    if (i >= left) break;
    const float scale = scale_value(stored_scale_at(p, at, p.scale_type), p.scale_type);
    target[i * p.w.col_stride] = rounded<T>(from_fp8x2(codes[i], p.fp8_type).x * scale);
  }
}

bool adjoins(const View& v, const Grouping& g) {
  const bool rows_adjoin = g.num_rows <= 1 || v.row_stride == g.num_cols;
  return rows_adjoin && (g.num_units <= 1 || v.unit_stride == g.num_rows * g.num_cols);
}

}  // namespace

void launch_dequantize(const DequantizeParams& params, InputType output_type, bool aligned, cudaStream_t stream) {
  const Grouping& grouping = params.grouping;
  const int64_t vecs_per_row = (grouping.num_cols + kVecElements - 1) / kVecElements;
  const Lines lines = {Divisor(vecs_per_row), Divisor(grouping.num_rows),
                       grouping.num_units * grouping.num_rows * vecs_per_row};
  if (lines.num_vecs == 0) return;
  const auto num_blocks = [&](int64_t vecs) { return static_cast<unsigned>((lines.num_vecs + vecs - 1) / vecs); };
  dispatch_input(output_type, [&](auto element) {
    using T = decltype(element);
    if (!aligned) {
      dequantize_kernel<T><<<num_blocks(kNumThreads), kNumThreads, 0, stream>>>(params, lines);
      return;
    }
    dispatch_fp8(params.fp8_type, [&](auto fp8) {
      const bool plain = params.scale_type == ScaleType::kFloat32 && adjoins(params.q, grouping) &&
                         adjoins(params.w, grouping);
      dispatch_bool(plain, [&](auto is_plain) {
        dispatch_bool(lines.num_vecs < (int64_t{1} << 31) / kVecElements - kVecsPerBlock, [&](auto is_small) {
          using Index = std::conditional_t<is_small.value, uint32_t, int64_t>;
          dequantize_vecs_kernel<T, fp8.value, is_plain.value, Index>
              <<<num_blocks(kVecsPerBlock), kNumThreads, 0, stream>>>(params, lines);
        });
      });
    });
  });
  check_launch();
}

}  // namespace fp8_kernels
