// The scale rule: from a group's amax to the scale as it is stored. Every kernel, on every processor, uses this one.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FP8_HOST_DEVICE __host__ __device__
#else
#define FP8_HOST_DEVICE
#endif

namespace fp8_kernels {

enum class Fp8Type : int32_t { kE4M3, kE5M2 };
enum class ScaleType : int32_t { kFloat32, kBFloat16, kE8M0 };

constexpr uint32_t kInfBits = 0x7f800000;
constexpr uint32_t kNanBits = 0x7fc00000;  // the one NaN that the ops write
constexpr float kTinyScale = 0x1p-126f;

FP8_HOST_DEVICE inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FP8_HOST_DEVICE inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

FP8_HOST_DEVICE inline bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > kInfBits; }

FP8_HOST_DEVICE inline float fp8_max(Fp8Type type) { return type == Fp8Type::kE4M3 ? 448.0f : 57344.0f; }

// The fp32 value of a stored scale.
FP8_HOST_DEVICE inline float scale_value(uint32_t stored, ScaleType type) {
  switch (type) {
    case ScaleType::kBFloat16:
      return float_of(stored << 16);
    case ScaleType::kE8M0:
      if (stored == 0xff) return float_of(kNanBits);
      return float_of(stored == 0 ? 0x00400000 : stored << 23);  // 2^-127 is subnormal in fp32
    default:
      return float_of(stored);
  }
}

// The scale of a group, as the bits that are stored: max(amax / fp8_max, 2^-126), rounded up to a power of two
// if asked for, then to its type.
FP8_HOST_DEVICE inline uint32_t stored_scale(float amax, Fp8Type fp8_type, bool pow2, ScaleType type) {
  float scale = amax / fp8_max(fp8_type);
  if (scale < kTinyScale) scale = kTinyScale;  // not fmaxf, which would drop a NaN
  uint32_t bits = bits_of(scale);
  if (pow2 && bits < kInfBits) {
    const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);
    bits = (exponent < 254 ? exponent : 254) << 23;
  }
  switch (type) {
    case ScaleType::kBFloat16:
      return is_nan(bits) ? kNanBits >> 16 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    case ScaleType::kE8M0:
      return (bits & 0x7fffffff) < kInfBits ? bits >> 23 : 0xff;  // has NaN but no Inf
    default:
      return is_nan(bits) ? kNanBits : bits;
  }
}

}  // namespace fp8_kernels
