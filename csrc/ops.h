// The ops; fp8_kernels/backends.py holds their schemas and fp8_kernels/reference.py their definition.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace fp8_kernels {

using torch::stable::Tensor;

void quantize_out(const Tensor& w, const std::optional<Tensor>& amax, const Tensor& q, const Tensor& scale,
                  int64_t block_n, int64_t block_k, bool pow2, int64_t numerics);
void amax_out(const Tensor& w, const Tensor& amax, int64_t block_n, int64_t block_k, bool accumulate);
void quantize_many_out(const std::vector<Tensor>& w, const std::vector<Tensor>& q, const std::vector<Tensor>& scale,
                       int64_t block_n, int64_t block_k, bool pow2, int64_t numerics);
void copy_amax_out(const Tensor& w, const Tensor& out, const Tensor& amax, int64_t block_n, int64_t block_k);
void dequantize_out(const Tensor& q, const Tensor& scale, const Tensor& w, int64_t block_n, int64_t block_k);

}  // namespace fp8_kernels
