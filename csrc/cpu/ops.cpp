// The ops for CPU tensors: from tensors to loops over bands of rows, shared out over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "../scale_rule.h"
#include "kernels.h"

namespace fp8_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWhole = -1;  // a block extent: the weight's whole extent
constexpr int64_t kElementsPerTask = 1 << 16;

// The best table that the processor has; FP8_KERNELS_CPU_LEVEL (0: baseline, 1: AVX2, 2: AVX-512) asks for less.
const Kernels& best_kernels() {
  const char* wanted = std::getenv("FP8_KERNELS_CPU_LEVEL");
  [[maybe_unused]] const int level = wanted != nullptr ? std::atoi(wanted) : 2;
#if defined(__x86_64__)
  if (level >= 2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("fma")) {
    return kAvx2;
  }
#endif
  return kBaseline;
}

const Kernels& kernels() {
  static const Kernels& best = best_kernels();
  return best;
}

ScalarType scalar_type(const Tensor& t) {
  int32_t number;  // by name the ABI of torch 2.10 does not know float8_e8m0fnu
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  return static_cast<ScalarType>(number);
}

InputType input_type(const Tensor& t) {
  const ScalarType type = scalar_type(t);
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "`w` must be float32, float16 or bfloat16");
  return type == ScalarType::Float  ? InputType::kFloat32
         : type == ScalarType::Half ? InputType::kFloat16
                                    : InputType::kBFloat16;
}

Format format_of(const Tensor& t) {
  switch (scalar_type(t)) {
    case ScalarType::Float8_e4m3fn:
      return Format::kE4M3;
    case ScalarType::Float8_e5m2:
      return Format::kE5M2;
    case ScalarType::Float8_e4m3fnuz:
      return Format::kE4M3Fnuz;
    case ScalarType::Float8_e5m2fnuz:
      return Format::kE5M2Fnuz;
    default:
      STD_TORCH_CHECK(false, "`q` must be one of the FP8 dtypes");
  }
}

float fp8_max(Format format, int64_t numerics) {
  if (format == Format::kE4M3) return 448.0f;
  if (format == Format::kE4M3Fnuz) return numerics == 0 ? 240.0f : 224.0f;  // see rule() in fp8_kernels/reference.py
  return 57344.0f;
}

ScaleType scale_type(const Tensor& t) {
  const ScalarType type = scalar_type(t);
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Byte ||
                      type == ScalarType::Float8_e8m0fnu,
                  "`scale` must be float32, bfloat16 or float8_e8m0fnu");
  return type == ScalarType::Float      ? ScaleType::kFloat32
         : type == ScalarType::BFloat16 ? ScaleType::kBFloat16
                                        : ScaleType::kE8M0;  // bytes are e8m0, as fp8_kernels/ops.py passes them
}

// A tensor as [units, rows, columns]: it has one dimension less where `w` is one unit, and no rows and columns where
// `is_grid` is false, as scales that cover whole weights have none. Python checks more, with the names that the user
// gave; this keeps a direct caller of the op inside of the tensors.
View view(const char* name, const Tensor& t, int64_t units, int64_t rows, int64_t cols, const Tensor& w,
          bool is_grid = true) {
  STD_TORCH_CHECK(t.is_cpu(), "`", name, "` must be on the CPU");
  const int64_t sizes[] = {units, rows, cols};
  const int64_t first = w.dim() == 3 ? 0 : 1, dim = (is_grid ? 3 : 1) - first;
  int64_t strides[3] = {};
  bool same = t.dim() == dim;
  for (int64_t i = 0; same && i < dim; ++i) {
    same = t.size(i) == sizes[first + i];
    strides[first + i] = t.stride(i);
  }
  STD_TORCH_CHECK(same, "`", name, "` must have ", dim, " dimensions, and the sizes that the first argument asks for");
  return {t.data_ptr(), strides[0], strides[1], strides[2]};
}

bool has_grid(int64_t block_n, int64_t block_k) { return block_n != kWhole || block_k != kWhole; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Grouping make_grouping(const Tensor& w, int64_t block_n, int64_t block_k) {
  STD_TORCH_CHECK(w.dim() == 2 || w.dim() == 3, "the weight must have two or three dimensions, got ", w.dim());
  STD_TORCH_CHECK((block_n > 0 || block_n == kWhole) && (block_k > 0 || block_k == kWhole),
                  "block sizes must be positive or -1, got ", block_n, " and ", block_k);
  Grouping g;
  g.num_units = w.dim() == 3 ? w.size(0) : 1;
  g.num_rows = w.size(w.dim() - 2);
  g.num_cols = w.size(w.dim() - 1);
  const auto extent = [](int64_t block, int64_t size) {
    return std::max<int64_t>(1, block == kWhole ? size : std::min(block, size));
  };
  g.block_n = extent(block_n, g.num_rows), g.block_k = extent(block_k, g.num_cols);
  // A whole extent has its one scale even where it has no elements.
  g.grid_n = block_n == kWhole ? 1 : ceil_div(g.num_rows, block_n);
  g.grid_k = block_k == kWhole ? 1 : ceil_div(g.num_cols, block_k);
  return g;
}

// A strided element of a tensor of scales or maxima.
template <typename T>
T& element(const View& v, int64_t unit, int64_t row, int64_t col) {
  return static_cast<T*>(v.data)[unit * v.unit_stride + row * v.row_stride + col * v.col_stride];
}

uint32_t load_scale(const View& v, ScaleType type, int64_t unit, int64_t row, int64_t col) {
  switch (type) {
    case ScaleType::kFloat32:
      return element<uint32_t>(v, unit, row, col);
    case ScaleType::kBFloat16:
      return element<uint16_t>(v, unit, row, col);
    default:
      return element<uint8_t>(v, unit, row, col);
  }
}

void store_scale(uint32_t bits, const View& v, ScaleType type, int64_t unit, int64_t row, int64_t col) {
  switch (type) {
    case ScaleType::kFloat32:
      element<uint32_t>(v, unit, row, col) = bits;
      break;
    case ScaleType::kBFloat16:
      element<uint16_t>(v, unit, row, col) = static_cast<uint16_t>(bits);
      break;
    default:
      element<uint8_t>(v, unit, row, col) = static_cast<uint8_t>(bits);
  }
}

// Rows of a unit that share their scales: all rows of a band are within one row of groups.
struct Band {
  int64_t unit, grid_row, first_row, last_row;
};

// Cuts a weight into bands of at most about kElementsPerTask elements, or into whole rows of groups.
class Bands {
 public:
  Bands(const Grouping& g, bool whole_groups) : g_(g) {
    const int64_t rows = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, g.num_cols));
    rows_ = whole_groups ? g.block_n : std::min(g.block_n, rows);
    per_group_ = ceil_div(g.block_n, rows_);
  }

  int64_t count() const { return g_.num_units * g_.grid_n * per_group_; }

  Band operator[](int64_t i) const {
    const int64_t part = i % per_group_, grid_row = i / per_group_ % g_.grid_n;
    const int64_t end = std::min(g_.num_rows, (grid_row + 1) * g_.block_n);
    const int64_t first = std::min(end, grid_row * g_.block_n + part * rows_);
    return {i / per_group_ / g_.grid_n, grid_row, first, std::min(end, first + rows_)};
  }

  template <typename Function>
  void for_each(const Function& f) const {
    const int64_t elements = std::max<int64_t>(1, rows_ * g_.num_cols);
    torch::stable::parallel_for(0, count(), std::max<int64_t>(1, kElementsPerTask / elements),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) f((*this)[i]);
                                });
  }

 private:
  const Grouping& g_;
  int64_t rows_, per_group_;
};

void merge(uint32_t bits, std::atomic<uint32_t>& into) {
  uint32_t seen = into.load(std::memory_order_relaxed);
  while (bits > seen && !into.compare_exchange_weak(seen, bits, std::memory_order_relaxed)) {
  }
}

// The maxima of every group, as bits, [E, SN, SK].
std::vector<uint32_t> find_amax(const Weight& weight) {
  const Grouping& g = weight.grouping;
  std::vector<std::atomic<uint32_t>> found(g.num_units * g.grid_n * g.grid_k);
  Bands(g, false).for_each([&](const Band& band) {
    std::vector<uint32_t> amax(g.grid_k);
    kernels().merge_amax(weight, band.unit, band.first_row, band.last_row, amax.data());
    for (int64_t col = 0; col < g.grid_k; ++col) {
      merge(amax[col], found[(band.unit * g.grid_n + band.grid_row) * g.grid_k + col]);
    }
  });
  return {found.begin(), found.end()};
}

void quantize_out(const Tensor& w, const std::optional<Tensor>& amax, const Tensor& q, const Tensor& scale,
                  int64_t block_n, int64_t block_k, bool pow2, int64_t numerics) {
  const Grouping g = make_grouping(w, block_n, block_k);
  const bool is_grid = has_grid(block_n, block_k);
  const Weight source = {g, view("w", w, g.num_units, g.num_rows, g.num_cols, w), input_type(w)};
  const Codes codes = {view("q", q, g.num_units, g.num_rows, g.num_cols, w),
                       view("scale", scale, g.num_units, g.grid_n, g.grid_k, w, is_grid), format_of(q),
                       scale_type(scale)};
  STD_TORCH_CHECK(numerics == 0 || numerics == 1, "`numerics` must be 0 or 1, got ", numerics);
  const float max = fp8_max(codes.format, numerics);
  const Rule rule = make_rule(numerics, block_n, block_k, max);
  View given;
  if (amax.has_value()) {
    STD_TORCH_CHECK(scalar_type(*amax) == ScalarType::Float, "`amax` must be float32");
    given = view("amax", *amax, g.num_units, g.grid_n, g.grid_k, w, is_grid);
  }
  if (g.num_units * g.grid_n * g.grid_k == 0) return;

  // Enough rows of groups for all threads: find and cast while a row of groups is in the cache. Else in two passes.
  const bool one_pass = !amax.has_value() && g.num_units * g.grid_n >= 4 * torch::stable::get_num_threads();
  std::vector<uint32_t> found;
  if (!one_pass && !amax.has_value()) found = find_amax(source);

  const auto cast_band = [&](const Band& band, const uint32_t* band_amax) {
    std::vector<float> scales(g.grid_k);
    for (int64_t col = 0; col < g.grid_k; ++col) {
      const uint32_t bits =
          amax.has_value() ? element<uint32_t>(given, band.unit, band.grid_row, col) : band_amax[col];
      const uint32_t stored = stored_scale(float_of(bits), max, pow2, codes.scale_type, rule);
      scales[col] = scale_value(stored, codes.scale_type);
      if (rule.reciprocal) {
        const float reciprocal = 1.0f / scales[col];
        scales[col] = bits_of(reciprocal) == kInfBits ? 0.0f : reciprocal;
      }
      if (band.first_row == band.grid_row * g.block_n) {
        store_scale(stored, codes.scale, codes.scale_type, band.unit, band.grid_row, col);
      }
    }
    kernels().cast(source, codes, band.unit, band.first_row, band.last_row, scales.data(), rule.reciprocal, max);
  };
  Bands(g, one_pass).for_each([&](const Band& band) {
    if (one_pass) {
      std::vector<uint32_t> band_amax(g.grid_k);
      kernels().merge_amax(source, band.unit, band.first_row, band.last_row, band_amax.data());
      cast_band(band, band_amax.data());
    } else {
      cast_band(band, found.empty() ? nullptr : &found[(band.unit * g.grid_n + band.grid_row) * g.grid_k]);
    }
  });
}

void amax_out(const Tensor& w, const Tensor& amax, int64_t block_n, int64_t block_k, bool accumulate) {
  const Grouping g = make_grouping(w, block_n, block_k);
  const Weight weight = {g, view("w", w, g.num_units, g.num_rows, g.num_cols, w), input_type(w)};
  STD_TORCH_CHECK(scalar_type(amax) == ScalarType::Float, "`amax` must be float32");
  const View target = view("amax", amax, g.num_units, g.grid_n, g.grid_k, w, has_grid(block_n, block_k));
  const std::vector<uint32_t> found = find_amax(weight);
  for (int64_t i = 0; i < static_cast<int64_t>(found.size()); ++i) {
    auto& to = element<uint32_t>(target, i / g.grid_k / g.grid_n, i / g.grid_k % g.grid_n, i % g.grid_k);
    const uint32_t bits = accumulate ? std::max(found[i], to & 0x7fffffff) : found[i];
    to = is_nan(bits) ? kNanBits : bits;
  }
}

void quantize_many_out(const std::vector<Tensor>& w, const std::vector<Tensor>& q, const std::vector<Tensor>& scale,
                       int64_t block_n, int64_t block_k, bool pow2, int64_t numerics) {
  STD_TORCH_CHECK(q.size() == w.size() && scale.size() == w.size(), "`q` and `scale` must have the length of `w`, ",
                  w.size(), ", got ", q.size(), " and ", scale.size());
  for (size_t i = 0; i < w.size(); ++i) {
    quantize_out(w[i], std::nullopt, q[i], scale[i], block_n, block_k, pow2, numerics);
  }
}

void copy_amax_out(const Tensor& w, const Tensor& out, const Tensor& amax, int64_t block_n, int64_t block_k) {
  Tensor target = out;
  torch::stable::copy_(target, w);
  amax_out(out, amax, block_n, block_k, true);
}

void dequantize_out(const Tensor& q, const Tensor& scale, const Tensor& w, int64_t block_n, int64_t block_k) {
  const Grouping g = make_grouping(q, block_n, block_k);
  const Weight weight = {g, view("w", w, g.num_units, g.num_rows, g.num_cols, q), input_type(w)};
  const Codes codes = {view("q", q, g.num_units, g.num_rows, g.num_cols, q),
                       view("scale", scale, g.num_units, g.grid_n, g.grid_k, q, has_grid(block_n, block_k)),
                       format_of(q), scale_type(scale)};
  Bands(g, false).for_each([&](const Band& band) {
    std::vector<float> scales(g.grid_k);
    for (int64_t col = 0; col < g.grid_k; ++col) {
      const uint32_t stored = load_scale(codes.scale, codes.scale_type, band.unit, band.grid_row, col);
      scales[col] = scale_value(stored, codes.scale_type);
    }
    kernels().dequantize(codes, weight, band.unit, band.first_row, band.last_row, scales.data());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp8_kernels, CPU, m) {
  m.impl("quantize_out", TORCH_BOX(&quantize_out));
  m.impl("amax_out", TORCH_BOX(&amax_out));
  m.impl("quantize_many_out", TORCH_BOX(&quantize_many_out));
  m.impl("copy_amax_out", TORCH_BOX(&copy_amax_out));
  m.impl("dequantize_out", TORCH_BOX(&dequantize_out));
}

}  // namespace fp8_kernels::cpu
