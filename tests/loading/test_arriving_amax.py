"""Large units with one scale: their maximum comes with the copies, and is forgotten where a write may lower it."""

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.loading import LayerwiseLoader, arrivals, staging

from .helpers import Model, assert_quantized, values

WRITES = {
    "shards": lambda p, w: None,
    "scaled in place": lambda p, w: (p[:32].mul_(0.5), w[:32].mul_(0.5)),
    "rewritten lower": lambda p, w: (p[10:20].copy_(w[10:20] * 0.25), w[10:20].mul_(0.25)),
    "every other row": lambda p, w: (p[0:20:2].copy_(w[0:20:2] * 3), w[0:20:2].mul_(3)),
    "one element": lambda p, w: (p.__setitem__((3, 3), 1000.0), w.__setitem__((3, 3), 1000.0)),
}


@pytest.fixture
def given(monkeypatch):
    """The maxima that whole units were cast with, from whatever size on."""
    seen, real = [], staging.quantize_into

    def noted(w, scheme, q, scale, amax):
        seen.append(None if amax is None else amax.item())
        return real(w, scheme, q, scale, amax)

    monkeypatch.setattr(arrivals, "ACCUMULATE_BYTES", 0)
    monkeypatch.setattr(staging, "quantize_into", noted)
    return seen


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", WRITES)
def test_the_bytes_of_the_whole(kind, source, spilled, given):
    """Shards of either dtype, of two weights in turns, and what loaders do in between: the bytes of quantizing what the
    weight held in the end; with the maximum at hand only where every write was a shard."""
    weights = {name: values(64, 96, dtype=source) for name in "ab"}
    model = Model(a=(64, 96), b=(64, 96))
    budget = 64 * 96 * source.itemsize if spilled else None
    with LayerwiseLoader(model, "per_tensor", device="cpu", staging_budget=budget) as loader:
        for start in range(0, 64, 16):
            for name, w in weights.items():
                p = model.get_parameter(f"{name}.weight").data
                p[start : start + 16].copy_(w[start : start + 16])
                if start == 16 and name == "a":
                    WRITES[kind](p, w)
    assert (loader.report.spills > 0) == spilled
    for name, w in weights.items():
        assert_quantized(model, f"{name}.weight", w, "per_tensor")
    wanted = {name: fk.amax(w).item() for name, w in weights.items()}
    assert given == ([wanted["a"]] if kind == "shards" else [None]) + [wanted["b"]]


def test_a_shard_of_another_dtype_is_looked_at_in_the_end(given):
    """Copy and maximum are one op for equal dtypes only; any other shard leaves the maximum to completion."""
    w, model = values(64, 96, dtype=torch.float16), Model(fc=(64, 96))
    with LayerwiseLoader(model, "per_tensor", device="cpu"):
        model.fc.weight.data[:32].copy_(w[:32].bfloat16())
        model.fc.weight.data[32:].copy_(w[32:])
    assert given == [None]
    assert_quantized(model, "fc.weight", torch.cat([w[:32].bfloat16().float(), w[32:].float()]), "per_tensor")


def test_nan_is_kept(given):
    """A NaN in one shard is in the maximum, and refused by name."""
    w, model = values(64, 96), Model(fc=(64, 96))
    w[3, 3] = float("nan")
    with pytest.raises(fk.NonFiniteWeightError, match="fc.weight"), LayerwiseLoader(model, "per_tensor", device="cpu"):
        for start in (0, 32):
            model.fc.weight.data[start : start + 32].copy_(w[start : start + 32])
    assert len(given) == 1 and given[0] != given[0]


def test_small_units_are_read_once_anyway(given, monkeypatch):
    """Below the measured size the unit's own kernel finds the maximum."""
    monkeypatch.setattr(arrivals, "ACCUMULATE_BYTES", 64 * 96 * 2)
    w, model = values(64, 96), Model(fc=(64, 96))
    with LayerwiseLoader(model, "per_tensor", device="cpu"):
        for start in (0, 32):
            model.fc.weight.data[start : start + 32].copy_(w[start : start + 32])
    assert given == [None]


def test_padding_that_arrives_is_outside_of_the_maximum(given):
    """A shard that fills the padding of a large weight too does not raise its scale."""
    w, model = values(64, 96), Model(fc=(64, 96))
    w[48:], w[:, 80:] = 1000.0, -1000.0
    with LayerwiseLoader(model, "per_tensor", device="cpu", logical_shapes={"fc": (48, 80)}):
        model.fc.weight.data.copy_(w)
    w[48:], w[:, 80:] = 0.0, 0.0
    assert_quantized(model, "fc.weight", w, "per_tensor")
