// The ops: from tensors to kernel parameters, and the choice of kernel.
#include "ops.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>

#include "kernels.h"

namespace fp8_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kWhole = -1;  // a block extent: the weight's whole extent

// The number, not the name that Tensor::scalar_type() gives: under the ABI of torch 2.10 that one does not know
// float8_e8m0fnu. Numbers of scalar types are part of the serialization format and never change.
ScalarType scalar_type(const Tensor& t) {
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  return static_cast<ScalarType>(number);
}

InputType input_type(const char* name, const Tensor& t) {
  switch (scalar_type(t)) {
    case ScalarType::Float:
      return InputType::kFloat32;
    case ScalarType::Half:
      return InputType::kFloat16;
    case ScalarType::BFloat16:
      return InputType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "`", name, "` must be float32, float16 or bfloat16");
  }
}

Fp8Type fp8_type(const char* name, const Tensor& t) {
  const ScalarType type = scalar_type(t);
  STD_TORCH_CHECK(type == ScalarType::Float8_e4m3fn || type == ScalarType::Float8_e5m2, "`", name,
                  "` must be float8_e4m3fn or float8_e5m2; the other formats are not for NVIDIA's GPUs");
  return type == ScalarType::Float8_e4m3fn ? Fp8Type::kE4M3 : Fp8Type::kE5M2;
}

ScaleType scale_type(const Tensor& t) {
  switch (scalar_type(t)) {
    case ScalarType::Float:
      return ScaleType::kFloat32;
    case ScalarType::BFloat16:
      return ScaleType::kBFloat16;
    case ScalarType::Byte:  // as fp8_kernels/ops.py passes e8m0 scales
    case ScalarType::Float8_e8m0fnu:
      return ScaleType::kE8M0;
    default:
      STD_TORCH_CHECK(false, "`scale` must be float32, bfloat16 or float8_e8m0fnu");
  }
}

void check_amax_type(const Tensor& t) {
  STD_TORCH_CHECK(scalar_type(t) == ScalarType::Float, "`amax` must be float32");
}

std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// A tensor on the device of `w` as [units, rows, columns]: it has one dimension less where `w` is one unit, and no
// rows and columns where `is_grid` is false, as scales that cover whole weights have none. All that Python checks is
// checked here, so that Python need not where CUDA serves.
View view(const char* name, const Tensor& t, int64_t units, int64_t rows, int64_t cols, const Tensor& w,
          bool is_grid = true) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == w.get_device_index(), "`", name,
                  "` must be on the CUDA device of the first argument");
  const int64_t sizes[] = {units, rows, cols};
  const int64_t first = w.dim() == 3 ? 0 : 1, dim = (is_grid ? 3 : 1) - first;
  int64_t strides[3] = {};
  bool same = t.dim() == dim;
  for (int64_t i = 0; same && i < dim; ++i) {
    same = t.size(i) == sizes[first + i];
    strides[first + i] = t.stride(i);
  }
  STD_TORCH_CHECK(same, "`", name, "` must have shape ", shape_text(sizes + first, dim));
  return {t.data_ptr(), strides[0], strides[1], strides[2]};
}

bool has_grid(int64_t block_n, int64_t block_k) { return block_n != kWhole || block_k != kWhole; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t num_blocks(int64_t extent, int64_t block) { return block == kWhole ? 1 : ceil_div(extent, block); }

Grouping make_grouping(const Tensor& w, int64_t block_n, int64_t block_k) {
  STD_TORCH_CHECK(w.dim() == 2 || w.dim() == 3, "the weight must have two or three dimensions, got ", w.dim());
  STD_TORCH_CHECK((block_n > 0 || block_n == kWhole) && (block_k > 0 || block_k == kWhole),
                  "block sizes must be positive or -1, got ", block_n, " and ", block_k);
  Grouping g;
  g.num_units = w.dim() == 3 ? w.size(0) : 1;
  g.num_rows = w.size(w.dim() - 2);
  g.num_cols = w.size(w.dim() - 1);
  const int64_t grid_n = num_blocks(g.num_rows, block_n), grid_k = num_blocks(g.num_cols, block_k);
  g.num_groups = g.num_units * grid_n * grid_k;
  const int64_t rows = std::max<int64_t>(1, block_n == kWhole ? g.num_rows : std::min(block_n, g.num_rows));
  const int64_t cols = std::max<int64_t>(1, block_k == kWhole ? g.num_cols : std::min(block_k, g.num_cols));
  g.block_n = Divisor(rows);
  g.block_k = Divisor(cols);
  g.grid_n = Divisor(std::max<int64_t>(1, grid_n));
  g.grid_k = Divisor(std::max<int64_t>(1, grid_k));
  g.vecs_per_row = Divisor(ceil_div(cols, kVecElements));
  g.vecs_per_group = rows * ceil_div(cols, kVecElements);
  return g;
}

bool rows_adjoin(const View& v, const Grouping& g) {
  return g.num_rows <= 1 || v.row_stride == g.num_cols * v.col_stride;
}

// Where one scale covers all rows and they follow one another in memory, they are one long row: fewer partial
// vectors, and no row to find.
void join_rows(Grouping& g) {
  const int64_t num_elements = g.num_rows * g.num_cols;
  g.num_rows = std::min<int64_t>(g.num_rows, 1);
  g.num_cols = num_elements;
  g.vecs_per_group = std::max<int64_t>(1, ceil_div(num_elements, kVecElements));
  g.block_n = Divisor(1);
  g.block_k = Divisor(std::max<int64_t>(1, num_elements));
  g.vecs_per_row = Divisor(g.vecs_per_group);
}

// Every vector of every group is whole, and starts at a multiple of `bytes` (of its own size where that is less).
bool is_aligned(const View& v, const Grouping& g, int64_t element_size) {
  const int64_t bytes = std::min<int64_t>(16, kVecElements * element_size);
  const auto multiple = [&](int64_t stride, int64_t extent) {
    return extent <= 1 || stride * element_size % bytes == 0;
  };
  const bool whole_vecs =
      g.num_cols % kVecElements == 0 && (g.grid_k.value == 1 || g.block_k.value % kVecElements == 0);
  return whole_vecs && (v.col_stride == 1 || g.num_cols <= 1) && reinterpret_cast<uintptr_t>(v.data) % bytes == 0 &&
         multiple(v.row_stride, g.num_rows) && multiple(v.unit_stride, g.num_units);
}

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A few KB from torch's allocator, which is ordered by the current stream and works under graph capture: the next
// kernel that gets this memory runs after ours.
Tensor scratch(int64_t num_words, const Tensor& like) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &num_words, &stride, aoti_torch_dtype_int32(),
                                                  aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
  return Tensor(handle);
}

// A call of quantize_out, checked.
struct Quantize {
  QuantizeParams params;
  InputType type;
  int64_t element_size;
  bool aligned;
};

Quantize prepare(const Tensor& w, const std::optional<Tensor>& amax, const Tensor& q, const Tensor& scale,
                 int64_t block_n, int64_t block_k, bool pow2, int64_t numerics) {
  Quantize call = {};
  QuantizeParams& p = call.params;
  p.grouping = make_grouping(w, block_n, block_k);
  Grouping& g = p.grouping;
  const int64_t grid_n = num_blocks(g.num_rows, block_n), grid_k = num_blocks(g.num_cols, block_k);
  p.w = view("w", w, g.num_units, g.num_rows, g.num_cols, w);
  p.q = view("q", q, g.num_units, g.num_rows, g.num_cols, w);
  const bool is_grid = has_grid(block_n, block_k);
  p.scale = view("scale", scale, g.num_units, grid_n, grid_k, w, is_grid);
  if (amax.has_value()) {
    check_amax_type(*amax);
    p.amax = view("amax", *amax, g.num_units, grid_n, grid_k, w, is_grid);
  }
  call.type = input_type("w", w);
  call.element_size = w.element_size();
  p.fp8_type = fp8_type("q", q);
  p.scale_type = scale_type(scale);
  p.pow2 = pow2;
  STD_TORCH_CHECK(numerics == 0 || numerics == 1, "`numerics` must be 0 or 1, got ", numerics);
  p.rule = make_rule(numerics, block_n, block_k, fp8_max(p.fp8_type));
  if (g.num_groups == 0) return call;
  if (block_n == kWhole && block_k == kWhole && rows_adjoin(p.w, g) && rows_adjoin(p.q, g)) join_rows(g);
  call.aligned = is_aligned(p.w, g, call.element_size) && is_aligned(p.q, g, 1);
  return call;
}

// Whether each group is a run of memory that the ring can load.
bool fits_ring(const Quantize& call) {
  const Grouping& g = call.params.grouping;
  return call.aligned && g.block_n.value == 1 && g.grid_k.value == 1 && has_ring();
}

RingWeight ring_weight(const Quantize& call) {
  const QuantizeParams& p = call.params;
  RingWeight weight = {};
  weight.w = static_cast<const uint8_t*>(p.w.data);
  weight.q = static_cast<uint8_t*>(p.q.data);
  weight.scale = p.scale.data;
  weight.w_strides = {p.w.unit_stride * call.element_size, p.w.row_stride * call.element_size};
  weight.q_strides = {p.q.unit_stride, p.q.row_stride};
  weight.scale_strides = {p.scale.unit_stride, p.scale.row_stride};
  weight.num_groups = p.grouping.num_groups;
  weight.group_bytes = p.grouping.num_cols * call.element_size;
  weight.rows = Divisor(p.grouping.num_groups / p.grouping.num_units);
  return weight;
}

// Weights of one device that differ in sizes and places alone, at most kMaxRingWeights.
void quantize_in_ring(const std::vector<Quantize>& calls, const Tensor& like, cudaStream_t stream) {
  const QuantizeParams& p = calls[0].params;
  RingParams ring = {};
  ring.fp8_type = p.fp8_type;
  ring.scale_type = p.scale_type;
  ring.pow2 = p.pow2;
  ring.rule = p.rule;
  for (const Quantize& call : calls) ring.weights[ring.num_weights++] = ring_weight(call);
  plan_ring(ring);
  const Tensor mailboxes = scratch(ring.num_mailboxes, like);
  ring.mailboxes = static_cast<uint32_t*>(mailboxes.data_ptr());
  launch_quantize_ring(ring, calls[0].type, stream);
}

// A weight that is one group.
void quantize_whole(const Quantize& call, const Tensor& like, cudaStream_t stream) {
  const QuantizeParams& p = call.params;
  WholeParams whole = {static_cast<const uint8_t*>(p.w.data), static_cast<uint8_t*>(p.q.data), p.scale.data};
  whole.bytes = p.grouping.num_cols * call.element_size;
  whole.fp8_type = p.fp8_type;
  whole.scale_type = p.scale_type;
  whole.pow2 = p.pow2;
  whole.rule = p.rule;
  const Tensor block_amax = scratch(num_processors(), like);
  whole.block_amax = static_cast<uint32_t*>(block_amax.data_ptr());
  launch_quantize_whole(whole, call.type, stream);
}

// The groups as runs of memory a stride apart; without data where they are not.
CastParams as_runs(const Quantize& call) {
  const QuantizeParams& p = call.params;
  const Grouping& g = p.grouping;
  if (!call.aligned || g.block_n.value != 1) return {};
  const auto grid_k = static_cast<int64_t>(g.grid_k.value), block_k = static_cast<int64_t>(g.block_k.value);
  const int64_t num_rows = g.num_groups / grid_k / g.num_units;
  if (grid_k > 1 && g.num_cols % block_k != 0) return {};
  // From one of them to the next, over `per_row` of them a row, or -1.
  const auto stride = [&](const View& v, int64_t per_row, int64_t within_row) -> int64_t {
    if (num_rows > 1 && per_row > 1 && v.row_stride != per_row * within_row) return -1;
    const int64_t step = per_row > 1 ? within_row : num_rows > 1 ? v.row_stride : v.unit_stride;
    return g.num_units > 1 && v.unit_stride != num_rows * per_row * step ? -1 : step;
  };
  CastParams cast = {{p.w.data, static_cast<uint8_t*>(p.q.data), p.scale.data}, static_cast<float*>(p.amax.data)};
  Runs& runs = cast.runs;
  runs.w_stride = stride(p.w, grid_k, block_k);
  runs.q_stride = stride(p.q, grid_k, block_k);
  runs.scale_stride = stride(p.scale, grid_k, p.scale.col_stride);
  cast.amax_stride = stride(p.amax, grid_k, p.amax.col_stride);
  runs.num_groups = g.num_groups;
  runs.vecs = g.vecs_per_group;
  cast.fp8_type = p.fp8_type;
  cast.scale_type = p.scale_type;
  cast.pow2 = p.pow2;
  cast.rule = p.rule;
  const bool are_runs = runs.w_stride >= 0 && runs.q_stride >= 0 && runs.scale_stride >= 0 && cast.amax_stride >= 0;
  return are_runs ? cast : CastParams{};
}

// Those that quantize_runs takes.
Runs as_short_runs(const Quantize& call) {
  const bool fits = call.params.amax.data == nullptr && call.params.grouping.vecs_per_group <= max_run_vecs(call.type);
  return fits ? as_runs(call).runs : Runs{};
}

// Weights of one device that differ in sizes and places alone, at most kMaxRunsWeights.
void quantize_runs(const std::vector<Quantize>& calls, cudaStream_t stream) {
  const QuantizeParams& p = calls[0].params;
  RunsParams params = {};
  params.fp8_type = p.fp8_type;
  params.scale_type = p.scale_type;
  params.pow2 = p.pow2;
  params.rule = p.rule;
  for (const Quantize& call : calls) params.weights[params.num_weights++] = as_short_runs(call);
  launch_quantize_runs(params, calls[0].type, stream);
}

bool is_blocks(const Quantize& call) {
  const Grouping& g = call.params.grouping;
  return call.aligned && call.params.amax.data == nullptr && g.block_k.value == kFastBlock &&
         g.block_n.value > kFastBlock / 2 && g.block_n.value <= kFastBlock;
}

void quantize_one(const Quantize& call, const Tensor& like, cudaStream_t stream) {
  const auto& [p, type, element_size, aligned] = call;
  const Grouping& g = p.grouping;
  if (g.num_groups == 0) return;
  if (as_short_runs(call).w != nullptr) return quantize_runs({call}, stream);
  if (p.amax.data != nullptr && g.vecs_per_group >= kLeastCastVecs) {
    const CastParams cast = as_runs(call);
    if (cast.runs.w != nullptr) return launch_cast_runs(cast, type, stream);
  }
  if (is_blocks(call)) return launch_quantize_blocks(p, type, stream);
  if (g.vecs_per_group <= max_resident_vecs()) return launch_quantize_groups(p, type, aligned, stream);
  if (p.amax.data != nullptr) return launch_cast_split(p, type, aligned, stream);
  if (fits_ring(call)) {
    if (g.num_groups == 1) return quantize_whole(call, like, stream);
    // Smaller ones are read again from the L2 cache, which costs less than the ring's start.
    constexpr int64_t kLeastRingBytes = 10 << 20;
    if (g.num_groups * g.num_cols * element_size >= kLeastRingBytes) return quantize_in_ring({call}, like, stream);
  }
  const Split split = quantize_split(g, type, aligned);
  const Tensor mailboxes = scratch(split.num_mailboxes, like);
  launch_quantize_split(p, split, static_cast<uint32_t*>(mailboxes.data_ptr()), type, aligned, stream);
}

}  // namespace

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "fp8_kernels: a kernel launch failed: ", cudaGetErrorString(error));
}

int num_processors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

void quantize_out(const Tensor& w, const std::optional<Tensor>& amax, const Tensor& q, const Tensor& scale,
                  int64_t block_n, int64_t block_k, bool pow2, int64_t numerics) {
  const Quantize call = prepare(w, amax, q, scale, block_n, block_k, pow2, numerics);
  // The current device must be the tensors': streams and launches belong to one.
  const DeviceGuard guard(w.get_device_index());
  quantize_one(call, w, current_stream(w));
}

void amax_out(const Tensor& w, const Tensor& amax, int64_t block_n, int64_t block_k, bool accumulate) {
  AmaxParams p = {};
  p.grouping = make_grouping(w, block_n, block_k);
  Grouping& g = p.grouping;
  const int64_t grid_n = num_blocks(g.num_rows, block_n), grid_k = num_blocks(g.num_cols, block_k);
  p.w = view("w", w, g.num_units, g.num_rows, g.num_cols, w);
  p.amax = view("amax", amax, g.num_units, grid_n, grid_k, w, has_grid(block_n, block_k));
  p.accumulate = accumulate;
  const InputType type = input_type("w", w);
  check_amax_type(amax);
  if (g.num_groups == 0) return;
  if (block_n == kWhole && block_k == kWhole && rows_adjoin(p.w, g)) join_rows(g);
  const bool aligned = is_aligned(p.w, g, w.element_size());

  const DeviceGuard guard(w.get_device_index());
  const cudaStream_t stream = current_stream(w);
  if (g.vecs_per_group <= max_resident_vecs()) return launch_amax(p, type, aligned, stream);
  if (aligned && g.num_groups == 1 && g.num_rows == 1) return launch_amax_whole(p, type, stream);
  launch_amax_split(p, type, aligned, stream);
}

void quantize_many_out(const std::vector<Tensor>& w, const std::vector<Tensor>& q, const std::vector<Tensor>& scale,
                       int64_t block_n, int64_t block_k, bool pow2, int64_t numerics) {
  STD_TORCH_CHECK(q.size() == w.size() && scale.size() == w.size(), "`q` and `scale` must have the length of `w`, ",
                  w.size(), ", got ", q.size(), " and ", scale.size());
  if (w.empty()) return;
  std::vector<Quantize> calls;
  for (size_t i = 0; i < w.size(); ++i) {
    STD_TORCH_CHECK(w[i].is_cuda() && w[i].get_device_index() == w[0].get_device_index(),
                    "all of `w` must be on one CUDA device");
    calls.push_back(prepare(w[i], std::nullopt, q[i], scale[i], block_n, block_k, pow2, numerics));
  }
  const DeviceGuard guard(w[0].get_device_index());
  const cudaStream_t stream = current_stream(w[0]);
  // Neighbours that one kernel takes together leave in one launch.
  std::vector<Quantize> together;
  bool in_runs = false;
  const auto launch = [&] {
    if (together.size() == 1) {
      quantize_one(together[0], w[0], stream);
    } else if (together.size() > 1) {
      in_runs ? quantize_runs(together, stream) : quantize_in_ring(together, w[0], stream);
    }
    together.clear();
  };
  for (const Quantize& call : calls) {
    const QuantizeParams& p = call.params;
    if (p.grouping.num_groups * p.grouping.num_rows * p.grouping.num_cols == 0) {
      quantize_one(call, w[0], stream);
      continue;
    }
    // Whole weights all go into the ring, which takes large ones too.
    const bool runs = has_grid(block_n, block_k) && as_short_runs(call).w != nullptr;
    if (!runs && (has_grid(block_n, block_k) || !fits_ring(call))) {
      quantize_one(call, w[0], stream);
      continue;
    }
    const bool same = !together.empty() && runs == in_runs && call.type == together[0].type &&
                      p.fp8_type == together[0].params.fp8_type && p.scale_type == together[0].params.scale_type;
    if (!same || together.size() == (in_runs ? kMaxRunsWeights : kMaxRingWeights)) launch();
    in_runs = runs;
    together.push_back(call);
  }
  launch();
}

void copy_amax_out(const Tensor& w, const Tensor& out, const Tensor& amax, int64_t block_n, int64_t block_k) {
  CopyAmaxParams p = {};
  p.grouping = make_grouping(w, block_n, block_k);
  Grouping& g = p.grouping;
  const int64_t grid_n = num_blocks(g.num_rows, block_n), grid_k = num_blocks(g.num_cols, block_k);
  p.w = view("w", w, g.num_units, g.num_rows, g.num_cols, w);
  p.out = view("out", out, g.num_units, g.num_rows, g.num_cols, w);
  p.amax = view("amax", amax, g.num_units, grid_n, grid_k, w, has_grid(block_n, block_k));
  const InputType type = input_type("w", w);
  STD_TORCH_CHECK(scalar_type(out) == scalar_type(w), "`out` must have the dtype of `w`");
  check_amax_type(amax);
  if (g.num_units * g.num_rows * g.num_cols == 0) return;
  if (block_n == kWhole && block_k == kWhole && rows_adjoin(p.w, g) && rows_adjoin(p.out, g)) join_rows(g);
  const bool aligned = is_aligned(p.w, g, w.element_size()) && is_aligned(p.out, g, w.element_size());

  const DeviceGuard guard(w.get_device_index());
  launch_copy_amax(p, type, aligned, current_stream(w));
}

void dequantize_out(const Tensor& q, const Tensor& scale, const Tensor& w, int64_t block_n, int64_t block_k) {
  DequantizeParams p = {};
  p.grouping = make_grouping(q, block_n, block_k);
  const Grouping& g = p.grouping;
  const int64_t grid_n = num_blocks(g.num_rows, block_n), grid_k = num_blocks(g.num_cols, block_k);
  p.q = view("q", q, g.num_units, g.num_rows, g.num_cols, q);
  p.scale = view("scale", scale, g.num_units, grid_n, grid_k, q, has_grid(block_n, block_k));
  p.w = view("w", w, g.num_units, g.num_rows, g.num_cols, q);
  const InputType type = input_type("w", w);
  p.fp8_type = fp8_type("q", q);
  p.scale_type = scale_type(scale);
  if (g.num_units * g.num_rows * g.num_cols == 0) return;
  const bool aligned = is_aligned(p.q, g, 1) && is_aligned(p.w, g, w.element_size());

  const DeviceGuard guard(q.get_device_index());
  launch_dequantize(p, type, aligned, current_stream(q));
}

}  // namespace fp8_kernels
