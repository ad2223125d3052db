"""Multiply by FP8 weights, in one of two ways.

Where the device has FP8 matrix units, activations are quantized per token and `torch._scaled_mm` multiplies the
codes. Everywhere else, and for scales that `torch._scaled_mm` does not take (blocks, groups), weights are
dequantized to the activation's dtype and multiplied there: the same values, at the cost of one high-precision weight
at a time.

Layers that get the very same tensor one after the other, as q, k and v do, have it quantized once. A compiler gets the
same arithmetic in its own ops, and puts it into the kernel before it.
"""

from __future__ import annotations

import weakref
from functools import lru_cache

import torch
import torch.nn.functional as F

from .ops import WEIGHT_DTYPES, dequantize, quantize, quantize_into
from .reference import FP8_MAX, TINY
from .schemes import PerChannel, PerTensor

_ROWS = PerChannel()
# Up to so many tokens reading the weight takes the time, and units that need not scale rows read faster (on an H100 by
# a tenth to a half at one token). Scaling afterwards is a kernel more, unless a compiler joins it with others.
FEW_TOKENS = 64
_MAX = FP8_MAX[torch.float8_e4m3fn]


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
    on_units = x.numel() and not is_transposed and scaled_mm_takes(weight, scheme)
    if on_units and torch.compiler.is_compiling():
        codes, scale = _quantized_by_compiler(x.reshape(-1, x.shape[-1]))
    else:
        codes, scale = _last_rows.of(x)
    if on_units:
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
        dtype: of the result `[M, N]`. bf16 adds up in the units' fewer bits: 0.2 to 0.3 % of the result's norm, of
            which bf16 itself is 0.17, for an eighth less time.
    """
    weight_scale = weight_scale.reshape(1, -1)
    if weight_scale.shape[1] != weight.shape[0] or weight_scale.dtype != torch.float32:
        weight_scale = weight_scale.float().expand(1, weight.shape[0]).contiguous()
    few = codes.shape[0] <= FEW_TOKENS and torch.compiler.is_compiling()
    if dtype == torch.bfloat16 and not few:
        bias = None if bias is None else bias.to(dtype)
        return torch._scaled_mm(codes, weight.t(), scale, weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)
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
    return aligned and _capability(weight.device) >= (8, 9)


def _capability(device):
    if torch.compiler.is_compiling():  # asked once, and a compiler does not look into caches
        return torch.cuda.get_device_capability(device)
    return _cached_capability(device)


_cached_capability = lru_cache(torch.cuda.get_device_capability)


def _quantized_by_compiler(x):
    """`quantize(x, "per_channel")` in ops that a compiler fuses. Its division may differ in the last bit, and so may,
    rarely, a code."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / _MAX).clamp(min=TINY)
    return (x / scale).clamp(-_MAX, _MAX).to(torch.float8_e4m3fn), scale


def _quantized(x):
    x = x.reshape(-1, x.shape[-1])
    if not x.is_cuda or x.dtype not in WEIGHT_DTYPES or torch.compiler.is_compiling():
        return quantize(x, _ROWS)
    # Decoding waits for the host, for which checks take as long as the op.
    codes, scale = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((len(x), 1), dtype=torch.float32)
    quantize_into(x, _ROWS, codes, scale, None)
    return codes, scale


class _LastRows:
    """The rows that were quantized last, kept while their tensor lives."""

    def __init__(self):
        self._last = None

    def of(self, x):
        """FP8 `[M, K]` and fp32 `[M, 1]` of `x` `[..., K]`."""
        if not self._may_keep(x):
            return _quantized(x)
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        last = self._last  # once: another thread may change it meanwhile
        if last is not None and last[0]() is x and last[1:3] == (x._version, stream):
            return last[3]
        result = _quantized(x)
        self._last = weakref.ref(x, self._forget), x._version, stream, result
        return result

    def _forget(self, reference):
        if self._last is not None and self._last[0] is reference:
            self._last = None

    @staticmethod
    def _may_keep(x):
        """Not where changes are not counted, and not where a graph must hold every kernel that it needs."""
        if torch.compiler.is_compiling() or x.is_inference():
            return False
        return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


_last_rows = _LastRows()
