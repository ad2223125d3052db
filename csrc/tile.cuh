// Geometry, vector loads and stores, and reductions of groups.
//
// A kernel sees a group as rows of vectors of kVecElements neighbours along K. The aligned kernels move a vector
// in 16-byte loads and one 8-byte store; the others move the same vectors element by element, so any stride,
// alignment and size is right.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fp8.cuh"

namespace fp8_kernels {

constexpr int kVecElements = 8;

// n / value without a division instruction where both are below 2^31.
struct Divisor {
  uint64_t value;
  uint32_t magic, shift;

  Divisor() = default;
  explicit Divisor(uint64_t divisor) : value(divisor), magic(0), shift(0) {
    if (divisor >> 31) return;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ uint32_t divide32(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
  __device__ uint64_t divide(uint64_t n) const { return (n | value) >> 31 ? n / value : divide32(n); }
};

// A tensor [units, rows, columns]; strides in elements.
struct View {
  void* data;
  int64_t unit_stride, row_stride, col_stride;

  __device__ int64_t offset(int64_t unit, int64_t row, int64_t col) const {
    return unit * unit_stride + row * row_stride + col * col_stride;
  }

  template <typename T>
  __device__ T* at(int64_t unit, int64_t row, int64_t col) const {
    return static_cast<T*>(data) + offset(unit, row, col);
  }
};

// One group: where it is in the grid of scales, and the rectangle of the weight that it covers.
struct Group {
  int64_t unit, grid_row, grid_col;
  int64_t row, col, num_rows, num_cols;
};

// The groups of a weight. Blocks hold no `WHOLE` here and are at least 1 and at most the weight's extent.
struct Grouping {
  int64_t num_units, num_rows, num_cols;
  int64_t num_groups;
  int64_t vecs_per_group;
  Divisor block_n, block_k;
  Divisor grid_n, grid_k;
  Divisor vecs_per_row;

  __device__ Group group(int64_t index) const {
    const int64_t line = grid_k.divide(index), unit = grid_n.divide(line);
    return group(unit, line - unit * grid_n.value, index - line * grid_k.value);
  }

  // The same for an index, and so for extents of the grid, below 2^31: fewer instructions before the first load.
  __device__ Group group32(uint32_t index) const {
    const uint32_t line = grid_k.divide32(index), unit = grid_n.divide32(line);
    return group(unit, line - unit * static_cast<uint32_t>(grid_n.value),
                 index - line * static_cast<uint32_t>(grid_k.value));
  }

 private:
  __device__ Group group(int64_t unit, int64_t grid_row, int64_t grid_col) const {
    Group g;
    g.unit = unit;
    g.grid_row = grid_row;
    g.grid_col = grid_col;
    g.row = g.grid_row * block_n.value;
    g.col = g.grid_col * block_k.value;
    g.num_rows = min(static_cast<int64_t>(block_n.value), num_rows - g.row);
    g.num_cols = min(static_cast<int64_t>(block_k.value), num_cols - g.col);
    return g;
  }
};

// A vector within its group: its first element, and how many of its elements exist. `Index` is int32_t where
// groups are known to be small, which saves registers.
template <typename Index>
struct VecPosition {
  Index row, col;
  int valid;
};

template <typename Index>
__device__ VecPosition<Index> vec_position(const Divisor& vecs_per_row, Index num_rows, Index num_cols, Index index) {
  Index row = 0;
  if constexpr (sizeof(Index) == 4) {
    row = vecs_per_row.divide32(index);
  } else if (num_rows > 1) {
    row = vecs_per_row.divide(index);
  }
  const Index col = (index - row * static_cast<Index>(vecs_per_row.value)) * kVecElements;
  const Index left = row < num_rows ? num_cols - col : 0;
  return {row, col, static_cast<int>(max(Index{0}, min(left, Index{kVecElements})))};
}

// How 32-bit words hold elements of a type.
//
// |x| as an unsigned integer orders like |x| itself, with Inf above every number and NaN above Inf, so an amax is
// an integer maximum: exact, the same in any order, and never loses a NaN.
template <typename T>
struct Elements;

template <>
struct Elements<float> {
  using Raw = uint32_t;
  __device__ static uint32_t max_abs(uint32_t acc, uint32_t word) { return max(acc, word & 0x7fffffff); }
  __device__ static uint32_t amax_bits(uint32_t acc) { return acc; }
  __device__ static Raw round(float x) { return bits_of(x); }
  // The word with each NaN made the canonical one.
  __device__ static uint32_t canonical(uint32_t word) { return is_nan(word) ? kNanBits : word; }
  static constexpr Raw kNan = kNanBits;
};

template <>
struct Elements<__nv_bfloat16> {
  using Raw = uint16_t;
  __device__ static uint32_t max_abs(uint32_t acc, uint32_t word) { return __vmaxu2(acc, word & 0x7fff7fff); }
  __device__ static uint32_t amax_bits(uint32_t acc) { return max(acc & 0xffff, acc >> 16) << 16; }
  __device__ static float2 unpack(uint32_t word) { return {float_of(word << 16), float_of(word & 0xffff0000)}; }
  __device__ static Raw round(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof(word));
    return word;
  }
  __device__ static uint32_t canonical(uint32_t word) {
    const uint32_t nans = __vcmpgtu2(word & 0x7fff7fff, 0x7f807f80);
    return (word & ~nans) | (nans & 0x7fc07fc0);
  }
  static constexpr Raw kNan = 0x7fc0;
};

template <>
struct Elements<__half> {
  using Raw = uint16_t;
  __device__ static uint32_t max_abs(uint32_t acc, uint32_t word) { return __vmaxu2(acc, word & 0x7fff7fff); }
  __device__ static uint32_t amax_bits(uint32_t acc) {
    const auto top = static_cast<unsigned short>(max(acc & 0xffff, acc >> 16));
    return bits_of(__half2float(__ushort_as_half(top)));
  }
  __device__ static float2 unpack(uint32_t word) {
    __half2 pair;
    memcpy(&pair, &word, sizeof(pair));
    return __half22float2(pair);
  }
  __device__ static Raw round(float x) { return __half_as_ushort(__float2half_rn(x)); }
  __device__ static uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof(word));
    return word;
  }
  __device__ static uint32_t canonical(uint32_t word) {
    const uint32_t nans = __vcmpgtu2(word & 0x7fff7fff, 0x7c007c00);
    return (word & ~nans) | (nans & 0x7e007e00);
  }
  static constexpr Raw kNan = 0x7e00;
};

template <typename T>
struct Vec {
  static constexpr int kWords = kVecElements * sizeof(T) / 4;
  uint32_t words[kWords];

  __device__ uint32_t max_abs(uint32_t acc) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) acc = Elements<T>::max_abs(acc, words[i]);
    return acc;
  }

  // The sign bits of elements 4 * half to 4 * half + 3 of floats, each on top of a byte; other bits are anything.
  __device__ uint32_t signs(int half) const {
    static_assert(sizeof(T) == 4);
    return __byte_perm(__byte_perm(words[4 * half], words[4 * half + 1], 0x73),
                       __byte_perm(words[4 * half + 2], words[4 * half + 3], 0x73), 0x5410);
  }

  // Elements 2 * pair and 2 * pair + 1.
  __device__ float2 pair(int pair) const {
    if constexpr (sizeof(T) == 4) {
      return {float_of(words[2 * pair]), float_of(words[2 * pair + 1])};
    } else {
      return Elements<T>::unpack(words[pair]);
    }
  }

  // The same elements, rounded, a NaN to any.
  __device__ void set_pair(int pair, float low, float high) {
    if constexpr (sizeof(T) == 4) {
      words[2 * pair] = bits_of(low);
      words[2 * pair + 1] = bits_of(high);
    } else {
      words[pair] = Elements<T>::pack(low, high);
    }
  }
};

// A vector that is whole and aligned. No hint to the caches, which makes large weights take 2% longer, but where others
// are to stay there instead.
template <bool kOnce = false, typename T>
__device__ Vec<T> load_whole_vec(const T* source) {
  Vec<T> vec;
#pragma unroll
  for (int i = 0; i < Vec<T>::kWords / 4; ++i) {
    const uint4* words = reinterpret_cast<const uint4*>(source) + i;
    const uint4 loaded = kOnce ? __ldcs(words) : *words;
    vec.words[4 * i] = loaded.x;
    vec.words[4 * i + 1] = loaded.y;
    vec.words[4 * i + 2] = loaded.z;
    vec.words[4 * i + 3] = loaded.w;
  }
  return vec;
}

// `group` is the first element of the vector's group. Missing elements read as zero, which no amax sees.
template <typename T, bool kAligned, typename Index>
__device__ Vec<T> load_vec(const T* group, const View& view, const VecPosition<Index>& at) {
  Vec<T> vec = {};
  const T* source = group + at.row * view.row_stride + (kAligned ? at.col : at.col * view.col_stride);
  if constexpr (kAligned) {
    if (at.valid == 0) return vec;
    return load_whole_vec(source);
  } else {
    using Raw = typename Elements<T>::Raw;
#pragma unroll
    for (int i = 0; i < kVecElements; ++i) {
      const uint32_t raw = i < at.valid ? reinterpret_cast<const Raw*>(source)[i * view.col_stride] : 0;
      vec.words[i * sizeof(T) / 4] |= raw << (i * sizeof(T) % 4 * 8);
    }
  }
  return vec;
}

// The codes of a vector. Where `kPlain`, the scale is one of ScaleDivider::is_plain, and floats are none that it has a
// special case for; their signs are put in last, for four codes at once.
template <Fp8Type kType, bool kPlain, typename T>
__device__ uint2 codes_of(const Vec<T>& vec, const ScaleDivider& divide) {
  uint32_t codes[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 low = vec.pair(2 * i), high = vec.pair(2 * i + 1);
    const auto four = [&](const auto& quotient) {
      return to_fp8x2(quotient(low.x), quotient(low.y), kType) |
             to_fp8x2(quotient(high.x), quotient(high.y), kType) << 16;
    };
    if constexpr (!kPlain) {
      codes[i] = four(divide);
    } else if constexpr (sizeof(T) == 2) {
      codes[i] = four(ShortDivider(divide));
    } else {
      codes[i] = four([&](float x) { return divide.plain(x); }) | (vec.signs(i) & 0x80808080);
    }
  }
  return {codes[0], codes[1]};
}

__device__ inline void store_whole_vec(uint8_t* target, uint2 codes) {
  __stcs(reinterpret_cast<uint2*>(target), codes);
}

// Cast a vector and store its codes.
template <typename T, bool kAligned, typename Index>
__device__ void store_codes(const Vec<T>& vec, const ScaleDivider& divide, Fp8Type type, uint8_t* group,
                            const View& view, const VecPosition<Index>& at) {
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 low = vec.pair(2 * i), high = vec.pair(2 * i + 1);
    words[i] = to_fp8x2(divide(low.x), divide(low.y), type) | to_fp8x2(divide(high.x), divide(high.y), type) << 16;
  }
  uint8_t* target = group + at.row * view.row_stride + (kAligned ? at.col : at.col * view.col_stride);
  if constexpr (kAligned) {
    if (at.valid != 0) __stcs(reinterpret_cast<uint2*>(target), make_uint2(words[0], words[1]));
  } else {
#pragma unroll
    for (int i = 0; i < kVecElements; ++i) {
      if (i < at.valid) target[i * view.col_stride] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
    }
  }
}

__device__ inline uint32_t load_scale(const void* scales, int64_t offset, ScaleType type) {
  switch (type) {
    case ScaleType::kBFloat16:
      return static_cast<const uint16_t*>(scales)[offset];
    case ScaleType::kE8M0:
      return static_cast<const uint8_t*>(scales)[offset];
    default:
      return static_cast<const uint32_t*>(scales)[offset];
  }
}

__device__ inline void store_scale(uint32_t stored, void* scales, int64_t offset, ScaleType type) {
  switch (type) {
    case ScaleType::kBFloat16:
      static_cast<uint16_t*>(scales)[offset] = static_cast<uint16_t>(stored);
      break;
    case ScaleType::kE8M0:
      static_cast<uint8_t*>(scales)[offset] = static_cast<uint8_t>(stored);
      break;
    default:
      static_cast<uint32_t*>(scales)[offset] = stored;
  }
}

// The maximum over a team of neighbouring threads, in every one of them. Teams wider than a warp are the whole
// thread block, and all its threads must call.
template <int kTeam>
__device__ uint32_t team_max(uint32_t value) {
  if constexpr (kTeam >= 32) {
    value = __reduce_max_sync(0xffffffff, value);
  } else {
#pragma unroll
    for (int offset = kTeam / 2; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  if constexpr (kTeam > 32) {
    __shared__ uint32_t warp_max[kTeam / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) warp_max[warp] = value;
    __syncthreads();
    value = __reduce_max_sync(0xffffffff, warp_max[lane % (kTeam / 32)]);
  }
  return value;
}

}  // namespace fp8_kernels
