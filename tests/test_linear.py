"""The two ways to multiply by FP8 weights agree."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp8_kernels as fk
from fp8_kernels import linear as fp8

SCHEMES = ("per_tensor", "per_channel", "per_block", "per_group", "mxfp8")
# (tokens, K, N): one token, a prime number of tokens, partial blocks, nothing a multiple of 16
SIZES = ((1, 64, 48), (7, 576, 192), (33, 130, 50))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantized_linear(
    in_features, out_features, scheme="per_channel", dtype=torch.bfloat16, bias=True, fp8=torch.float8_e4m3fn
):
    """A Linear as the loader leaves it: FP8 weight, scale beside it."""
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)
    q, scale = fk.quantize(linear.weight.data, scheme, dtype=fp8)
    linear.weight = nn.Parameter(q, requires_grad=False)
    linear.weight_scale = nn.Parameter(scale, requires_grad=False)
    return linear


def relative_error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def row_wise_scaled_mm():
    """Does this torch's `_scaled_mm` take a scale a row on the CPU? Before 2.13 it takes one a tensor."""
    one = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(one, one.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not row_wise_scaled_mm(), reason="torch._scaled_mm takes no row-wise scales on this CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
@pytest.mark.parametrize(("tokens", "k", "n"), ((1, 64, 48), (7, 576, 192), (33, 128, 1040)))
def test_scaled_mm_path_equals_dequantizing_path(tokens, k, n, scheme, dtype):
    """Both ways to multiply the same codes agree within the rounding of the result's dtype."""
    linear = quantized_linear(k, n, scheme, dtype)
    codes, scale = fk.quantize(torch.randn(tokens, k, dtype=dtype), "per_channel")
    y = fp8.scaled_mm_linear(codes, scale, linear.weight, linear.weight_scale, linear.bias, dtype)
    x, weight = (
        fk.dequantize(*pair)
        for pair in ((codes, scale, torch.float32), (linear.weight, linear.weight_scale, torch.float32))
    )
    expected = F.linear(x, weight, linear.bias.float())
    assert y.dtype == dtype and y.shape == (tokens, n)
    assert relative_error(y, expected) < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}[dtype]
