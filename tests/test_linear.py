"""The two ways to multiply by FP8 weights agree."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fp8_kernels as fk
from fp8_kernels import linear as fp8
from fp8_kernels import modules

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


class Quantizations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.fp8_kernels.quantize_out.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_layers_with_one_input_quantize_it_once():
    """q, k and v: one quantization, the same results as each alone. Another tensor, or another value in the same one,
    is quantized again, and nothing is kept of a tensor that is gone."""
    layers = [modules.Fp8Linear.from_linear(quantized_linear(64, n)) for n in (48, 32, 32)]
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    alone = [layer(x.clone()) for layer in layers]
    with Quantizations() as counted:
        together = [layer(x) for layer in layers]
    assert counted.count == 1
    assert all(map(torch.equal, together, alone))
    other = [layer(2 * x) for layer in layers]
    x.mul_(2)
    with Quantizations() as counted:
        assert all(map(torch.equal, [layer(x) for layer in layers], other))
    assert counted.count == 1
    kept = weakref.ref(fp8._last_rows._last[3][0])
    del x
    gc.collect()
    assert kept() is None


@torch.inference_mode()
def test_inference_tensors_are_quantized_each_time():
    """Changes of theirs are not counted, so nothing can be told from them being the same."""
    layer = modules.Fp8Linear.from_linear(quantized_linear(64, 48))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with Quantizations() as counted:
        first = layer(x)
        x.mul_(2)
        assert not torch.equal(layer(x), first)
    assert counted.count == 2


@pytest.mark.parametrize("tokens", (1, 33))
def test_the_compilers_arithmetic_is_that_of_quantize(tokens):
    """Codes and scales in ops that a compiler fuses, to the bit where it divides as the definition does."""
    x = torch.randn(tokens, 576, dtype=torch.bfloat16)
    x[0, :3] = torch.tensor([0.0, 1e-38, 3e38])
    x = torch.cat([x, torch.zeros(1, 576, dtype=torch.bfloat16)])
    codes, scale = fp8._quantized_by_compiler(x)
    expected, expected_scale = fk.quantize(x, "per_channel")
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
