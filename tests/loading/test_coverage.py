"""Coverage against an oracle that cannot be wrong: one boolean per element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8_kernels.loading.coverage import Coverage, Region, boxes_of, canonical

SIDES = st.integers(1, 9)


@st.composite
def views(draw):
    """A matrix's shape and a chain of views of it, as an engine would make one: narrow, step, transpose, flatten."""
    shape = draw(st.tuples(SIDES, SIDES))
    matrix = torch.zeros(shape, dtype=torch.bool)
    view = matrix
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["narrow", "narrow", "step", "t", "flat", "select"]))
        if kind == "t" and view.ndim == 2:
            view = view.t()
        elif kind == "flat" and view.is_contiguous():
            view = view.view(-1)
        elif view.ndim and kind in ("narrow", "step", "select"):
            dim = draw(st.integers(0, view.ndim - 1))
            if kind == "select" and view.size(dim):
                view = view.select(dim, draw(st.integers(0, view.size(dim) - 1)))
            else:
                start = draw(st.integers(0, view.size(dim)))
                end = draw(st.integers(start, view.size(dim)))
                index = [slice(None)] * view.ndim
                index[dim] = slice(start, end, 2 if kind == "step" else 1)
                view = view[tuple(index)]
    return shape, (view.storage_offset(), view.shape, view.stride())


@st.composite
def loads(draw):
    """A unit's shape, its logical shape, and boxes that arrive, some of them crossing into the padding."""
    rows, cols = draw(SIDES), draw(SIDES)
    logical = draw(st.integers(0, rows)), draw(st.integers(0, cols))
    boxes = []
    for _ in range(draw(st.integers(0, 12))):
        row0, col0 = draw(st.integers(0, rows)), draw(st.integers(0, cols))
        boxes.append((row0, draw(st.integers(row0, rows)), col0, draw(st.integers(col0, cols))))
    return (rows, cols), logical, boxes


def _paint(mask, box):
    row0, row1, col0, col1 = box
    mask[row0:row1, col0:col1] = True


@given(loads(), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_boxes_equal_the_mask_oracle(load, masked_from):
    """Any boxes in any order: complete, empty and missing are what one boolean per element says, also when
    the record turns into a mask half-way."""
    shape, logical, boxes = load
    coverage, oracle = Coverage(shape, logical), torch.zeros(shape, dtype=torch.bool)
    for i, box in enumerate(boxes):
        if i == masked_from:
            coverage.mask()
        region = torch.zeros(shape)[box[0] : box[1], box[2] : box[3]]
        seen = oracle[: logical[0], : logical[1]][box[0] : box[1], box[2] : box[3]].sum()
        assert coverage.overlap(Region(shape, region.storage_offset(), region.shape, region.stride())) == seen
        coverage.add_box(box)
        _paint(oracle, box)
        wanted = oracle[: logical[0], : logical[1]]
        assert coverage.complete == bool(wanted.all())
        assert coverage.empty == (not wanted.any())
        missing = torch.zeros(logical, dtype=torch.int32)
        for row0, row1, col0, col1 in coverage.missing():
            missing[row0:row1, col0:col1] += 1
        assert torch.equal(missing, (~wanted).int())  # exactly, and each element once


@given(views())
@settings(max_examples=300, deadline=None)
def test_a_view_marks_exactly_its_elements(case):
    """Sliced, strided, transposed and flattened views mark the elements that they alias, and no others."""
    shape, (offset, sizes, strides) = case
    oracle = torch.zeros(shape, dtype=torch.bool)
    oracle.as_strided(sizes, strides, offset).fill_(True)
    coverage = Coverage(shape)
    assert coverage.overlap(Region(shape, offset, sizes, strides)) == 0
    coverage.add(Region(shape, offset, sizes, strides))
    assert torch.equal(coverage.mask(), oracle)
    assert coverage.overlap(Region(shape, offset, sizes, strides)) == oracle.sum()
    boxes = boxes_of(shape, offset, sizes, strides)
    if boxes is not None:
        painted = torch.zeros(shape, dtype=torch.bool)
        for box in boxes:
            _paint(painted, box)
        assert torch.equal(painted, oracle)


def test_padding_is_not_covered_by_any_kind_of_write():
    """Boxes, strided rows and masks that reach into the padding leave it out, so what overlaps counts logical
    elements only."""
    everything = Region((6, 8), 0, (6, 8), (8, 1))
    by_box, by_stride, by_mask = (Coverage((6, 8), (4, 5)) for _ in range(3))
    by_box.add(everything)
    for start in (0, 8):
        by_stride.add(Region((6, 8), start, (3, 8), (16, 1)))
    by_mask.add_mask(torch.ones(6, 8, dtype=torch.bool))
    for coverage in (by_box, by_stride, by_mask):
        assert coverage.complete and coverage.overlap(everything) == 20


def test_shards_in_order_stay_one_band():
    """The cost of a shard does not grow with the shards before it."""
    coverage = Coverage((4096, 576))
    for row in range(0, 4096, 2):
        coverage.add_box((row, row + 2, 0, 576))
        assert len(coverage._bands) == 1
    assert coverage.complete


def test_columns_then_rows_merge():
    """Column shards of all rows complete a unit, and a gap between them is named."""
    coverage = Coverage((7, 10))
    coverage.add_box((0, 7, 0, 4))
    coverage.add_box((0, 7, 6, 10))
    assert coverage.missing() == [(0, 7, 4, 6)]
    coverage.add_box((0, 7, 4, 6))
    assert coverage.complete and coverage.missing() == []


def test_transposed_and_flat_views_have_one_form():
    """The same elements seen as `[N, K]`, `[K, N]` or flat are recognised as the same box."""
    t = torch.empty(7, 576)
    forms = {tuple(canonical(v.shape, v.stride())) for v in (t, t.t(), t.view(-1), t.view(7, 2, 288))}
    assert forms == {((7 * 576, 1),)}


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_zero_size_is_complete_from_the_start(shape):
    """Nothing to write means nothing is missing."""
    coverage = Coverage(shape)
    assert coverage.complete and coverage.missing() == []
    coverage.add(Region(shape, 0, shape, (max(shape[1], 1), 1)))
    assert coverage.complete


def test_a_view_beyond_the_unit_is_refused():
    """A region that reaches past the last element is an error and not a crash or a clamp."""
    with pytest.raises(IndexError, match="not inside 3 x 5"):
        boxes_of((3, 5), 10, (2, 5), (5, 1))
