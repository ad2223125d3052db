"""Running FP8 on a GPU: the FP8 matrix units give what the dequantizing path gives, and models load there."""

import pytest
import torch
import torch.nn.functional as F

import fp8_kernels as fk
from fp8_kernels import linear as fp8
from fp8_kernels import modules
from fp8_kernels.load import load_checkpoint, load_model

from .. import models
from ..test_linear import DTYPES, SCHEMES, quantized_linear, relative_error

pytestmark = pytest.mark.gpu


def has_fp8_units():
    return torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
@pytest.mark.parametrize(("tokens", "k", "n"), ((1, 64, 48), (7, 576, 192), (33, 128, 1040), (1025, 7168, 2048)))
def test_scaled_mm_path_equals_dequantizing_path(tokens, k, n, scheme, dtype):
    """Both ways to multiply the same codes agree within the rounding of the result's dtype.

    The matrix units of Hopper add up with fewer bits than fp32, which shows in an fp32 result.
    """
    if not has_fp8_units():
        pytest.skip("no FP8 matrix units")
    linear = quantized_linear(k, n, scheme, dtype).cuda()
    weight, scale = linear.weight, linear.weight_scale
    assert fp8.scaled_mm_takes(weight, fk.schemes.as_scheme(scheme))
    codes, token_scale = fk.quantize(torch.randn(tokens, k, dtype=dtype, device="cuda"), "per_channel")
    y = fp8.scaled_mm_linear(codes, token_scale, weight, scale, linear.bias, dtype)
    x, w = (fk.dequantize(*pair, torch.float32).double() for pair in ((codes, token_scale), (weight, scale)))
    expected = F.linear(x, w, linear.bias.double())
    assert y.dtype == dtype and y.shape == (tokens, n)
    assert relative_error(y, expected) < {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-3}[dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("tokens", "k", "n"), ((1, 64, 48), (7, 576, 192), (33, 130, 50)))
def test_layers_agree_with_cpu(tokens, k, n, scheme):
    """One layer on both devices: the same result within bf16 rounding, aligned for matrix units or not."""
    linear = quantized_linear(k, n, scheme)
    x = torch.randn(2, tokens, k, dtype=torch.bfloat16)
    for activation in (None, "dynamic"):
        layer = modules.Fp8Linear.from_linear(linear, scheme, activation)
        expected = layer(x)
        assert relative_error(layer.cuda()(x.cuda()).cpu(), expected) < 1e-2
        layer.cpu()


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3_moe"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_rounded_weights(tmp_path, family, scheme):
    """A model that became FP8 on the GPU equals the bf16 model with rounded weights, on the same GPU."""
    original = getattr(models, family)()
    models.save(original, tmp_path)
    model = models.on_meta(original)
    load_checkpoint(model, tmp_path, scheme, device="cuda", activation=None)
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    models.round_weights(original, scheme)
    expected = models.logits(original.cuda())
    assert relative_error(models.logits(model), expected) < 1e-2


def test_smollm2_generates_on_fp8_units():
    """The real model, loaded to the GPU with FP8 activations, still knows the capital of France."""
    from transformers import AutoTokenizer

    folder = models.smollm2()
    model, report = load_model(folder, device="cuda")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt").to("cuda")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
    assert report.quantized_tensors == 210


def test_layer_is_captured_in_a_cuda_graph():
    """Quantizing activations and multiplying are captured and replayed on new input."""
    if not has_fp8_units():
        pytest.skip("no FP8 matrix units")
    layer = modules.Fp8Linear.from_linear(quantized_linear(576, 192)).cuda()
    x = torch.randn(16, 576, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))
