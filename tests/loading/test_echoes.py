"""Copies of weights that had not arrived, put in their place, bring nothing: nothing that is missing is hidden."""

import contextlib

import pytest
import torch
from torch import nn

from fp8_kernels import LoadError
from fp8_kernels.loading import LayerwiseLoader

from .helpers import Model, assert_quantized, load, values


def cast_data(model):
    model.a.weight.data = model.a.weight.data.to(torch.float32)


def write_back(model):
    model.a.weight.data.copy_(model.a.weight.data.clone())


def write_back_a_part(model):
    model.a.weight.data[1:3] = model.a.weight.data[1:3].clone()


def load_own_state(model):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


def new_parameter(model):
    model.a.weight = nn.Parameter(model.a.weight.data.clone())


ECHOES = {
    "half": lambda model: model.half(),
    "float, twice": lambda model: model.float().to(torch.float64),
    "to cpu": lambda model: model.to("cpu"),
    "data = clone": lambda model: setattr(model.a.weight, "data", model.a.weight.data.clone()),
    "data = cast": cast_data,
    "copy of itself": lambda model: model.a.weight.data.copy_(model.a.weight.data),
    "copy of its clone": write_back,
    "copy of a part": write_back_a_part,
    "copy in float32": lambda model: model.a.weight.data.copy_(model.a.weight.float()),
    "its own state": load_own_state,
    "new parameter": new_parameter,
    "state of itself": lambda model: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("name", ECHOES)
@pytest.mark.parametrize("rows", [0, 4])
@torch.no_grad()
def test_what_never_arrives_is_missed(name, rows):
    """Nothing, or two thirds, of a weight arrived before it was copied onto itself."""
    model, w = Model(a=(6, 36), b=(3, 5)), values(6, 36)

    def run(params):
        if rows:
            params["a.weight"].data[:rows].copy_(w[:rows])
        ECHOES[name](model)

    # One scale for all, so that nothing of it is quantized before all is there, and may be read.
    with pytest.raises(LoadError, match=rf"a\.weight.*{rows}:6" if rows else r"a\.weight"):
        load(model, run, "per_tensor")
    assert model.a.weight.is_meta


CASTS = {"half", "float, twice"}


@pytest.mark.parametrize("name", sorted(ECHOES.keys() - CASTS))
@torch.no_grad()
def test_what_arrives_after_it_counts(name):
    model, w, b = Model(a=(6, 36), b=(3, 5)), values(6, 36), values(3, 5)
    with LayerwiseLoader(model, "per_channel", device="cpu"):
        ECHOES[name](model)
        model.a.weight.data[:4].copy_(w[:4])
        model.b.weight.data.copy_(b)
        model.a.weight.data[4:].copy_(w[4:])
    assert_quantized(model, "a.weight", w)
    assert_quantized(model, "b.weight", b)


@pytest.mark.parametrize("name", sorted(CASTS))
@torch.no_grad()
def test_a_cast_model_cannot_be_written(name):
    model = Model(a=(6, 36))
    with pytest.raises(LoadError, match=r"a\.weight.*cast the model before"), LayerwiseLoader(model, device="cpu"):
        ECHOES[name](model)
        with contextlib.suppress(LoadError):  # as an engine might
            model.a.weight.data.copy_(values(6, 36))
    assert model.a.weight.is_meta and model.a.weight.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("first", ["to cpu", "data = clone", "tied"])
def test_what_takes_the_place_of_a_copy_counts(first):
    """`assign=True` after the copy, or after a tie to another weight: the weight's own tensor is there again."""
    model, w, b = Model(a=(6, 36), b=(6, 36)), values(6, 36), values(6, 36)
    with LayerwiseLoader(model, "per_channel", device="cpu"):
        if first == "tied":
            model.b.weight = model.a.weight
        else:
            ECHOES[first](model)
        model.load_state_dict({"a.weight": w, "b.weight": b}, assign=True)
    assert_quantized(model, "a.weight", w)
    assert_quantized(model, "b.weight", b)


@torch.no_grad()
def test_a_copy_that_was_changed_is_a_write():
    model, w = Model(a=(6, 36)), values(6, 36)

    def run(params):
        copy = params["a.weight"].data.clone()
        copy += w
        params["a.weight"].data.copy_(copy)

    load(model, run)
    assert_quantized(model, "a.weight", w)


@torch.no_grad()
def test_what_passes_through_is_missed_too():
    """Its memory exists already, with values that nobody wrote."""
    model = Model(a=(6, 36), norm=(36,))
    with pytest.raises(LoadError, match=r"norm\.weight"):
        load(model, lambda params: (params["a.weight"].copy_(values(6, 36)), model.norm.half()))


@torch.no_grad()
def test_a_weight_of_zeros_arrives():
    """Equal to what reading gives, and yet no copy of it."""
    model = Model(a=(6, 36))

    def run(params):
        params["a.weight"].data.clone()
        params["a.weight"].copy_(torch.zeros(6, 36, dtype=torch.bfloat16))

    load(model, run)
    assert_quantized(model, "a.weight", torch.zeros(6, 36, dtype=torch.bfloat16))
