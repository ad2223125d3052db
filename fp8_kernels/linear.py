"""Multiply by FP8 weights, in one of two ways.

Where the device has FP8 matrix units, activations are quantized per token and `torch._scaled_mm` multiplies the
codes. Everywhere else, and for scales that `torch._scaled_mm` does not take (blocks, groups), weights are
dequantized to the activation's dtype and multiplied there: the same values, at the cost of one high-precision weight
at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .ops import dequantize, quantize
from .schemes import PerChannel, PerTensor


def fp8_linear(x, weight, weight_scale, bias, scheme, activation, is_transposed=False):
    """`x @ dequantize(weight).T + bias`; the weight is `[K, N]` instead of `[N, K]` where `is_transposed`.

    Args:
        x: bf16, fp16 or fp32 `[..., K]`.
        weight, weight_scale: FP8 `[N, K]` with scales of `scheme`.
        bias: `[N]` or None.
        scheme: a Scheme.
        activation: None, or "dynamic" to round each row of `x` to e4m3 first.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    if activation is None:
        return dequantized_linear(x, weight, weight_scale, bias, scheme, is_transposed)
    codes, scale = quantize(x.reshape(-1, x.shape[-1]), "per_channel")
    if codes.numel() and not is_transposed and scaled_mm_takes(weight, scheme):
        if scheme.segments:
            weight_scale = torch.cat([s.expand(n) for s, n in zip(weight_scale, scheme.segments, strict=True)])
        y = scaled_mm_linear(codes, scale, weight, weight_scale, bias, x.dtype)
    else:
        rounded = dequantize(codes, scale, x.dtype)
        y = dequantized_linear(rounded, weight, weight_scale, bias, scheme, is_transposed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def dequantized_linear(x, weight, weight_scale, bias, scheme, is_transposed=False):
    """The path for any device and any scheme: dequantize the weight, multiply in the dtype of `x`."""
    high = dequantize(weight, weight_scale, x.dtype, scheme)
    return F.linear(x, high.t() if is_transposed else high, None if bias is None else bias.to(x.dtype))


def scaled_mm_linear(codes, scale, weight, weight_scale, bias, dtype):
    """The path over FP8 matrix units, for one scale a weight or one an output row.

    Args:
        codes, scale: FP8 `[M, K]` and fp32 `[M, 1]`: activations, quantized per token.
        weight, weight_scale: FP8 `[N, K]` and fp32 `[]`, `[N]` or `[N, 1]`.
        bias: `[N]` or None.
        dtype: of the result `[M, N]`.
    """
    weight_scale = weight_scale.float().reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    if dtype == torch.bfloat16:
        bias = None if bias is None else bias.to(dtype)
        return torch._scaled_mm(codes, weight.t(), scale, weight_scale, bias=bias, out_dtype=dtype)
    # Row-wise scales come with a bf16 result only, which would cost these dtypes their precision.
    one = torch.ones((), device=codes.device)
    y = torch._scaled_mm(codes, weight.t(), one, one, out_dtype=torch.float32) * scale * weight_scale
    return (y if bias is None else y + bias).to(dtype)


def scaled_mm_takes(weight, scheme):
    """Does `torch._scaled_mm` run this weight here, faster than dequantizing would?

    On CPU it runs too, but slower than a bf16 product.
    """
    if not isinstance(scheme, (PerTensor, PerChannel)) or weight.dtype != torch.float8_e4m3fn:
        return False
    if not weight.is_cuda or torch.version.hip or not weight.is_contiguous():
        return False
    aligned = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    return aligned and torch.cuda.get_device_capability(weight.device) >= (8, 9)
