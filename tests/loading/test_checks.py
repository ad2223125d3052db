"""The look at all scales at the end: every bad weight is named, however the scales are put together."""

import pytest

import fp8_kernels as fk
from fp8_kernels.loading import LayerwiseLoader, checks

from .helpers import SCHEMES, Model, assert_quantized, values

SHAPES = {"a": (6, 36), "b": (300, 200), "c": (3, 5, 40), "d": (1, 1), "e": (0, 8)}


@pytest.mark.parametrize("look_bytes", [0, 40, checks.LOOK_BYTES])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [(), ("a",), ("experts", "d"), ("b",)], ids=str)
def test_every_weight_that_is_not_finite_is_named(bad, scheme, look_bytes, monkeypatch):
    """One weight a piece, a few, all in one; scales of each kind, also of a weight without elements."""
    monkeypatch.setattr(checks, "LOOK_BYTES", look_bytes)
    shapes = {("experts" if name == "c" else name): shape for name, shape in SHAPES.items()}
    model, weights = Model(**shapes), {name: values(*shape) if shape[0] else None for name, shape in shapes.items()}
    for name in bad:
        weights[name].view(-1)[-1] = float("inf") if name == "d" else float("nan")

    def load():
        with LayerwiseLoader(model, scheme, device="cpu"):
            for name, w in weights.items():
                if w is not None:
                    model.get_parameter(f"{name}.weight").data.copy_(w)

    if bad:
        with pytest.raises(fk.NonFiniteWeightError) as error:
            load()
        named = str(error.value).partition(": ")[2].split(", ")
        assert named == [f"{name}.weight" + ("[2]" if name == "experts" else "") for name in shapes if name in bad]
    else:
        load()
        for name, w in weights.items():
            if w is not None:
                assert_quantized(model, f"{name}.weight", w, scheme)
