"""Streams that hold FP8 weights already: as they are where that is what they become, elsewhere quantized again."""

import random

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint
from fp8_kernels.checkpoint.formats import family_of

from . import tiny
from .test_stream import equal_bits

SOURCES = [("per_block", "fp8"), ("per_channel", "compressed-tensors"), ("per_tensor", "compressed-tensors")]


def fp8_state(tmp_path, state, scheme, format, **selection):
    """The tensors of the folder that holds them in FP8."""
    quantize_checkpoint(tiny.write_sharded(tmp_path / "in", state), tmp_path / "fp8", scheme, format, **selection)
    return dict(open_checkpoint(tmp_path / "fp8").tensors())


def dequantized(stored, scheme):
    """Every FP8 weight in float32, the rest as it is, without scales."""
    found = {}
    for name, t in stored.items():
        scale = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv"))
        if scale is not None:
            t = fk.dequantize(t, scale.reshape(()) if scheme == "per_tensor" else scale, torch.float32, scheme)
        if "weight_scale" not in name:
            found[name] = t
    return found


@pytest.mark.parametrize("order", ["codes first", "scales first", "any"])
@pytest.mark.parametrize("source,format", SOURCES)
def test_the_same_groups_stay_as_they_are(source, format, order, tmp_path):
    """Codes and scales leave as they came, to the bit, whichever of the two comes first."""
    stored = fp8_state(tmp_path, tiny.tensors(), source, format)
    items = sorted(stored.items(), key=lambda item: ("_scale" in item[0]) == (order == "codes first"))
    if order == "any":
        random.shuffle(items)
    said = []
    options = {"names": dequantized(stored, source), "progress": lambda done, name: said.append((done, name))}
    stream = fk.quantize_weights(iter(items), source, format, **options)
    equal_bits(dict(stream), stored)
    assert {name for _, name in said} == options["names"].keys()
    assert max(said)[0] == stream.report.bytes_in == sum(t.nbytes for t in stored.values())
    assert stream.report.quantized_tensors == len(tiny.weights(stored))


@pytest.mark.parametrize("target", ["per_channel", "per_tensor", "per_block"])
@pytest.mark.parametrize("source,format", SOURCES)
def test_other_groups_are_quantized_again(source, format, target, tmp_path):
    """The bits of quantizing what the stored weights stand for, in float32; only a single scale fits any groups."""
    stored = fp8_state(tmp_path, tiny.tensors(), source, format)
    found = dict(fk.quantize_weights(iter(stored.items()), target))
    wanted = dict(fk.quantize_weights(dequantized(stored, source).items(), target))
    assert found.keys() == wanted.keys()
    again = 0
    for name in tiny.weights(stored):
        scale, held = f"{name}_scale", stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv"))
        if held.numel() == 1 and (target != "per_tensor" or len(family_of(name)) == 1):
            assert torch.equal(found[name].view(torch.uint8), stored[name].view(torch.uint8)), name
            assert torch.equal(
                found[scale], held.reshape(-1).expand(wanted[scale].numel()).reshape(wanted[scale].shape)
            ), name
        elif source != target:
            assert torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)), name
            assert torch.equal(found[scale], wanted[scale]), name
            again += 1
    assert bool(again) == (source != target and (source != "per_tensor" or target == "per_tensor"))


def test_some_layers_are_fp8_already(tmp_path):
    """A checkpoint of both: FP8 layers as they are, the others quantized, what is ignored in bfloat16; the config is
    that of the stream."""
    state = tiny.tensors()
    mixed = fp8_state(tmp_path, state, "per_channel", "compressed-tensors", ignore=["model.layers.1"])
    assert sum(t.dtype == torch.float8_e4m3fn for t in mixed.values()) == 7
    found = dict(fk.quantize_weights(mixed.items()))
    equal_bits(found, dict(fk.quantize_weights(state.items())))
    assert fk.quantization_config(mixed) == fk.quantization_config(state)
    assert fk.quantization_config(tmp_path / "fp8") == fk.quantization_config(state)
    name = "model.layers.0.mlp.down_proj.weight"
    kept = dict(fk.quantize_weights(mixed.items(), ignore=[name]))
    w = fk.dequantize(mixed[name], mixed[f"{name}_scale"], torch.bfloat16, "per_channel")
    assert torch.equal(kept[name], w) and f"{name}_scale" not in kept
    assert "model.layers.0.mlp.down_proj" in fk.quantization_config(mixed, ignore=[name])["ignore"]


def test_source_may_reuse_its_memory(tmp_path):
    """Codes that wait for their scales, and scales for codes, are copies."""
    stored = fp8_state(tmp_path, tiny.tensors(), "per_channel", "compressed-tensors")
    items = sorted(
        stored.items(), key=lambda item: item[0].replace("_proj", "_scale" if random.random() < 0.5 else "z")
    )

    def reusing():
        for name, t in items:
            buffer = t.clone()
            yield name, buffer
            buffer.view(torch.uint8).fill_(255)

    found = {name: t.clone() for name, t in fk.quantize_weights(reusing(), "per_channel")}  # as an engine copies
    equal_bits(found, stored)


def test_what_is_missing_or_wrong_is_named():
    """Codes without scales, NaN among codes, scales that fit nothing."""
    q, scale = fk.quantize(torch.randn(4, 32), "per_channel")
    with pytest.raises(fk.CheckpointError, match=r"`x\.o_proj\.weight` must be .* FP8 with its scales"):
        list(fk.quantize_weights([("x.o_proj.weight", q)]))
    bad = q.clone()
    bad.view(torch.uint8)[1, 3] = 0x7F
    for scheme in ("per_channel", "per_tensor"):
        items = [("x.o_proj.weight", bad), ("x.o_proj.weight_scale", scale)]
        with pytest.raises(fk.NonFiniteWeightError, match=r"x\.o_proj\.weight"):
            list(fk.quantize_weights(items, scheme))
    with pytest.raises(ValueError, match=r"`x\.o_proj\.weight`: `scheme` must be given"):
        list(fk.quantize_weights([("x.o_proj.weight", q), ("x.o_proj.weight_scale", torch.ones(3, 7))], "per_tensor"))
