"""Small weights wait for each other, and are quantized in one call; nobody can tell but by counting."""

import gc

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.loading import LayerwiseLoader, launches

from .helpers import Model, assert_quantized, values


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call took."""
    taken, real = [], launches.quantize_many_into

    def counted(weights, *args):
        taken.append(len(weights))
        real(weights, *args)

    monkeypatch.setattr(launches, "quantize_many_into", counted)
    return taken


def shards(count, rows=8, cols=64):
    return {f"w{i}": values(rows, cols) for i in range(count)}


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["per_channel", "per_block", "mxfp8"])
def test_a_launch_takes_many(calls, scheme):
    weights = shards(100)
    model = Model(**{name: w.shape for name, w in weights.items()})
    with LayerwiseLoader(model, scheme, device="cpu"):
        for name, w in weights.items():
            model.get_submodule(name).weight.copy_(w)
    assert calls == [48, 48, 3]  # the last stays open until the end
    for name, w in weights.items():
        assert_quantized(model, f"{name}.weight", w, scheme)


@torch.no_grad()
def test_schemes_and_sizes_apart(calls):
    """Another scheme is another call; a large weight does not wait, nor does anything where there is little room."""
    shapes = {"a": (8, 64), "b": (8, 64), "large": (300, 512), "c": (8, 64)}
    weights = {name: values(*shape) for name, shape in shapes.items()}

    def loaded(**options):
        model = Model(**shapes)
        with LayerwiseLoader(model, device="cpu", schemes={"b": "per_block"}, **options):
            for name, w in weights.items():
                model.get_submodule(name).weight.copy_(w)
        for name, w in weights.items():
            assert_quantized(model, f"{name}.weight", w, "per_block" if name == "b" else "per_channel")

    loaded()
    assert calls == [1, 1]
    calls.clear()
    loaded(staging_budget=1000)
    assert calls == []


@torch.no_grad()
def test_what_waits_is_final():
    """It is verified, not written, when it arrives again; and it was never left out."""
    weights = shards(3)
    model = Model(**{name: w.shape for name, w in weights.items()})
    with pytest.raises(fk.ConflictingShardError, match="w0"), LayerwiseLoader(model, device="cpu") as loader:
        for name, w in weights.items():
            model.get_submodule(name).weight.copy_(w)
        model.w0.weight.copy_(weights["w0"])
        assert loader.report.duplicates == ["w0.weight"] and loader.report.quantized_units == 3
        model.w0.weight.copy_(weights["w0"] + 1)


@torch.no_grad()
def test_hooks_see_results(calls):
    weights, seen = shards(3), {}
    model = Model(**{name: w.shape for name, w in weights.items()})

    def keep(unit, q, scale):
        seen[unit.name] = fk.dequantize(q, scale)

    with LayerwiseLoader(model, device="cpu", on_unit=keep):
        for name, w in weights.items():
            model.get_submodule(name).weight.copy_(w)
    for name, w in weights.items():
        assert torch.equal(seen[f"{name}.weight"], fk.dequantize(*fk.quantize(w)))
    assert not calls


@torch.no_grad()
def test_a_launch_that_fails_is_told(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(launches, "quantize_many_into", fails)
    weights = shards(2)
    model = Model(**{name: w.shape for name, w in weights.items()})
    with pytest.raises(torch.OutOfMemoryError), LayerwiseLoader(model, device="cpu"):
        for name, w in weights.items():
            model.get_submodule(name).weight.copy_(w)
    assert all(p.is_meta for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled):
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        model = Model(fc=(6, 36))
        with pytest.raises(fk.LoadError), LayerwiseLoader(model, device="cpu"):
            assert gc.isenabled() == enabled
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
