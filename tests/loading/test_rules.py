"""Which tensors become FP8: real names of real model families, patterns, and patterns that match nothing."""

import pytest
import torch

from fp8_kernels import PerBlock, PerChannel, PerTensor
from fp8_kernels.errors import UnmatchedPatternError
from fp8_kernels.loading import LayerwiseLoader
from fp8_kernels.loading.rules import Rules, matches

from .helpers import Model

QUANTIZED = {
    "model.layers.0.self_attn.q_proj.weight": (576, 576),
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 512),
    "model.layers.0.mlp.gate_proj.weight": (1536, 576),
    "model.layers.0.mlp.gate_up_proj.weight": (3072, 576),
    "model.layers.0.mlp.experts.17.down_proj.weight": (576, 1536),
    "model.layers.0.mlp.shared_expert.up_proj.weight": (1536, 576),
    "model.layers.0.block_sparse_moe.experts.3.w1.weight": (1536, 576),
    "model.layers.0.block_sparse_moe.input_linear.weight": (8, 3072, 576),
    "model.layers.0.mlp.experts.gate_up_proj": (8, 3072, 576),
    "model.layers.0.mlp.experts.w13_weight": (8, 3072, 576),
    "encoder.layer.0.attention.self.query.weight": (384, 384),
    "encoder.layer.0.intermediate.dense.weight": (1536, 384),
    "transformer.h.0.attn.c_attn.weight": (768, 2304),
}
KEPT = {
    "model.embed_tokens.weight": ((49152, 576), "embedding"),
    "embeddings.word_embeddings.weight": ((30522, 384), "embedding"),
    "model.decoder.embed_positions.weight": ((2050, 768), "embedding"),
    "transformer.wpe.weight": ((1024, 768), "embedding"),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ((32, 8), "embedding"),
    "lm_head.weight": ((49152, 576), "output head"),
    "model.layers.0.mlp.gate.weight": ((60, 576), "router"),
    "model.layers.0.mlp.router.weight": ((60, 576), "router"),
    "model.layers.0.block_sparse_moe.router.layer.weight": ((60, 576), "router"),
    "model.layers.0.mlp.shared_expert_gate.weight": ((1, 576), "router"),
    "model.layers.0.input_layernorm.weight": ((576,), "1-D"),
    "model.layers.0.self_attn.q_proj.bias": ((576,), "1-D"),
    "model.layers.0.mlp.experts.gate_up_proj_bias": ((8, 3072), "not a weight"),
    "backbone.layers.0.mixer.conv1d.weight": ((1536, 1, 4), "3-D, but not experts"),
    "backbone.layers.0.mixer.A_log": ((1536, 16), "not a weight"),
    "model.encoder.conv1.weight": ((512, 80), "convolution"),
    "vision.patch_embed.proj.weight": ((768, 768), "embedding"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_linear_and_expert_weights_become_fp8(name):
    """Dense, per-expert and merged-expert names of several families."""
    scheme, _ = Rules("per_channel").decide(name, QUANTIZED[name], torch.bfloat16)
    assert scheme == PerChannel()


@pytest.mark.parametrize("name", KEPT)
def test_everything_else_is_kept_with_its_reason(name):
    """Embeddings, heads, routers, norms, biases and convolutions, each for its own reason."""
    shape, why = KEPT[name]
    assert Rules("per_channel").decide(name, shape, torch.bfloat16) == (None, why)


def test_what_is_not_high_precision_is_kept():
    """Integer and already quantized weights are nobody's to quantize."""
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float64):
        scheme, why = Rules().decide("model.layers.0.mlp.up_proj.weight", (4, 4), dtype)
        assert scheme is None and str(dtype).removeprefix("torch.") in why


def test_module_types_say_what_names_do_not():
    """An embedding with an odd name is kept; a Linear with an odd name is quantized."""
    rules = Rules()
    assert rules.decide("tokens.weight", (10, 4), torch.bfloat16, torch.nn.Embedding(10, 4))[0] is None
    assert rules.decide("head_mix.weight", (4, 4), torch.bfloat16, torch.nn.Linear(4, 4))[0] == PerChannel()
    assert rules.decide("lm_head.weight", (10, 4), torch.bfloat16, torch.nn.Linear(4, 10))[0] is None


@pytest.mark.parametrize(
    "pattern, name, expected",
    [
        ("lm_head", "lm_head.weight", True),
        ("model.layers.1", "model.layers.1.mlp.up_proj.weight", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj.weight", False),
        ("*.down_proj", "model.layers.3.mlp.down_proj.weight", True),
        ("*down*", "model.layers.3.mlp.up_proj.weight", False),
        (r"re:layers\.(0|1)\.", "model.layers.1.mlp.up_proj.weight", True),
        (r"re:layers\.(0|1)\.", "model.layers.11.mlp.up_proj.weight", False),
    ],
)
def test_patterns(pattern, name, expected):
    """Names match whole components, so that layer 1 is not layer 10."""
    assert matches(pattern, name) is expected


def test_ignore_wins_over_include_and_include_over_the_defaults():
    """The order in which a user would expect exceptions to apply."""
    rules = Rules("per_tensor", ignore=["*.0.router"], include=["*.router"])
    assert rules.decide("layers.0.router.weight", (8, 16), torch.bfloat16) == (None, "ignore='*.0.router'")
    assert rules.decide("layers.1.router.weight", (8, 16), torch.bfloat16)[0] == PerTensor()


def test_schemes_by_pattern():
    """The first pattern that matches decides; the rest gets the common scheme."""
    rules = Rules("per_channel", schemes={"*.down_proj": "per_block", "*": "per_tensor"})
    assert rules.decide("a.down_proj.weight", (8, 16), torch.bfloat16)[0] == PerBlock()
    assert rules.decide("a.up_proj.weight", (8, 16), torch.bfloat16)[0] == PerTensor()
    assert rules.decide("lm_head.weight", (8, 16), torch.bfloat16)[0] is None  # only `include` overrides a default


def test_a_pattern_that_matches_nothing_is_an_error():
    """A typo in `ignore` must not quantize what was to be kept."""
    rules = Rules(ignore=["lm_head", "model.layer.0"], schemes={"*.w7": "per_tensor"})
    rules.decide("lm_head.weight", (8, 16), torch.bfloat16)
    with pytest.raises(UnmatchedPatternError, match=r"'\*.w7', 'model.layer.0'"):
        rules.check_all_used()


def test_a_bare_string_is_not_a_list_of_patterns():
    """ignore="lm_head" would otherwise be seven patterns of one letter."""
    with pytest.raises(TypeError, match="`ignore` must be a list"):
        Rules(ignore="lm_head")


LISTS = ("ignore", "include", "optional", "offload", "scope")


@pytest.mark.parametrize("argument", LISTS)
@pytest.mark.parametrize("given", ["lm_head", 3, [3]])
def test_every_list_of_patterns_is_one(argument, given):
    """Told by the name of the argument, wherever the list is used first."""
    reload = {"reload": "streaming"} if argument == "scope" else {}
    with pytest.raises(TypeError, match=rf"`{argument}` must be a list of patterns, .*(lm_head|3)"):
        _ = LayerwiseLoader(Model(fc=(8, 16)), device="cpu", **{argument: given}, **reload).plan


@pytest.mark.parametrize("argument", [*LISTS, "schemes", "stream"])
def test_a_bad_regular_expression_is_named(argument):
    """Of all patterns, the one that is wrong."""
    bad = "re:q_proj("
    given = {"schemes": {bad: "per_tensor"}, "stream": {bad: False}}.get(argument, ["fc", bad])
    reload = {"reload": "streaming"} if argument == "scope" else {}
    with pytest.raises(ValueError, match=r"'re:q_proj\('"):
        _ = LayerwiseLoader(Model(fc=(8, 16)), device="cpu", **{argument: given}, **reload).plan
