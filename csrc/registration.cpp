#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(fp8_kernels, CUDA, m) {
  m.impl("quantize_out", TORCH_BOX(&fp8_kernels::quantize_out));
  m.impl("quantize_many_out", TORCH_BOX(&fp8_kernels::quantize_many_out));
  m.impl("copy_amax_out", TORCH_BOX(&fp8_kernels::copy_amax_out));
  m.impl("amax_out", TORCH_BOX(&fp8_kernels::amax_out));
  m.impl("dequantize_out", TORCH_BOX(&fp8_kernels::dequantize_out));
}
