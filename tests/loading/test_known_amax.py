"""per_tensor with maxima that are known beforehand: shards are quantized as they come, to the same bits."""

import random

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.errors import ConflictingShardError, LoadError
from fp8_kernels.loading import LayerwiseLoader

from .helpers import Model, assert_quantized, load, values


def known(**weights):
    return {f"{name}.weight": fk.amax(w, "per_tensor") for name, w in weights.items()}


def boxes(num_rows, num_cols):
    """Rectangles that cover a matrix, of rows, of columns and of both, in any order."""
    found = [(r, min(r + 7, num_rows), 0, num_cols) for r in range(0, num_rows // 2, 7)]
    row = found[-1][1]
    found += [(row, num_rows, c, min(c + 13, num_cols)) for c in range(0, num_cols, 13)]
    random.shuffle(found)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_rectangles_in_any_order(dtype):
    """A weight and experts in pieces of any shape: the bits of `quantize` of the whole."""
    fc, experts = values(61, 45, dtype=dtype), values(3, 40, 33, dtype=dtype)

    def fill(params):
        for row0, row1, col0, col1 in boxes(61, 45):
            params["fc.weight"].data[row0:row1, col0:col1].copy_(fc[row0:row1, col0:col1])
        for e in (2, 0, 1):
            for row0, row1, col0, col1 in boxes(40, 33):
                params["experts.weight"].data[e][row0:row1, col0:col1].copy_(experts[e, row0:row1, col0:col1])

    model = Model(dtype=dtype, fc=(61, 45), experts=(3, 40, 33))
    load(model, fill, "per_tensor", amax=known(fc=fc, experts=experts))
    assert_quantized(model, "fc.weight", fc, "per_tensor")
    assert_quantized(model, "experts.weight", experts, "per_tensor")


def test_nothing_waits_for_its_neighbours():
    """Half of each weight, then the other halves, within a budget of two: spills without the maxima, none with them."""
    weights = {f"w{i}": values(64, 128) for i in range(12)}

    def fill(params):
        for rows in (slice(0, 32), slice(32, 64)):
            for name, w in weights.items():
                params[f"{name}.weight"].data[rows].copy_(w[rows])

    budget = 2 * 64 * 128 * 2
    for amax, spills in ((None, True), (known(**weights), False)):
        model = Model(**dict.fromkeys(weights, (64, 128)))
        report = load(model, fill, "per_tensor", amax=amax, staging_budget=budget).report
        assert bool(report.spills) == spills
        for name, w in weights.items():
            assert_quantized(model, f"{name}.weight", w, "per_tensor")


def test_a_rank_has_the_scale_of_the_whole():
    """A half of the rows with the maximum of all: its codes are those rows' of the whole weight's."""
    w = values(32, 48)
    model = Model(fc=(16, 48))
    load(model, lambda params: params["fc.weight"].data.copy_(w[:16]), "per_tensor", amax=known(fc=w))
    q, scale = fk.quantize(w, "per_tensor")
    assert torch.equal(model.fc.weight_scale, scale)
    assert torch.equal(model.fc.weight.view(torch.uint8), q[:16].view(torch.uint8))


def test_a_composed_loader_reads_what_it_wrote():
    """The latest shard stays open, as under other schemes; one that was let go is refused by name, and can be kept."""
    w, other = values(16, 24), values(8, 8)

    def composed(params, between=False):
        p = params["fc.weight"].data
        p.copy_(w)
        if between:
            params["other.weight"].data.copy_(other)
        p.copy_(p * 0.5)
        if not between:
            params["other.weight"].data.copy_(other)

    amax = known(fc=w * 0.5, other=other)
    model = Model(fc=(16, 24), other=(8, 8))
    load(model, composed, "per_tensor", amax=amax)
    assert_quantized(model, "fc.weight", w * 0.5, "per_tensor")
    model = Model(fc=(16, 24), other=(8, 8))
    with pytest.raises(LoadError, match="fc.weight"):
        load(model, lambda params: composed(params, between=True), "per_tensor", amax=amax)


def test_what_arrives_again_is_compared():
    """An equal shard of what is quantized is a duplicate, another one a conflict; while it is open, it is rewritten."""
    w, other = values(16, 24), values(8, 8)

    def fill(last):
        def run(params):
            params["fc.weight"].data[:8].copy_(w[8:])  # wrong, and set right below
            params["other.weight"].data.copy_(other)
            params["fc.weight"].data.copy_(w)
            params["other.weight"].data.copy_(other)
            params["fc.weight"].data[3:5].copy_(last)

        return run

    amax = known(fc=w, other=other)
    model = Model(fc=(16, 24), other=(8, 8))
    report = load(model, fill(w[3:5]), "per_tensor", amax=amax).report
    assert report.duplicates and report.rewrites
    assert_quantized(model, "fc.weight", w, "per_tensor")
    with pytest.raises(ConflictingShardError, match="fc.weight"):
        load(Model(fc=(16, 24), other=(8, 8)), fill(-w[3:5]), "per_tensor", amax=amax)


def test_padding_is_outside_and_other_schemes_do_not_care():
    """A padded weight is staged still, with the scale that it was told; per_channel has scales of its own."""
    w = values(20, 30)
    model = Model(fc=(32, 32))
    options = {"logical_shapes": {"fc.weight": (20, 30)}, "amax": known(fc=w)}
    load(model, lambda params: params["fc.weight"].data[:20, :30].copy_(w), "per_tensor", **options)
    assert_quantized(model, "fc.weight", torch.nn.functional.pad(w, (0, 2, 0, 12)), "per_tensor")
    model = Model(fc=(20, 30))
    load(model, lambda params: params["fc.weight"].data.copy_(w), "per_channel", amax=known(fc=w))
    assert_quantized(model, "fc.weight", w, "per_channel")


def test_codes_with_a_scale_of_their_own_are_quantized_again():
    """FP8 data for a weight whose scale is told: the values of the codes, with that scale."""
    w = values(16, 24)
    q, scale = fk.quantize(w, "per_tensor")
    model = Model(fc=(16, 24))
    amax = {"fc.weight": 2 * fk.amax(w, "per_tensor")}
    with LayerwiseLoader(model, "per_tensor", device="cpu", amax=amax) as loader:
        loader.copy_codes(model.fc.weight, q, scale)
    wanted, wanted_scale = fk.quantize(
        fk.dequantize(q, scale, torch.float32), "per_tensor", amax=amax["fc.weight"], dtype=q.dtype
    )
    assert torch.equal(model.fc.weight_scale, wanted_scale) and not torch.equal(wanted_scale, scale)
    assert torch.equal(model.fc.weight.view(torch.uint8), wanted.view(torch.uint8))


def test_what_is_no_maximum_is_refused():
    """Of nothing, of another shape, or no finite number: the message names the tensor and what it has to be."""
    model = Model(fc=(16, 24), experts=(3, 8, 8))
    for amax, match in (
        ({"fcc.weight": torch.tensor(1.0)}, "'fcc.weight'"),
        ({"experts.weight": torch.tensor(1.0)}, r"`experts.weight` must be float32 of shape \(3,\), got torch.float32"),
        ({"fc.weight": torch.ones((), dtype=torch.bfloat16)}, r"`fc.weight` must be .* got torch.bfloat16"),
        ({"fc.weight": 1.0}, "got 1.0"),
        ({"fc.weight": torch.tensor(-1.0)}, r"`fc.weight` must be finite and no less than 0, got -1.0"),
        (
            {"experts.weight": torch.tensor([1.0, float("nan"), 2.0])},
            "`experts.weight` must be finite .* nan",
        ),
        ({"fc.weight": torch.tensor(float("inf"))}, "got inf"),
    ):
        with pytest.raises(ValueError, match=match):
            _ = LayerwiseLoader(model, "per_tensor", device="cpu", amax=amax).plan
