"""The plan: every tensor of a model is in it once, with what becomes of it and what that costs."""

import pytest
import torch
from torch import nn

import fp8_kernels as fk
from fp8_kernels.errors import UnmatchedPatternError
from fp8_kernels.loading import LayerwiseLoader, make_plan

from .helpers import Model


def _language_model():
    with torch.device("meta"):
        model = nn.Module()
        model.embed_tokens = nn.Embedding(65, 48, dtype=torch.bfloat16)
        model.layers = nn.ModuleList()
        for _ in range(3):
            layer = nn.Module()
            layer.qkv_proj = nn.Linear(48, 80, dtype=torch.bfloat16)
            layer.norm = nn.RMSNorm(48, dtype=torch.bfloat16)
            layer.experts = nn.Module()
            layer.experts.w13 = nn.Parameter(torch.empty(4, 30, 48, dtype=torch.bfloat16))
            layer.register_buffer("inv_freq", torch.empty(5), persistent=False)
            layer.register_buffer("correction", torch.empty(5))
            model.layers.append(layer)
        model.lm_head = nn.Linear(48, 65, bias=False, dtype=torch.bfloat16)
        model.lm_head.weight = model.embed_tokens.weight
    return model


def test_entries_cover_the_model():
    """Each storage is one entry under all its names; weights become FP8, the rest passes through and says why."""
    plan = make_plan(_language_model(), "per_tensor")
    names = [e.name for e in plan.entries]
    assert len(names) == len(set(names)) == 1 + 3 * 5
    by_name = {e.name: e for e in plan.entries}
    assert by_name["embed_tokens.weight"].names == ("embed_tokens.weight", "lm_head.weight")
    assert {e.name.split(".", 2)[-1] for e in plan.quantized} == {"qkv_proj.weight", "experts.w13"}
    assert by_name["layers.1.experts.w13"].num_units == 4
    assert by_name["layers.1.qkv_proj.weight"].num_units == 1
    assert by_name["layers.1.correction"].why == "buffer"
    assert all(e.why for e in plan.entries)
    assert plan.rebuild == tuple(f"layers.{i}.inv_freq" for i in range(3))


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8"])
def test_forecast_is_what_a_load_takes(scheme):
    """`resident` equals the bytes of the loaded tensors; staging stays within the two units of `peak`."""
    model = _language_model()
    plan = make_plan(model, scheme)
    with LayerwiseLoader(model, scheme, device="cpu") as loader:
        for t in [*model.parameters(), *(layer.correction for layer in model.layers)]:
            t.data.copy_(torch.ones(t.shape))
            t.data.copy_(torch.ones(t.shape, dtype=t.dtype))
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in model.state_dict().values()}
    assert plan.resident == sum(held.values()) == loader.report.bytes_out
    assert plan.largest_unit == 80 * 48 * 2
    assert plan.peak == plan.resident + 2 * plan.largest_unit
    assert plan.bytes_in == sum(e.bytes_in for e in plan.entries)


def test_table_and_json():
    """Layers of a kind share a row that counts them, and the JSON lists each tensor."""
    plan = make_plan(_language_model())
    rows = str(plan).splitlines()
    row = next(r for r in rows if r.startswith("layers.*.experts.w13"))
    assert row.split()[1:] == ["3", "4x30x48", "FP8", "per_channel", "18.3", "KiB"]
    assert any(r.startswith("embed_tokens.weight") and "bfloat16 (embedding)" in r for r in rows)
    assert "6 of 16 tensors become FP8, in 15 units" in str(plan)
    assert "layers.0.inv_freq" in rows[-1]
    listed = {t["name"]: t for t in plan.as_dict()["tensors"]}
    assert listed["layers.2.experts.w13"]["units"] == 4 and listed["layers.2.norm.weight"]["scheme"] is None


def test_patterns():
    """ignore, include and per-pattern schemes decide; a pattern that matches nothing is an error, of every kind."""
    model = _language_model()
    plan = make_plan(
        model, ignore=["layers.0.*"], include=["lm_head", "embed_tokens"], schemes={"re:experts": fk.PerBlock(16, 16)}
    )
    chosen = {e.name: e.scheme for e in plan.quantized}
    assert "layers.0.qkv_proj.weight" not in chosen
    assert chosen["embed_tokens.weight"] == fk.PerChannel()
    assert chosen["layers.1.experts.w13"] == fk.PerBlock(16, 16)
    # A tied weight is quantized only if all its names may be.
    assert "embed_tokens.weight" not in {e.name for e in make_plan(model, include=["lm_head"]).quantized}
    for option in (
        {"ignore": ["nothing"]},
        {"include": ["nothing"]},
        {"schemes": {"nothing": "per_tensor"}},
        {"optional": ["nothing"]},
        {"logical_shapes": {"nothing": (1, 1)}},
    ):
        with pytest.raises(UnmatchedPatternError, match="'nothing'"):
            make_plan(model, **option)


@pytest.mark.parametrize("logical", [(81, 48), (80, 49), (80,), (80, 48, 1), (-1, 48)])
def test_logical_shape_must_be_a_corner(logical):
    """A logical shape that is not a part of the weight is refused by name."""
    with pytest.raises(ValueError, match=r"logical shape of `layers.0.qkv_proj.weight` must be a corner"):
        make_plan(_language_model(), logical_shapes={"layers.0.qkv_proj.weight": logical})


def test_what_cannot_be_loaded():
    """A real weight, a strided one, one that has a scale already: each is named, with the way out."""
    model = Model(fc=(6, 36), fc2=(6, 36), device="cpu")
    assert len(make_plan(model).quantized) == 2  # to look at is fine
    with pytest.raises(
        ValueError, match=r"must be on the meta device, got real ones: `fc.weight`, `fc2.weight`.*ignore"
    ):
        _ = LayerwiseLoader(model).plan
    model = Model(fc=(6, 36))
    model.fc.weight = nn.Parameter(torch.empty(36, 6, device="meta").t())
    with pytest.raises(ValueError, match=r"must be contiguous, got `fc.weight`"):
        _ = LayerwiseLoader(model).plan
    model = Model(fc=(6, 36))
    model.fc.register_buffer("weight_scale", torch.ones(()))
    with pytest.raises(ValueError, match=r"`fc.weight` must not have a scale before"):
        _ = LayerwiseLoader(model).plan
    model = Model(fc=(6, 36), fc2=(6, 36))
    model.fc2.weight = nn.Parameter(model.fc.weight.data[:3])
    with pytest.raises(ValueError, match=r"on meta must not overlap, got `fc.weight` with `fc2.weight`"):
        make_plan(model)
    with pytest.raises(ValueError, match="`fc.weight` must have a shape"):
        model = nn.Module()
        model.fc = nn.LazyLinear(5)
        make_plan(model, include=["fc"])
    with pytest.raises(TypeError, match="`dtype` must be one of"):
        make_plan(Model(fc=(6, 36)), dtype=torch.int8)
    with pytest.raises(ValueError, match="`device` must be a real device"):
        LayerwiseLoader(Model(fc=(6, 36)), device="meta")


def test_overlapping_real_tensors_are_left_alone():
    """Real buffers that are views of one another are the model's own business: nothing is expected in them."""
    model = Model(fc=(6, 36))
    table = torch.randn(7, 4)
    model.register_buffer("cos", table[:, :2])
    model.register_buffer("sin", table[:, 2:])
    with LayerwiseLoader(model, device="cpu") as loader:
        model.fc.weight.data.zero_()
    assert loader.report.passed_through["cos"] == "overlaps other tensors or itself"
    assert torch.equal(model.sin, table[:, 2:])
