"""Fp8Linear, Fp8Experts, make_runnable: they compute what their codes and scales say, on the tensors given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp8_kernels as fk
from fp8_kernels.errors import LoadError
from fp8_kernels.modules import Fp8Experts, Fp8Linear, can_run, make_runnable

from . import models
from .test_linear import DTYPES, SCHEMES, SIZES, quantized_linear, relative_error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("tokens", "k", "n"), SIZES)
def test_weights_only_is_the_dequantized_product(tokens, k, n, scheme, dtype):
    """Without FP8 activations the result equals, to the bit, a linear layer of the dequantized weight."""
    linear = quantized_linear(k, n, scheme, dtype)
    layer = Fp8Linear.from_linear(linear, scheme, activation=None)
    x = torch.randn(2, tokens, k, dtype=dtype)
    weight = fk.dequantize(linear.weight, linear.weight_scale, dtype, scheme)
    assert torch.equal(layer(x), F.linear(x, weight, linear.bias))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("tokens", "k", "n"), SIZES)
def test_dynamic_rounds_each_token_by_its_own_scale(tokens, k, n, scheme):
    """With FP8 activations the result is that of a linear layer over tokens rounded one by one."""
    linear = quantized_linear(k, n, scheme, torch.float32)
    layer = Fp8Linear.from_linear(linear, scheme, activation="dynamic")
    x = torch.randn(tokens, k) * torch.logspace(-3, 3, tokens)[:, None]  # one scale for all would lose the small ones
    rounded = torch.cat([fk.dequantize(*fk.quantize(row[None], "per_tensor"), torch.float32) for row in x])
    weight = fk.dequantize(linear.weight, linear.weight_scale, torch.float32, scheme)
    expected = F.linear(rounded, weight, linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected, F.linear(x, weight, linear.bias))


def test_no_tokens_give_no_rows():
    """An empty batch passes through both kinds of activation."""
    linear = quantized_linear(64, 48)
    for activation in (None, "dynamic"):
        layer = Fp8Linear.from_linear(linear, activation=activation)
        assert layer(torch.empty(0, 3, 64, dtype=torch.bfloat16)).shape == (0, 3, 48)


def test_e5m2_weights_run():
    """The other FP8 dtype takes the dequantizing path."""
    linear = quantized_linear(64, 48, fp8=torch.float8_e5m2)
    layer = Fp8Linear.from_linear(linear, activation="dynamic")
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    weight = fk.dequantize(linear.weight, linear.weight_scale)
    assert relative_error(layer(x), F.linear(x, weight, linear.bias)) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_round_trips(tmp_path, scheme):
    """Saved and loaded into a fresh layer, in a file and out: the same bytes, the same result."""
    from safetensors.torch import load_file, save_file

    layer = Fp8Linear.from_linear(quantized_linear(130, 50, scheme), scheme)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = Fp8Linear(130, 50, scheme=scheme)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for name, value in layer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name].float(), value.float()), name
    x = torch.randn(3, 130, dtype=torch.bfloat16)
    assert torch.equal(fresh(x), layer(x))


def test_bf16_weight_is_not_loaded_over_codes():
    """A high-precision state dict is refused by name: cast without a scale it would be garbage."""
    layer = Fp8Linear.from_linear(quantized_linear(64, 48))
    state = layer.state_dict() | {"weight": torch.ones(48, 64, dtype=torch.bfloat16)}
    with pytest.raises(RuntimeError, match=r"`0\.weight` must be torch\.float8_e4m3fn, got torch\.bfloat16"):
        nn.Sequential(layer).load_state_dict({f"0.{name}": value for name, value in state.items()})


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.float, lambda m: m.to(torch.float64)])
def test_casting_a_model_leaves_codes_and_scales_alone(cast):
    """`.half()` and the like convert the bias and nothing else; parameters stay the same objects."""
    layer = Fp8Linear.from_linear(quantized_linear(64, 48))
    before, weight = copy.deepcopy(layer.state_dict()), layer.weight
    cast(nn.Sequential(layer))
    assert layer.weight is weight
    assert layer.bias.dtype != torch.bfloat16
    for name in ("weight", "weight_scale"):
        assert layer.state_dict()[name].dtype == before[name].dtype
        assert torch.equal(layer.state_dict()[name].float(), before[name].float())


def test_compiles_without_a_graph_break():
    """`torch.compile(fullgraph=True)` traces both kinds of activation; results agree within rounding."""
    for activation in (None, "dynamic"):
        layer = Fp8Linear.from_linear(quantized_linear(64, 48), activation=activation)
        x = torch.randn(5, 64, dtype=torch.bfloat16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.inference_mode():
            assert relative_error(compiled(x), layer(x)) < 1e-2


# make_runnable


def test_runnable_layers_share_the_tensors():
    """Nothing is copied: weight, scale and bias are the very parameters."""
    linear = quantized_linear(64, 48)
    layer = make_runnable(nn.Sequential(linear))[0]
    assert isinstance(layer, Fp8Linear)
    for name in ("weight", "weight_scale", "bias"):
        assert getattr(layer, name) is getattr(linear, name)


def test_one_layer_under_two_names_stays_one():
    """Shared modules are replaced by one shared module."""
    linear = quantized_linear(64, 48)
    model = make_runnable(nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)}))
    assert model["a"] is model["b"][0]


def test_high_precision_layers_are_left():
    """Layers without FP8 weights, and layers that run already, stay the objects they are."""
    plain, running = nn.Linear(8, 8), Fp8Linear.from_linear(quantized_linear(64, 48))
    model = make_runnable(nn.Sequential(plain, running))
    assert model[0] is plain and model[1] is running


def test_a_lone_layer_is_returned_replaced():
    """A model that is itself a layer has no parent to hold the replacement."""
    assert isinstance(make_runnable(quantized_linear(64, 48)), Fp8Linear)


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block"])
def test_scheme_is_told_from_shapes_where_they_tell(scheme):
    """Whole blocks, rows and single scales need no scheme."""
    layer = make_runnable(nn.Sequential(quantized_linear(256, 384, scheme)))[0]
    assert layer.scheme == fk.schemes.as_scheme(scheme)


def test_partial_blocks_need_their_scheme():
    """Five scales for 576 columns could be blocks of 116 to 143: never guessed; named, and told by name."""
    model = nn.Sequential(quantized_linear(576, 192, "per_block"))
    with pytest.raises(ValueError, match=r"0\.weight: `scheme` must be given"):
        make_runnable(model)
    assert make_runnable(model, schemes={"0.weight": "per_block"})[0].scheme == fk.PerBlock(128, 128)


def test_what_nothing_runs_is_named():
    """A layer with a forward of its own is refused by name and left in place."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = quantized_linear(64, 48)
    layer.__class__ = Doubled
    model = nn.Sequential(layer)
    with pytest.raises(LoadError, match=r"0 \(Doubled\)"):
        make_runnable(model)
    assert model[0] is layer
    assert not can_run(nn.MultiheadAttention(8, 2).out_proj)  # its parent reads its weight


def test_bad_arguments_are_named():
    """Unknown activations, dtypes and schemes are errors when a layer is made."""
    with pytest.raises(ValueError, match="`activation` must be one of"):
        Fp8Linear(8, 8, activation="static")
    with pytest.raises(TypeError, match="`dtype` must be one of"):
        Fp8Linear(8, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="`scheme` must be one of"):
        Fp8Linear(8, 8, scheme="per_row")


# Experts


def rounded_experts(experts, scheme):
    """(FP8 twin of an experts module as the loader leaves it; the module itself, its weights rounded likewise)."""
    twin = copy.deepcopy(experts)
    for name in [n for n, p in experts.named_parameters() if p.ndim == 3]:
        q, scale = fk.quantize(getattr(experts, name).data, scheme)
        setattr(twin, name, nn.Parameter(q, requires_grad=False))
        setattr(twin, f"{name}_scale", nn.Parameter(scale, requires_grad=False))
        getattr(experts, name).data = fk.dequantize(q, scale, torch.bfloat16, scheme)
    return twin, experts.requires_grad_(False)


def routing(tokens, num_experts, top_k=2):
    """Some tokens' experts (no two the same for one token) and their weights."""
    scores = torch.rand(tokens, num_experts).topk(top_k)
    return scores.indices, scores.values.bfloat16()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["tiny_qwen3_moe", "tiny_mixtral"])
def test_experts_equal_the_original_over_rounded_weights(family, scheme):
    """Experts with FP8 weights compute, to the bit, what transformers computes with those weights."""
    pytest.importorskip("transformers", minversion="5.0")
    twin, original = rounded_experts(getattr(models, family)().model.layers[0].mlp.experts, scheme)
    experts = Fp8Experts.from_experts(twin, scheme, activation=None)
    x = torch.randn(17, 192, dtype=torch.bfloat16)
    choice = routing(17, original.num_experts)
    assert torch.equal(experts(x, *choice), original(x, *choice))


def test_experts_of_other_layouts_run():
    """Transposed weights, biases and a gate of their own (gpt-oss): the original, which rounds before its bias."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(hidden_size=64, intermediate_size=48, num_local_experts=4)
    config._experts_implementation = "eager"
    original = GptOssExperts(config).bfloat16()
    for p in original.parameters():
        nn.init.normal_(p, std=0.2)
    twin, original = rounded_experts(original, "per_channel")
    assert can_run(twin)
    experts = make_runnable(nn.Sequential(twin), activation=None)[0]
    x = torch.randn(17, 64, dtype=torch.bfloat16)
    choice = routing(17, 4)
    assert relative_error(experts(x, *choice), original(x, *choice)) < 1e-2


def test_experts_of_other_ranks_add_nothing():
    """Indices outside the experts held here leave their tokens' share at zero."""
    pytest.importorskip("transformers", minversion="5.0")
    twin, _ = rounded_experts(models.tiny_qwen3_moe().model.layers[0].mlp.experts, "per_channel")
    experts = Fp8Experts.from_experts(twin, activation="dynamic")
    x, weights = torch.randn(3, 192, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16)
    out = experts(x, torch.tensor([[4], [5], [5]]), weights)
    assert out[0].abs().sum() > 0 and out[1:].abs().sum() == 0


def test_dynamic_experts_stay_close_to_weights_only():
    """FP8 activations move the experts' output by their rounding."""
    pytest.importorskip("transformers", minversion="5.0")
    twin, original = rounded_experts(models.tiny_qwen3_moe().model.layers[0].mlp.experts, "per_channel")
    x = torch.randn(17, 192, dtype=torch.bfloat16)
    choice = routing(17, 5)
    error = relative_error(Fp8Experts.from_experts(twin, activation="dynamic")(x, *choice), original(x, *choice))
    assert 0 < error < 0.1


def test_experts_survive_copying_and_saving():
    """A deep copy and a state dict hold all that the experts need."""
    pytest.importorskip("transformers", minversion="5.0")
    twin, _ = rounded_experts(models.tiny_qwen3_moe().model.layers[0].mlp.experts, "per_group")
    experts = Fp8Experts.from_experts(twin, "per_group")
    x, choice = torch.randn(5, 192, dtype=torch.bfloat16), routing(5, 5)
    expected = experts(x, *choice)
    assert torch.equal(copy.deepcopy(experts)(x, *choice), expected)
    fresh = Fp8Experts(5, 192, 96, nn.SiLU(), "per_group")
    fresh.load_state_dict(experts.state_dict())
    assert torch.equal(fresh(x, *choice), expected)
