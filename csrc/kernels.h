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

// `bits` of a group's amax to where it goes.
__device__ inline void store_amax(uint32_t bits, const AmaxParams& p, const Group& group) {
  uint32_t* target = p.amax.at<uint32_t>(group.unit, group.grid_row, group.grid_col);
  if (p.accumulate) bits = max(bits, *target & 0x7fffffff);
  *target = is_nan(bits) ? kNanBits : bits;
}

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

// How groups that are too large for one thread block are shared out: each in `steps` of some vectors, to `parts`.
struct Split {
  Divisor parts;
  int64_t steps;
  int64_t num_parts, num_mailboxes;  // of all groups
  int64_t num_blocks;
};

// A weight for quantize_ring: groups of `group_bytes` that follow one another, `rows` of them a unit. Strides in bytes
// of w and q, in elements of scale.
struct RingWeight {
  struct Strides {
    int64_t unit, row;
  };
  const uint8_t* w;
  uint8_t* q;
  void* scale;
  Strides w_strides, q_strides, scale_strides;
  int64_t num_groups, group_bytes;
  Divisor rows;
  // Set by plan_ring: each group has `tiles`, shared out to `parts`.
  Divisor parts;
  int64_t tiles, remainder, first_part, first_mailbox;
};

constexpr int kMaxRingWeights = 24;  // 4 KB of parameters

struct RingParams {
  RingWeight weights[kMaxRingWeights];
  int32_t num_weights;
  Fp8Type fp8_type;
  ScaleType scale_type;
  bool pow2;
  Rule rule;
  // Set by plan_ring.
  int64_t num_parts, num_mailboxes;
  uint32_t* mailboxes;  // num_mailboxes words, of any content, for the launch alone
  int64_t num_blocks;
  bool is_large;
  int32_t kept_slots;
};

// A weight for quantize_whole: `bytes` of w in a row, one scale.
struct WholeParams {
  const uint8_t* w;
  uint8_t* q;
  void* scale;
  uint32_t* block_amax;  // a word for each processor, of any content, for the launch alone
  int64_t bytes;
  Fp8Type fp8_type;
  ScaleType scale_type;
  bool pow2;
  Rule rule;
  int32_t chunks_per_block, blocks_with_more;  // set at the launch
};

// A weight for quantize_runs: groups of `vecs` vectors that are runs of memory, each a stride (in elements) after the
// one before; every run at a multiple of a vector's size in w and of 8 bytes in q.
struct Runs {
  const void* w;
  uint8_t* q;
  void* scale;
  int64_t w_stride, q_stride, scale_stride;
  int64_t num_groups, vecs;
  int64_t num_blocks;  // set at the launch
};

constexpr int kMaxRunsWeights = 48;  // 4 KB of parameters

// What every launch reads comes first, within few lines of the constant cache.
struct RunsParams {
  int32_t num_weights;
  Fp8Type fp8_type;
  ScaleType scale_type;
  bool pow2;
  Rule rule;
  Runs weights[kMaxRunsWeights];
};

// Runs with amaxes, a stride apart.
struct CastParams {
  Runs runs;
  const float* amax;
  int64_t amax_stride;
  Fp8Type fp8_type;
  ScaleType scale_type;
  bool pow2;
  Rule rule;
};

// From how many vectors a group is worth thread blocks of cast_runs for itself.
constexpr int64_t kLeastCastVecs = 512;

// The extent of the blocks that quantize_blocks takes.
constexpr int kFastBlock = 128;

// The most vectors of a group that quantize_runs holds in one thread block's registers.
int64_t max_run_vecs(InputType type);

// One launch, one read of each w.
void launch_quantize_runs(RunsParams& params, InputType type, cudaStream_t stream);

// One launch, one read of w; aligned, block_k = kFastBlock, block_n at most that.
void launch_quantize_blocks(const QuantizeParams& params, InputType type, cudaStream_t stream);

// The most vectors of a group that quantize_groups holds in one thread block's registers.
int64_t max_resident_vecs();

// For launch_quantize_split.
Split quantize_split(const Grouping& grouping, InputType type, bool aligned);

// One launch, one read of w; groups of at most max_resident_vecs.
void launch_quantize_groups(const QuantizeParams& params, InputType type, bool aligned, cudaStream_t stream);

// Whether the current device has what the ring needs.
bool has_ring();

void plan_ring(RingParams& params);

// One launch, one read of w: each group at a multiple of 16 bytes, its q at one of 8, of a multiple of 16 bytes.
void launch_quantize_ring(const RingParams& params, InputType type, cudaStream_t stream);

// One launch, for devices that have the ring: w at a multiple of 16 bytes, q at one of 8, a multiple of 8 elements.
void launch_quantize_whole(const WholeParams& params, InputType type, cudaStream_t stream);

// One launch; reads w twice. `mailboxes`: split.num_mailboxes words, of any content, for the launch alone.
void launch_quantize_split(const QuantizeParams& params, const Split& split, uint32_t* mailboxes, InputType type,
                           bool aligned, cudaStream_t stream);

// One launch: the cast alone.
void launch_cast_runs(const CastParams& params, InputType type, cudaStream_t stream);

// One launch: the cast alone, with params.amax, of groups too large for one thread block.
void launch_cast_split(const QuantizeParams& params, InputType type, bool aligned, cudaStream_t stream);

// One launch; a thread block or less a group.
void launch_amax(const AmaxParams& params, InputType type, bool aligned, cudaStream_t stream);

// One launch; a weight that is one aligned run of memory.
void launch_amax_whole(AmaxParams params, InputType type, cudaStream_t stream);

// One launch; groups split over thread blocks.
void launch_amax_split(const AmaxParams& params, InputType type, bool aligned, cudaStream_t stream);

// One launch; the groups' amaxes are raised, not set.
void launch_copy_amax(const CopyAmaxParams& params, InputType type, bool aligned, cudaStream_t stream);

void launch_dequantize(const DequantizeParams& params, InputType output_type, bool aligned, cudaStream_t stream);

// Of the current device.
int num_processors();

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

// Calls f with the FP8 type as a constant.
template <typename F>
void dispatch_fp8(Fp8Type type, F&& f) {
  if (type == Fp8Type::kE4M3) {
    f(std::integral_constant<Fp8Type, Fp8Type::kE4M3>{});
  } else {
    f(std::integral_constant<Fp8Type, Fp8Type::kE5M2>{});
  }
}

template <typename F>
void dispatch_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace fp8_kernels
