"""What errors and the report say: which parameter, which rows and columns, and what to do about it."""

import pytest
import torch
from torch import nn

from fp8_kernels.errors import ConflictingShardError, IncompleteLoadError, LoadError, NonFiniteWeightError

from .helpers import Model, load, values


def _raises(error, match, model, function, **options):
    with pytest.raises(error, match=match):
        load(model, function, **options)


def test_missing_regions_are_named():
    """By rows, columns and experts; what nothing was written to is everything."""

    def loading(params):
        params["gate_up_proj.weight"].data[:2816].zero_()
        params["down.weight"].data[:, 10:20].zero_()
        params["experts.weight"].data[0].zero_()
        params["experts.weight"].data[1, 3:, :7].zero_()

    model = Model(gate_up_proj=(5632, 8), down=(8, 30), experts=(5, 6, 36), other=(3, 5))
    with pytest.raises(IncompleteLoadError, match="^4 of 4 tensors are incomplete") as error:
        load(model, loading)
    text = str(error.value)
    assert "gate_up_proj.weight: rows 2816:5632 of 5632, all columns" in text
    assert "down.weight: all rows, columns 0:10 of 30; all rows, columns 20:30 of 30" in text
    assert (
        "experts.weight: experts 2:5 of 5; expert 1: rows 0:3 of 6, all columns; "
        "expert 1: rows 3:6 of 6, columns 7:36 of 36" in text
    )
    assert "other.weight: everything" in text


def test_missing_rows_of_index_writes_are_named():
    """Rows written one by one, out of order, leave exactly the others."""

    def loading(params):
        params["fc.weight"].data.index_fill_(0, torch.tensor([3, 0, 2]), 1.0)

    match = r"rows 1:2 of 6, all columns; rows 4:6 of 6, all columns"
    _raises(IncompleteLoadError, match, Model(fc=(6, 36)), loading)


def test_the_hint_fits_the_cause():
    """A load that wrote nothing is told so; one that wrote something is told of `optional` and threads."""
    nothing = "nothing was written at all"
    _raises(IncompleteLoadError, nothing, Model(a=(6, 36)), lambda params: None)
    some = r"1 of 2 tensors[^:]*`loader.worker\(\)`[^:]*`optional`\):\n  b.weight: everything"
    _raises(IncompleteLoadError, some, Model(a=(6, 36), b=(6, 36)), lambda params: params["a.weight"].data.zero_())


def test_a_missing_part_of_an_optional_tensor():
    """Optional is all or nothing."""
    model = nn.Module()
    model.fc = nn.Linear(36, 6, device="meta", dtype=torch.bfloat16)

    def half(params):
        params["fc.weight"].data.zero_()
        params["fc.bias"].data[:2].zero_()

    _raises(IncompleteLoadError, "fc.bias: rows 2:6 of 6", model, half, optional=["*.bias"])


def test_optional_tensors_that_stayed_away_are_listed():
    """Each by name, and nothing else."""
    model = nn.Module()
    model.fc = nn.Linear(36, 6, device="meta", dtype=torch.bfloat16)
    loader = load(model, lambda params: params["fc.weight"].data.zero_(), optional=["*.bias"])
    assert loader.report.defaulted == ["fc.bias"]


def test_conflicts_are_named():
    """The region of the second value; the names of a tensor that has several."""

    def conflict(params):
        params["qkv.weight"].data.fill_(1)
        params["fc.weight"].data.fill_(1)
        params["qkv.weight"].data[:3].fill_(-1)

    _raises(ConflictingShardError, r"qkv.weight rows 0:3 of 9, all columns", Model(qkv=(9, 64), fc=(3, 5)), conflict)
    tied = Model(a=(7, 64), b=(7, 64))
    tied.b.weight = tied.a.weight

    def twice(params):
        params["a.weight"].data.fill_(1)
        params["a.weight"].data.fill_(2)

    _raises(ConflictingShardError, "one tensor under the names `a.weight`, `b.weight`", tied, twice)


def test_bad_sources_are_named():
    """What cannot become a weight is refused with the parameter's name and what it got."""

    def copy(source):
        return lambda params: params["fc.weight"].data.copy_(source)

    for dtype in (torch.float8_e4m3fn, torch.int8, torch.bool):
        match = f"fc.weight` must be loaded from .* got {dtype}"
        _raises(LoadError, match, Model(fc=(6, 36)), copy(torch.ones(6, 36).to(dtype)))
    match = "fc.weight`: a tensor on the meta device holds no data"
    _raises(LoadError, match, Model(fc=(6, 36)), copy(torch.empty(6, 36, device="meta")))
    fp8 = Model(fc=(6, 36), dtype=torch.float8_e4m3fn, device="cpu")
    _raises(LoadError, "fc.weight` is torch.float8_e4m3fn: a cast from torch.bfloat16", fp8, copy(values(6, 36)))
    _raises(
        LoadError, "whole elements", Model(fc=(6, 36)), lambda p: p["fc.weight"].data.view(torch.uint8)[:, :35].zero_()
    )


def test_every_non_finite_weight_is_named():
    """Weights and experts, and how many."""

    def poisoned(params):
        params["a.weight"].data.fill_(1)
        b, experts = values(6, 36), values(4, 6, 36)
        b[5, 35] = experts[2, 0, 0] = float("nan")
        params["b.weight"].data.copy_(b)
        params["experts.weight"].data.copy_(experts)

    match = r"2 weights hold NaN or Inf: b.weight, experts.weight\[2\]$"
    _raises(NonFiniteWeightError, match, Model(a=(6, 36), b=(6, 36), experts=(4, 6, 36)), poisoned)


def test_an_output_of_another_shape_is_refused():
    """`out=` would resize what it is given; a weight cannot be."""
    with pytest.raises((LoadError, RuntimeError)), pytest.warns(UserWarning, match="resized"):
        load(Model(fc=(3, 36)), lambda params: torch.mul(values(6, 36), 1.0, out=params["fc.weight"].data))


def test_the_report_tells_duplicates_from_rewrites():
    """The same value again is a duplicate, by region; another one, while the weight is open, a rewrite."""
    w = values(9, 576)

    def again(params):
        for start in (0, 0, 3, 6):
            params["qkv.weight"].data.narrow(0, start, 3).copy_(w[start : start + 3])

    report = load(Model(qkv=(9, 576)), again).report
    assert (report.duplicates, report.rewrites) == (["qkv.weight rows 0:3 of 9, all columns"], [])

    def changed(params):
        params["qkv.weight"].data.copy_(w)
        params["qkv.weight"].data.mul_(2)

    report = load(Model(qkv=(9, 576)), changed).report
    assert (report.duplicates, report.rewrites) == ([], ["qkv.weight"])


def test_attributes_of_parameters_stay():
    """A weight loader that the engine has put on its parameter is still there afterwards."""
    model = Model(fc=(6, 36))
    model.fc.weight.weight_loader = loader = lambda p, w: p.data.copy_(w)
    load(model, lambda params: params["fc.weight"].weight_loader(params["fc.weight"], values(6, 36)))
    assert model.fc.weight.weight_loader is loader
