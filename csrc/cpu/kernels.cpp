// Loops over runs of elements that share a scale, written so that compilers turn them into vector code: no branches,
// no calls, floating-point numbers taken apart as integers. -DKERNELS names this instruction set's table.
#include "kernels.h"

#include <type_traits>

namespace fp8_kernels::cpu {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffff;

// How elements of a type become fp32, and back. `magnitude` is |x| as an unsigned number, ordered as |x| is, with
// NaNs on top; `widen` makes it the bits of |x| in fp32.
struct Float32 {
  using Bits = uint32_t;
  static constexpr Bits kMask = 0x7fffffff;
  static float load(Bits b) { return float_of(b); }
  static uint32_t widen(Bits magnitude) { return magnitude; }
  static Bits store(float x) { return bits_of(x); }
  static constexpr Bits kNan = kNanBits;
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr Bits kMask = 0x7fff;
  static float load(Bits b) { return float_of(static_cast<uint32_t>(b) << 16); }
  static uint32_t widen(Bits magnitude) { return static_cast<uint32_t>(magnitude) << 16; }
  static Bits store(float x) {
    const uint32_t b = bits_of(x);
    return static_cast<Bits>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
  static constexpr Bits kNan = 0x7fc0;
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr Bits kMask = 0x7fff;
  static float load(Bits b) {
    // The exponent keeps its place and gets its bias by a multiplication, which also makes subnormals normal: they
    // are added to 2^-14 and freed of it again, so that no operand is subnormal in fp32.
    const uint32_t magnitude = static_cast<uint32_t>(b & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(b & 0x8000) << 16;
    const float normal = float_of(magnitude + (112u << 23));
    const float subnormal = float_of(magnitude + (113u << 23)) - 0x1p-14f;
    const float special = float_of(magnitude | kInfBits);
    const float value = magnitude < (1u << 23) ? subnormal : normal;
    return float_of(bits_of(magnitude >= (31u << 23) ? special : value) | sign);
  }
  static uint32_t widen(Bits magnitude) { return bits_of(load(magnitude)); }
  static Bits store(float x) {
    const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000, magnitude = b & kMagnitude;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // 0.5's last place is 2^-24
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return static_cast<Bits>((magnitude >= 0x477ff000u ? 0x7c00 : finite) | sign);  // 65520 and more round to Inf
  }
  static constexpr Bits kNan = 0x7e00;
};

// FP8 formats by their mantissa bits and exponent bias; `kFnuz`: see Format.
template <int kMantissaBits, int kBias, bool kFnuz>
struct Fp8 {
  static constexpr uint32_t kNanCode = kFnuz ? 0x80 : 0x7f;

  // Saturating at a number of this format, given as bits; ties to even; every NaN is the same code.
  static uint8_t encode(float x, uint32_t max_bits) {
    const uint32_t b = bits_of(x), magnitude = b & kMagnitude;
    const uint32_t clamped = magnitude < max_bits ? magnitude : max_bits;
    constexpr int kDropped = 23 - kMantissaBits;
    // Below the smallest normal the sum's last place is the subnormals' step, so the addition rounds.
    constexpr uint32_t kMagic = static_cast<uint32_t>(127 - kBias + kDropped + 1) << 23;
    constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(127 - kBias + 1) << 23;
    const uint32_t subnormal = bits_of(float_of(clamped) + float_of(kMagic)) - kMagic;
    const uint32_t half = (1u << (kDropped - 1)) - 1 + ((clamped >> kDropped) & 1);
    const uint32_t normal = (clamped - (static_cast<uint32_t>(127 - kBias) << 23) + half) >> kDropped;
    const uint32_t value = clamped < kSmallestNormal ? subnormal : normal;
    const uint32_t sign = (b >> 24) & (kFnuz && value == 0 ? 0 : 0x80);
    return static_cast<uint8_t>(magnitude > kInfBits ? kNanCode : value | sign);
  }

  static float decode(uint8_t code) {
    const uint32_t magnitude = static_cast<uint32_t>(code & 0x7f) << (23 - kMantissaBits);
    constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;
    constexpr uint32_t kOne = 1u << 23;
    const float subnormal = float_of(magnitude + kRebias + kOne) - float_of(kRebias + kOne);
    const float normal = float_of(magnitude + kRebias);
    const uint32_t value = bits_of(magnitude < kOne ? subnormal : normal) | static_cast<uint32_t>(code & 0x80) << 24;
    if constexpr (kFnuz) return float_of(code == kNanCode ? kNanBits : value);
    if constexpr (kMantissaBits == 3) return float_of((code & 0x7f) == 0x7f ? kNanBits : value);
    const uint32_t special = (code & 0x7f) == 0x7c ? kInfBits | (value & ~kMagnitude) : kNanBits;
    return float_of((code & 0x7f) >= 0x7c ? special : value);
  }
};

template <typename Function>
void dispatch(InputType type, Function&& f) {
  switch (type) {
    case InputType::kFloat32:
      return f(Float32{});
    case InputType::kFloat16:
      return f(Float16{});
    case InputType::kBFloat16:
      return f(BFloat16{});
  }
}

template <typename Function>
void dispatch(Format format, Function&& f) {
  switch (format) {
    case Format::kE4M3:
      return f(Fp8<3, 7, false>{});
    case Format::kE5M2:
      return f(Fp8<2, 15, false>{});
    case Format::kE4M3Fnuz:
      return f(Fp8<3, 8, true>{});
    case Format::kE5M2Fnuz:
      return f(Fp8<2, 16, true>{});
  }
}

// Calls f(column group, first element of the run in the row, its length).
template <typename Function>
void for_each_run(const Grouping& g, Function&& f) {
  for (int64_t group = 0, col = 0; group < g.grid_k; ++group, col += g.block_k) {
    f(group, col, col + g.block_k < g.num_cols ? g.block_k : g.num_cols - col);
  }
}

template <typename T>
T* at(const View& v, int64_t unit, int64_t row) {
  return static_cast<T*>(v.data) + unit * v.unit_stride + row * v.row_stride;
}

// A stride of one is a constant to the compiler, or the loop would not become vector code.
template <typename Function>
void with_stride(int64_t stride, Function&& f) {
  struct One {
    constexpr operator int64_t() const { return 1; }
  };
  stride == 1 ? f(One{}) : f(stride);
}

template <typename Stride, typename Bits>
Bits largest_magnitude(const Bits* x, int64_t size, Stride stride, Bits mask) {
  Bits largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const Bits magnitude = x[i * stride] & mask;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

void merge_amax(const Weight& weight, int64_t unit, int64_t first_row, int64_t last_row, uint32_t* amax) {
  dispatch(weight.type, [&](auto element) {
    using Element = decltype(element);
    using Bits = typename Element::Bits;
    with_stride(weight.w.col_stride, [&](auto stride) {
      for (int64_t row = first_row; row < last_row; ++row) {
        const Bits* x = at<const Bits>(weight.w, unit, row);
        for_each_run(weight.grouping, [&](int64_t group, int64_t col, int64_t size) {
          const auto found = Element::widen(largest_magnitude(x + col * stride, size, stride, Element::kMask));
          amax[group] = found > amax[group] ? found : amax[group];
        });
      }
    });
  });
}

template <typename Element, typename Format, typename Stride>
void cast_run(const typename Element::Bits* x, uint8_t* q, int64_t size, Stride x_stride, Stride q_stride, float scale,
              bool reciprocal, uint32_t max_bits) {
  if (reciprocal) {
    for (int64_t i = 0; i < size; ++i) {
      q[i * q_stride] = Format::encode(Element::load(x[i * x_stride]) * scale, max_bits);
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      q[i * q_stride] = Format::encode(Element::load(x[i * x_stride]) / scale, max_bits);
    }
  }
}

void cast(const Weight& weight, const Codes& codes, int64_t unit, int64_t first_row, int64_t last_row,
          const float* scale, bool reciprocal, float fp8_max) {
  const uint32_t max_bits = bits_of(fp8_max);
  const int64_t x_stride = weight.w.col_stride, q_stride = codes.q.col_stride;
  dispatch(weight.type, [&](auto element) {
    dispatch(codes.format, [&](auto format) {
      using Element = decltype(element);
      using Format = decltype(format);
      for (int64_t row = first_row; row < last_row; ++row) {
        const auto* x = at<const typename Element::Bits>(weight.w, unit, row);
        auto* q = at<uint8_t>(codes.q, unit, row);
        for_each_run(weight.grouping, [&](int64_t group, int64_t col, int64_t size) {
          with_stride(x_stride == 1 && q_stride == 1 ? 1 : 2, [&](auto stride) {
            if constexpr (std::is_same_v<decltype(stride), int64_t>) {
              cast_run<Element, Format>(x + col * x_stride, q + col * q_stride, size, x_stride, q_stride, scale[group],
                                        reciprocal, max_bits);
            } else {
              cast_run<Element, Format>(x + col, q + col, size, stride, stride, scale[group], reciprocal, max_bits);
            }
          });
        });
      }
    });
  });
}

template <typename Element, typename Format, typename Stride>
void dequantize_run(const uint8_t* q, typename Element::Bits* w, int64_t size, Stride q_stride, Stride w_stride,
                    float scale) {
  for (int64_t i = 0; i < size; ++i) {
    const float x = Format::decode(q[i * q_stride]) * scale;
    w[i * w_stride] = (bits_of(x) & kMagnitude) > kInfBits ? Element::kNan : Element::store(x);
  }
}

void dequantize(const Codes& codes, const Weight& weight, int64_t unit, int64_t first_row, int64_t last_row,
                const float* scale) {
  const int64_t w_stride = weight.w.col_stride, q_stride = codes.q.col_stride;
  dispatch(weight.type, [&](auto element) {
    dispatch(codes.format, [&](auto format) {
      using Element = decltype(element);
      using Format = decltype(format);
      for (int64_t row = first_row; row < last_row; ++row) {
        auto* w = at<typename Element::Bits>(weight.w, unit, row);
        const auto* q = at<const uint8_t>(codes.q, unit, row);
        for_each_run(weight.grouping, [&](int64_t group, int64_t col, int64_t size) {
          with_stride(w_stride == 1 && q_stride == 1 ? 1 : 2, [&](auto stride) {
            if constexpr (std::is_same_v<decltype(stride), int64_t>) {
              dequantize_run<Element, Format>(q + col * q_stride, w + col * w_stride, size, q_stride, w_stride,
                                              scale[group]);
            } else {
              dequantize_run<Element, Format>(q + col, w + col, size, stride, stride, scale[group]);
            }
          });
        });
      }
    });
  });
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {merge_amax, cast, dequantize};

}  // namespace fp8_kernels::cpu
