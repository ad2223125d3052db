// The division and the FP8 conversion: with the scale rule the numerics that every CUDA kernel shares.
//
// Host code can call all of it too, so a machine without a GPU can check it against IEEE division.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>

#include "scale_rule.h"

namespace fp8_kernels {

// x / scale for many x, to the FP8 code that IEEE division would give.
//
// quotient = x * inv carries the rounding of inv = 1 / scale and its own. The remainder x - quotient * scale
// fits a float, so one fused step brings it back to the quotient; the result then rounds to the same FP8 code
// as the correctly rounded quotient (tests/test_cuda_build.py checks every significand of a scale against
// every FP8 rounding boundary). That needs
//   - a remainder that does not underflow: tiny scales are lifted by 2^64, and their x with them;
//   - a finite quotient: from 2^20 on, far past every FP8 value, the uncorrected one saturates just as well, and a
//     NaN stays one. A rule that multiplies by the reciprocal corrects nothing;
//   - a finite scale: x / Inf is a zero (NaN where x is Inf), which scale = 0, inv = 0 gives.
// The fused step turns -0 into +0, hence copysign; scales are never negative.
struct ScaleDivider {
  float lift, scale, inv, corrected_below;

  __host__ __device__ explicit ScaleDivider(float s, const Rule& rule = {}) : corrected_below(rule.reciprocal ? 0.0f : 0x1p20f) {
    lift = s < 0x1p-80f ? 0x1p64f : 1.0f;
    scale = s * lift;
    inv = 1.0f / scale;
    if (bits_of(s) == kInfBits) scale = 0.0f;
    if (s <= 0x1p-128f) inv = 0.0f, lift = 1.0f;  // 1 / s overflows: rules that allow such scales make zeros of them
  }

  // Whether `plain` does for all elements of a group whose own amax gave a scale of this kind, and a ShortDivider for
  // all elements of any.
  __host__ __device__ bool is_plain() const {
    return lift == 1.0f && scale > 0.0f && scale < 0x1p80f && corrected_below >= 0x1p20f;
  }

  // The same quotient for x that need none of the above, but for the sign of a zero.
  __host__ __device__ float plain(float x) const {
    const float quotient = x * inv;
    return fmaf(fmaf(-quotient, scale, x), inv, quotient);
  }

  __host__ __device__ float operator()(float x) const {
    x *= lift;
    const float quotient = x * inv;
    const float remainder = fmaf(-quotient, scale, x);
    const float corrected = copysignf(fmaf(remainder, inv, quotient), x);
    return fabsf(quotient) < corrected_below ? corrected : quotient;
  }
};

// x / scale to the same FP8 code in two operations, for bf16 and fp16: x of at most 11 significant bits.
//
// 1 / scale = high + low, where `high` has 13 bits, so that its product with x is exact, and `low` brings the sum to
// 37; the fused step then rounds once. (tests/test_cuda_build.py checks every significand of a scale against every x
// next to an FP8 rounding boundary.) `low` is above zero for powers of two as well, so that an infinite x stays one and
// a zero keeps its sign. Scales are those of ScaleDivider::is_plain, of which neither part underflows.
struct ShortDivider {
  float high, low;

  __host__ __device__ explicit ShortDivider(const ScaleDivider& divide)
      : high(float_of((bits_of(divide.inv) - 1) & 0xfffff800)), low(fmaf(-high, divide.scale, 1.0f) * divide.inv) {}

  __host__ __device__ float operator()(float x) const { return fmaf(x, low, x * high); }
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
