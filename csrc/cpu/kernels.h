// What the ops ask of the kernels for the CPU. kernels.cpp is compiled once for each instruction set, into a namespace
// of its own; ops.cpp takes the best one that the processor has.
#pragma once

#include <cstdint>

#include "../scale_rule.h"

namespace fp8_kernels::cpu {

enum class InputType : int32_t { kFloat32, kFloat16, kBFloat16 };



// A tensor [E, N, K] or [E, SN, SK]; strides in elements.
struct View {
  void* data = nullptr;
  int64_t unit_stride = 0, row_stride = 0, col_stride = 0;
};

// Rectangles of block_n x block_k elements, each with a scale; the last ones of a row or column may be smaller.
struct Grouping {
  int64_t num_units, num_rows, num_cols;
  int64_t block_n, block_k;  // at least 1; the whole extent at most
  int64_t grid_n, grid_k;
};

struct Weight {
  Grouping grouping;
  View w;
  InputType type;
};

// FP8 formats; those of AMD ("fnuz") have one zero and one NaN, no infinity, and a larger exponent bias.
enum class Format : int32_t { kE4M3, kE5M2, kE4M3Fnuz, kE5M2Fnuz };

struct Codes {
  View q, scale;
  Format format;
  ScaleType scale_type;
};

// Each works on rows [first_row, last_row) of one unit.
struct Kernels {
  // Maxima, as bits of |x| in fp32, of those rows' elements of each column group, merged into amax[grid_k].
  void (*merge_amax)(const Weight&, int64_t unit, int64_t first_row, int64_t last_row, uint32_t* amax);
  // The codes of those rows, all of one row of groups, whose scales are given as fp32 [grid_k]; as their reciprocals
  // where elements are multiplied by them.
  void (*cast)(const Weight&, const Codes&, int64_t unit, int64_t first_row, int64_t last_row, const float* scale,
               bool reciprocal, float fp8_max);
  // The same backwards: w from codes and scales; `w.w` is written.
  void (*dequantize)(const Codes&, const Weight& w, int64_t unit, int64_t first_row, int64_t last_row,
                     const float* scale);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace fp8_kernels::cpu
