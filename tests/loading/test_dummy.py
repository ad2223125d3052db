"""Generated weights, for measurements without a checkpoint."""

import pytest
import torch
from torch import nn

import fp8_kernels as fk
from fp8_kernels.loading import LayerwiseLoader

from .helpers import SCHEMES, Model, values


def _build():
    with torch.device("meta"):
        model = nn.Module()
        model.embed = nn.Embedding(10, 36, dtype=torch.bfloat16)
        model.fc = nn.Linear(36, 130, dtype=torch.bfloat16)
        model.experts = nn.Module()
        model.experts.w13 = nn.Parameter(torch.empty(3, 10, 36, dtype=torch.bfloat16))
        model.norm = nn.BatchNorm1d(36, dtype=torch.bfloat16)
    return model


def _filled(scheme="per_channel", seed=0, **options):
    model = _build()
    with LayerwiseLoader(model, scheme, device="cpu", **options) as loader:
        loader.fill_dummy(seed)
    return model, loader


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dummy_load(scheme):
    """The same plan and units as a load from a checkpoint, hooks too; finite values that use FP8's range, other ones
    for every weight and expert; the same seed gives the same bytes, another seed others."""
    units = []
    model, loader = _filled(scheme, on_unit=lambda unit, q, scale: units.append(str(unit)))
    assert units == ["fc.weight", "experts.w13[0]", "experts.w13[1]", "experts.w13[2]"]
    assert loader.report.quantized_units == 4 and loader.report.quantized_tensors == 2
    w = fk.dequantize(model.fc.weight, model.fc.weight_scale, torch.float32, fk.schemes.as_scheme(scheme))
    assert w.isfinite().all() and 0.05 < w.std() < 0.2
    experts = model.experts.w13.view(torch.uint8)
    assert not torch.equal(experts[0], experts[1])
    assert model.norm.running_var.eq(1).all() and model.fc.bias.eq(0).all() and model.norm.num_batches_tracked == 0
    again, other = _filled(scheme)[0], _filled(scheme, seed=1)[0]
    for name, t in model.state_dict().items():
        assert torch.equal(t.reshape(-1).view(torch.uint8), again.state_dict()[name].reshape(-1).view(torch.uint8))
    assert not torch.equal(model.fc.weight.view(torch.uint8), other.fc.weight.view(torch.uint8))


def test_dummy_load_keeps_what_arrived_and_pads():
    """Only what has not arrived is generated, and padding stays 0."""
    model, w = Model(a=(16, 36), b=(16, 36)), values(16, 36)
    with LayerwiseLoader(model, device="cpu", logical_shapes={"b": (10, 30)}) as loader:
        model.a.weight.data.copy_(w)
        loader.fill_dummy()
    assert torch.equal(model.a.weight.view(torch.uint8), fk.quantize(w)[0].view(torch.uint8))
    b = model.b.weight.float()
    assert b[:10, :30].any() and not b[10:].any() and not b[:, 30:].any()


def test_dummy_load_holds_two_units():
    """It costs what a load costs."""
    model = Model(**{f"fc{i}": (64, 576) for i in range(16)})
    with LayerwiseLoader(model, device="cpu") as loader:
        loader.fill_dummy()
    assert loader.report.peak_staging_bytes <= 2 * 64 * 576 * 2


def test_dummy_load_outside_the_context():
    with pytest.raises(RuntimeError, match="must be entered"):
        LayerwiseLoader(_build(), device="cpu").fill_dummy()
