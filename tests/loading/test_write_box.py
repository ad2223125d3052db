"""Shards that are handed to the session past the mode: what `copy_` into the same view does, errors included."""

import pytest
import torch

from fp8_kernels.errors import ConflictingShardError, IncompleteLoadError, LoadError
from fp8_kernels.loading import LayerwiseLoader

from .helpers import SCHEMES, Model, assert_quantized, values


def _model():
    return Model(fc=(260, 96), experts=(3, 130, 96), norm=(7,), conv=(2, 3, 4, 5))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("inside", ["thread", "mode"])
def test_shards_of_every_kind(scheme, inside):
    """Halves, column parts, whole experts, other dtypes, duplicates, what passes through: the bytes of quantizing the
    whole, in a thread that has no mode and in one that has."""
    model, w, experts = _model(), values(260, 96), values(3, 130, 96)
    norm, conv = values(7), values(2, 3, 4, 5)

    def write(box):
        box("fc.weight", None, (128, 260, 0, 96), w[128:])
        box("experts.weight", 2, None, experts[2])
        box("experts.weight", 0, (0, 130, 64, 96), experts[0, :, 64:])
        box("fc.weight", None, (0, 128, 0, 96), w[:128])
        box("norm.weight", None, None, norm)
        box("experts.weight", 0, (0, 130, 0, 64), experts[0, :, :64])
        box("conv.weight", None, None, conv)
        box("experts.weight", 1, None, experts[1].float())
        box("experts.weight", 2, (1, 9, 0, 96), experts[2, 1:9])

    loader = LayerwiseLoader(model, scheme, device="cpu")
    with loader:
        if inside == "mode":
            write(loader._session.write_box)
        else:
            loader._session.stop()
            write(loader._session.write_box)
            loader._session.writes.let_go()
    assert_quantized(model, "fc.weight", w, scheme)
    assert_quantized(model, "experts.weight", experts, scheme)
    assert torch.equal(model.norm.weight, norm) and torch.equal(model.conv.weight, conv)
    assert loader.report.duplicates == ["experts.weight[2] rows 1:9 of 130, all columns"]
    assert loader.report.shards == 9


_REFUSED = {
    "another shape": (("fc.weight", None, (0, 64, 0, 96)), lambda w: w[:63], r"shard for \(64, 96\) of `fc.weight`"),
    "below the end": (("fc.weight", None, (0, 261, 0, 96)), lambda w: w, r"\(0, 261, 0, 96\) is not in `fc.weight`"),
    "above the start": (("fc.weight", None, (-4, 4, 0, 96)), lambda w: w[:8], "is not in `fc.weight`"),
    "no such expert": (("experts.weight", 3, None), lambda w: w[:130], "`experts.weight` has 3 experts, got number 3"),
    "expert -1": (("experts.weight", -1, None), lambda w: w[:130], "has 3 experts, got number -1"),
    "no matrix": (("norm.weight", None, (0, 7, 0, 1)), lambda w: w[:7, :1], "is not in `norm.weight`"),
    "integers": (("fc.weight", None, None), lambda w: w.int(), "floating-point data, got torch.int32"),
    "meta": (("fc.weight", None, None), lambda w: torch.empty_like(w, device="meta"), "holds no data to load"),
}


@pytest.mark.parametrize("kind", _REFUSED)
def test_what_is_no_shard_is_refused_by_name(kind):
    """A shape, place or dtype that does not fit raises before anything is written, and the model is as it was."""
    model, (place, make, message) = _model(), _REFUSED[kind]
    loader, shard = LayerwiseLoader(model, device="cpu"), make(values(260, 96))
    with pytest.raises(LoadError, match=message), loader:
        loader._session.write_box(*place, shard)
    assert all(p.is_meta for p in model.parameters())


def test_coverage_is_exact():
    """A hole is reported by rows and columns, a second value that differs is refused."""
    model, w = Model(fc=(260, 96), fc2=(3, 5)), values(260, 96)
    loader = LayerwiseLoader(model, device="cpu")
    with pytest.raises(IncompleteLoadError, match="fc.weight: rows 100:101 of 260, columns 50:96 of 96"), loader:
        box = loader._session.write_box
        box("fc.weight", None, (0, 100, 0, 96), w[:100])
        box("fc.weight", None, (101, 260, 0, 96), w[101:])
        box("fc.weight", None, (100, 101, 0, 50), w[100:101, :50])
        box("fc2.weight", None, None, values(3, 5))
    loader = LayerwiseLoader(model, device="cpu")
    with pytest.raises(ConflictingShardError, match="fc.weight rows 3:4"), loader:
        box = loader._session.write_box
        box("fc.weight", None, None, w)
        box("fc2.weight", None, None, values(3, 5))
        box("fc.weight", None, (3, 4, 0, 96), w[3:4] * 2)
