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

// How an amax becomes a scale, and an element its code; `Rule` in fp8_kernels/reference.py, where they are chosen.
struct Rule {
  float min_amax = 0.0f;
  float min_scale = 0x1p-126f;
  bool reciprocal_max = false;  // scale = amax * (1 / fp8_max)
  bool reciprocal = false;      // code of x * (1 / scale), not of x / scale; 0 where that reciprocal overflows
};

// The rule of numerics 0 (exact) and 1 (vLLM's, which depends on what one scale covers); extents are -1 where they
// are the weight's own.
inline Rule make_rule(int64_t numerics, int64_t block_n, int64_t block_k, float fp8_max) {
  Rule rule;
  if (numerics == 0) return rule;
  const bool whole_rows = block_k == -1, whole = block_n == -1 && whole_rows;
  rule.min_scale = block_n == 1 && whole_rows ? 1.0f / (fp8_max * 512) : 0.0f;
  rule.min_amax = whole || (block_n == 1 && whole_rows) ? 0.0f : block_n == 1 ? 1e-10f : 1e-4f;
  rule.reciprocal_max = block_n != 1 && !whole;
  rule.reciprocal = !(block_n == 1 && whole_rows);
  return rule;
}

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

// The scale of a group, as the bits that are stored: amax / fp8_max, not below the rule's floors, rounded up to a
// power of two if asked for, then to its type.
FP8_HOST_DEVICE inline uint32_t stored_scale(float amax, float fp8_max, bool pow2, ScaleType type,
                                             const Rule& rule = {}) {
  if (amax < rule.min_amax) amax = rule.min_amax;  // not fmaxf, which would drop a NaN
  float scale = rule.reciprocal_max ? amax * (1.0f / fp8_max) : amax / fp8_max;
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

FP8_HOST_DEVICE inline uint32_t stored_scale(float amax, Fp8Type fp8_type, bool pow2, ScaleType type,
                                             const Rule& rule = {}) {
  return stored_scale(amax, fp8_max(fp8_type), pow2, type, rule);
}

}  // namespace fp8_kernels
