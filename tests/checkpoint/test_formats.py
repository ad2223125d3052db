"""What each format stores, says in config.json, and refuses. Engines reading it: test_engines.py."""

import json

import pytest
import torch

from fp8_kernels.checkpoint import quantize_checkpoint
from fp8_kernels.checkpoint.formats import FORMATS, FUSED_FAMILIES, as_format, family_of
from fp8_kernels.errors import UnsupportedLayoutError
from fp8_kernels.schemes import SCHEMES, PerBlock, PerChannel, PerGroup, PerTensor

from . import tiny

CT, FP8 = FORMATS["compressed-tensors"], FORMATS["fp8"]
E4M3 = torch.float8_e4m3fn


def activations(**fields):
    return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, **fields}


@pytest.mark.parametrize(
    "scheme,weights,inputs",
    [
        ("per_channel", {"strategy": "channel"}, activations(strategy="token")),
        ("per_tensor", {"strategy": "tensor"}, activations(strategy="token")),
        (
            "per_block",
            {"strategy": "block", "block_structure": [128, 128]},
            activations(strategy="group", group_size=128),
        ),
    ],
)
def test_compressed_tensors_config(scheme, weights, inputs, tmp_path):
    """Exactly what engines read: one group for every Linear, and the names of what is none of it."""
    quantize_checkpoint(tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1)), tmp_path / "out", scheme)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", "model.embed_tokens"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights},
                "input_activations": inputs,
                "output_activations": None,
            }
        },
    }


def test_fp8_config(tmp_path):
    """Exactly what engines read."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    quantize_checkpoint(src, tmp_path / "out", "per_block", "fp8")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
    }


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_config_gives_every_module_its_scheme_back(fmt):
    """What `config` says, `scheme_of` and `keeps` read; a name that begins like another is not taken for it."""
    schemes = {f"layers.{i}.up_proj": PerBlock() for i in range(12)}
    if fmt is CT:
        schemes |= {"layers.12.up_proj": PerChannel(), "layers.13.up_proj": PerTensor()}
    config = json.loads(json.dumps(fmt.config(schemes, ["layers.1.gate", "lm_head"])))
    assert {module: fmt.scheme_of(config, module) for module in schemes} == schemes
    assert fmt.keeps(config, "layers.1.gate") and fmt.keeps(config, "lm_head")
    assert not any(fmt.keeps(config, module) for module in (*schemes, "layers.1.gate_proj", "layers.11.gate"))


@pytest.mark.parametrize("shape", [(576, 576), (576, 1536), (1536, 576), (128, 192), (192, 128), (64, 128), (1, 1)])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_blocks_that_do_not_divide_are_refused(fmt, shape):
    """576 columns (a real hidden size), and 192, where readers would silently take 96 for the block size."""
    with pytest.raises(UnsupportedLayoutError, match="`a.weight` must be a multiple of 128 in both .*'per_channel'"):
        fmt.check("a.weight", shape, PerBlock(), E4M3)
    CT.check("a.weight", shape, PerChannel(), E4M3)
    CT.check("a.weight", shape, PerTensor(), E4M3)
    fmt.check("a.weight", (256, 7168), PerBlock(), E4M3)


def test_block_scales_of_experts_are_refused_where_transformers_cannot_read_them():
    """compressed-tensors blocks for experts; the message names both that work, and they do."""
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    with pytest.raises(UnsupportedLayoutError, match="'per_channel' works, and so do blocks in format='fp8'"):
        CT.check(name, (256, 128), PerBlock(), E4M3)
    CT.check(name, (256, 128), PerChannel(), E4M3)
    FP8.check(name, (256, 128), PerBlock(), E4M3)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_experts_in_one_tensor_are_refused(fmt):
    """[E, 2I, H] has no name for its scales; the message says how to keep it."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(UnsupportedLayoutError, match=rf"ignore=\['{name}'\]"):
        fmt.check(name, (8, 256, 128), PerBlock(), E4M3)
    with pytest.raises(UnsupportedLayoutError, match=r"must be \[N, K\] .* got \[8, 256, 128\]"):
        fmt.check(f"{name}.weight", (8, 256, 128), PerBlock(), E4M3)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_segments_are_refused(fmt):
    """A file holds q, k and v one by one; a scale for each part of one of them has no place there."""
    with pytest.raises(UnsupportedLayoutError, match="`a.weight` must have a scale of its own .* 128 \\+ 128 rows"):
        fmt.check("a.weight", (256, 256), PerTensor((128, 128)), E4M3)


@pytest.mark.parametrize("scheme", sorted({name for name in SCHEMES if "group" in name or "mx" in name.lower()}))
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_groups_are_refused(fmt, scheme):
    """No engine reads 1 x G scales of FP8 weights in these formats."""
    with pytest.raises(UnsupportedLayoutError, match=r"`a.weight`: format .* must be .*per_block\(128, 128\)"):
        fmt.check("a.weight", (256, 256), SCHEMES[scheme], E4M3)


def test_other_refusals():
    """Other blocks, rows in the block format, e5m2 anywhere."""
    for fmt, scheme in ((CT, PerBlock(64, 128)), (FP8, PerBlock(1, 128)), (FP8, PerChannel()), (FP8, PerGroup(128))):
        with pytest.raises(UnsupportedLayoutError, match="per_block"):
            fmt.check("a.weight", (256, 256), scheme, E4M3)
    with pytest.raises(UnsupportedLayoutError, match="must hold float8_e4m3fn, .* got float8_e5m2"):
        CT.check("a.weight", (256, 256), PerChannel(), torch.float8_e5m2)
    with pytest.raises(ValueError, match="`format` must be one of .*'fp8'.*, got 'awq'"):
        as_format("awq")


def test_families():
    """Every member knows the whole family, in the same order; anything else is alone; experts do not mix."""
    for members in FUSED_FAMILIES:
        names = [f"layers.3.x.{member}.weight" for member in members]
        assert all(family_of(name) == names for name in names)
    for name in ("o_proj.weight", "layers.0.down_proj.weight", "weight", "layers.0.q_proj_norm.weight"):
        assert family_of(name) == [name]
    assert family_of("experts.1.w1.weight") == ["experts.1.w1.weight", "experts.1.w3.weight"]


def test_refused_layouts_write_nothing(tmp_path):
    """The whole checkpoint is checked before the first byte."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1, hidden=64))
    with pytest.raises(UnsupportedLayoutError, match="multiple of 128"):
        quantize_checkpoint(src, tmp_path / "out", "per_block", "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
