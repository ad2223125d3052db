// The scale rule, the division and the FP8 conversion: the numerics that every kernel shares.
//
// Host code can call all of it too, so a machine without a GPU can check it against IEEE division.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fp8_kernels {

enum class Fp8Type : int32_t { kE4M3, kE5M2 };
enum class ScaleType : int32_t { kFloat32, kBFloat16, kE8M0 };

constexpr uint32_t kInfBits = 0x7f800000;
constexpr uint32_t kNanBits = 0x7fc00000;  // the one NaN that the ops write

// How an amax becomes a scale, and an element its code; `Rule` in fp8_kernels/reference.py, where they are chosen.
struct Rule {
  float min_amax = 0.0f;
  float min_scale = 0x1p-126f;
  bool reciprocal_max = false;         // scale = amax * (1 / fp8_max)
  float corrected_below = 0x1p20f;     // see ScaleDivider; 0 leaves x * (1 / scale) as it is
};

__host__ __device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

__host__ __device__ inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

__host__ __device__ inline bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > kInfBits; }

__host__ __device__ inline float fp8_max(Fp8Type type) { return type == Fp8Type::kE4M3 ? 448.0f : 57344.0f; }

// The fp32 value of a stored scale.
__host__ __device__ inline float scale_value(uint32_t stored, ScaleType type) {
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

// The scale of a group, as the bits that are stored: amax / fp8_max, not below the rule's floors, rounded up to a
// power of two if asked for, then to its type.
__host__ __device__ inline uint32_t stored_scale(float amax, Fp8Type fp8_type, bool pow2, ScaleType type,
                                                 const Rule& rule = {}) {
  if (amax < rule.min_amax) amax = rule.min_amax;  // not fmaxf, which would drop a NaN
  float scale = rule.reciprocal_max ? amax * (1.0f / fp8_max(fp8_type)) : amax / fp8_max(fp8_type);
  if (scale < rule.min_scale) scale = rule.min_scale;
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

// x / scale for many x, to the FP8 code that IEEE division would give.
//
// quotient = x * inv carries the rounding of inv = 1 / scale and its own. The remainder x - quotient * scale
// fits a float, so one fused step brings it back to the quotient; the result then rounds to the same FP8 code
// as the correctly rounded quotient (tests/test_cuda_build.py checks every significand of a scale against
// every FP8 rounding boundary). That needs
//   - a remainder that does not underflow: tiny scales are lifted by 2^64, and their x with them;
//   - a finite quotient: from 2^20 (rule.corrected_below) on, far past every FP8 value, the uncorrected one saturates just as well, and
//     a NaN stays one;
//   - a finite scale: x / Inf is a zero (NaN where x is Inf), which scale = 0, inv = 0 gives.
// The fused step turns -0 into +0, hence copysign; scales are never negative.
struct ScaleDivider {
  float lift, scale, inv, corrected_below;

  __host__ __device__ explicit ScaleDivider(float s, const Rule& rule = {}) : corrected_below(rule.corrected_below) {
    lift = s < 0x1p-80f ? 0x1p64f : 1.0f;
    scale = s * lift;
    inv = 1.0f / scale;
    if (bits_of(s) == kInfBits) scale = 0.0f;
    if (s <= 0x1p-128f) inv = 0.0f, lift = 1.0f;  // 1 / s overflows: rules that allow such scales make zeros of them
  }

  __host__ __device__ float operator()(float x) const {
    x *= lift;
    const float quotient = x * inv;
    const float remainder = fmaf(-quotient, scale, x);
    const float corrected = copysignf(fmaf(remainder, inv, quotient), x);
    return fabsf(quotient) < corrected_below ? corrected : quotient;
  }
};

// Two FP8 codes, `low` in the lower byte: nearest, ties to even, saturating (Inf too), NaN to 0x7f.
__host__ __device__ inline uint32_t to_fp8x2(float low, float high, Fp8Type type) {
  const float2 pair = {low, high};
  return type == Fp8Type::kE4M3 ? __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3)
                                : __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E5M2);
}

// The values of two FP8 codes; every one of them is a half.
__device__ inline float2 from_fp8x2(uint32_t codes, Fp8Type type) {
  const auto pair = static_cast<__nv_fp8x2_storage_t>(codes);
  return __half22float2(type == Fp8Type::kE4M3 ? __half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3))
                                               : __half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E5M2)));
}

}  // namespace fp8_kernels
