#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(fp8_kernels, CUDA, m) {
  m.impl("quantize_out", TORCH_BOX(&fp8_kernels::quantize_out));
  m.impl("amax_out", TORCH_BOX(&fp8_kernels::amax_out));
  m.impl("dequantize_out", TORCH_BOX(&fp8_kernels::dequantize_out));
}
