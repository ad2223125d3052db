// What the ops ask of the kernel families. Each function launches on `stream` on the current device.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "tile.cuh"

namespace fp8_kernels {

enum class InputType : int32_t { kFloat32, kFloat16, kBFloat16 };

struct QuantizeParams {
  Grouping grouping;
  View w, q, scale;
  View amax;  // of the groups, given by the caller; no data: the kernel finds it
  Fp8Type fp8_type;
  ScaleType scale_type;
  bool pow2;
  Rule rule;
};

struct AmaxParams {
  Grouping grouping;
  View w, amax;
  bool accumulate;
};

struct CopyAmaxParams {
  Grouping grouping;
  View w, out, amax;
};

struct DequantizeParams {
  Grouping grouping;
  View q, scale, w;
  Fp8Type fp8_type;
  ScaleType scale_type;
};

// How a group that is too large for one thread block is shared out: `parts` ranges of `vecs_per_part` vectors.
struct Split {
  int64_t parts, vecs_per_part;
};

// The most vectors of a group that quantize_groups holds in one thread block's registers.
int64_t max_resident_vecs(InputType type, bool aligned);

Split split_groups(const Grouping& grouping);

// One launch, one read of w; groups of at most max_resident_vecs.
void launch_quantize_groups(const QuantizeParams& params, InputType type, bool aligned, cudaStream_t stream);

// The cast alone. Groups' amaxes are params.amax or, where that is absent, the maxima over each group's
// `split.parts` entries of `partials`.
void launch_quantize_split(const QuantizeParams& params, Split split, const uint32_t* partials, InputType type,
                           bool aligned, cudaStream_t stream);

// One launch; a thread block or less a group.
void launch_amax(const AmaxParams& params, InputType type, bool aligned, cudaStream_t stream);

// One entry of `partials` a part.
void launch_amax_partials(const AmaxParams& params, Split split, uint32_t* partials, InputType type, bool aligned,
                          cudaStream_t stream);

// The maxima over each group's entries of `partials`, into params.amax.
void launch_amax_finish(const AmaxParams& params, Split split, const uint32_t* partials, cudaStream_t stream);

// One launch; the groups' amaxes are raised, not set.
void launch_copy_amax(const CopyAmaxParams& params, InputType type, bool aligned, cudaStream_t stream);

void launch_dequantize(const DequantizeParams& params, InputType output_type, bool aligned, cudaStream_t stream);

// Raises the error of the launch just made, if any.
void check_launch();

// Calls f with a value of the C++ type that `type` names.
template <typename F>
void dispatch_input(InputType type, F&& f) {
  switch (type) {
    case InputType::kFloat32:
      return f(float{});
    case InputType::kFloat16:
      return f(__half{});
    case InputType::kBFloat16:
      return f(__nv_bfloat16{});
  }
}

template <typename F>
void dispatch_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace fp8_kernels
