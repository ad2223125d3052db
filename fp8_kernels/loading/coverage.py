"""Exactly which elements of a unit have been written.

A unit is a matrix `[rows, columns]`. What was written is kept as *bands*: runs of rows that have the same
columns written, disjoint, sorted and maximal, so shards that arrive in order stay one band. A region that is
no rectangle (strided rows, an index list, a mask) turns the whole record into one boolean per element, which
is as exact and merely larger. Neither ever counts writes: what was written twice is there once.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

import torch

Box = tuple[int, int, int, int]  # rows from, to, columns from, to


class Region:
    """A view of a matrix.

    Attributes:
        offset, sizes, strides: in elements of the matrix.
        boxes: the rectangles that it is made of; None if it is not made of a few.
    """

    __slots__ = ("offset", "sizes", "strides", "boxes")

    def __init__(self, shape: tuple[int, int], offset: int, sizes, strides):
        self.offset, self.sizes, self.strides = offset, sizes, strides
        self.boxes = boxes_of(shape, offset, sizes, strides)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The view of that contiguous matrix."""
        return matrix.as_strided(self.sizes, self.strides, matrix.storage_offset() + self.offset)


class Coverage:
    """The written part of a unit of `rows x columns`, of which only the `logical` corner has to be written.

    Args:
        shape: (rows, columns) in memory.
        logical: (rows, columns) that a checkpoint holds; the rest is padding. By default all.
        device: of the boolean mask, if one is ever needed.
    """

    def __init__(self, shape: tuple[int, int], logical: tuple[int, int] | None = None, device="cpu"):
        self.shape = shape
        self.logical = logical or shape
        self.device = device
        self._bands: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
        self._covered = 0
        self._mask: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        """Has every logical element been written?"""
        if self._mask is not None:
            return bool(self._logical_mask().all())
        return self._covered == self.logical[0] * self.logical[1]

    @property
    def empty(self) -> bool:
        """Has no logical element been written?"""
        return not bool(self._logical_mask().any()) if self._mask is not None else not self._covered

    def add_box(self, box: Box):
        """Mark a rectangle as written."""
        row0, row1, col0, col1 = box
        num_rows, num_cols = self.logical
        if row1 > num_rows or col1 > num_cols:
            row1, col1 = min(row1, num_rows), min(col1, num_cols)
        if row0 >= row1 or col0 >= col1:
            return
        if self._mask is not None:
            self._mask[row0:row1, col0:col1] = True
            return
        bands, columns = self._bands, ((col0, col1),)
        if not bands:
            bands.append((row0, row1, columns))
            self._covered = (row1 - row0) * (col1 - col0)
            return
        if bands[-1][1] == row0 and bands[-1][2] == columns:  # the next shard in order
            bands[-1] = bands[-1][0], row1, columns
            self._covered += (row1 - row0) * (col1 - col0)
            return
        first, last = self._between(row0, row1)
        new, row = [], row0
        for start, end, columns in bands[first:last]:
            if start < row0:
                new.append((start, row0, columns))
                start = row0
            if row < start:
                new.append((row, start, ((col0, col1),)))
            row = min(end, row1)
            new.append((start, row, _union(columns, col0, col1)))
            if end > row1:
                new.append((row1, end, columns))
        if row < row1:
            new.append((row, row1, ((col0, col1),)))
        low, high = max(first - 1, 0), min(last + 1, len(bands))  # with the neighbours, which may now merge
        merged = _merge([*bands[low:first], *new, *bands[last:high]])
        self._covered += _area(merged) - _area(bands[low:high])
        bands[low:high] = merged

    def add(self, region: Region):
        """Mark every element of a view as written."""
        if region.boxes is None:
            region.of(self.mask()).fill_(True)
            self._forget_padding()
        else:
            for box in region.boxes:
                self.add_box(box)

    def add_mask(self, written: torch.Tensor):
        """Mark the elements where `written` (bool, of the unit's shape) is true."""
        self.mask().logical_or_(written)
        self._forget_padding()

    def overlap(self, region: Region) -> int:
        """How many logical elements of a view have been written already."""
        if region.boxes is None or self._mask is not None:
            return int(region.of(self.mask()).sum()) if self._bands or self._mask is not None else 0
        return sum(map(self.overlap_box, region.boxes))

    def overlap_box(self, box: Box) -> int:
        """How many logical elements of a rectangle have been written already."""
        if self._mask is None and (not self._bands or self._bands[-1][1] <= box[0]):  # the next shard in order
            return 0
        row0, row1, col0, col1 = self._clip(box)
        if self._mask is not None:
            return int(self._mask[row0:row1, col0:col1].sum())
        count = 0
        first, last = self._between(row0, row1)
        for start, end, columns in self._bands[first:last]:
            width = sum(max(min(b, col1) - max(a, col0), 0) for a, b in columns)
            count += (min(end, row1) - max(start, row0)) * width
        return count

    def missing(self, box: Box | None = None) -> list[Box]:
        """The logical rectangles, of those in `box`, that have not been written, from the top, disjoint."""
        num_rows, num_cols = self.logical
        gaps, row = [], 0
        for start, end, columns in [*self._as_bands(), (num_rows, num_rows, ())]:
            if row < start and num_cols:
                gaps.append((row, start, 0, num_cols))
            if start < end:
                gaps += [(start, end, *gap) for gap in _complement(columns, num_cols)]
            row = end
        return gaps if box is None else _within(gaps, box)

    def written(self, box: Box | None = None) -> list[Box]:
        """The rectangles, of those in `box`, that have been written, from the top, disjoint."""
        boxes = [(start, end, *interval) for start, end, columns in self._as_bands() for interval in columns]
        return boxes if box is None else _within(boxes, box)

    def mask(self) -> torch.Tensor:
        """Bool `[rows, columns]`; from now on it is the record."""
        self._mask = self.as_mask()
        return self._mask

    def as_mask(self) -> torch.Tensor:
        """Bool `[rows, columns]`: what has been written. Not to be changed."""
        if self._mask is not None:
            return self._mask
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        for start, end, columns in self._bands:
            for col0, col1 in columns:
                mask[start:end, col0:col1] = True
        return mask

    def _forget_padding(self):
        self._mask[self.logical[0] :] = False
        self._mask[:, self.logical[1] :] = False

    def _logical_mask(self):
        return self._mask[: self.logical[0], : self.logical[1]]

    def _clip(self, box):
        row0, row1, col0, col1 = box
        return row0, min(row1, self.logical[0]), col0, min(col1, self.logical[1])

    def _between(self, row0, row1):
        """The bands [first, last) that have rows in row0:row1."""
        if not self._bands or self._bands[-1][1] <= row0:
            return len(self._bands), len(self._bands)
        return bisect_right(self._bands, row0, key=lambda b: b[1]), bisect_left(self._bands, row1, key=lambda b: b[0])

    def _as_bands(self):
        if self._mask is None:
            return self._bands
        mask = self._logical_mask().cpu()
        if not mask.numel():
            return []
        changes = (mask[1:] != mask[:-1]).any(dim=1).nonzero().flatten() + 1
        edges = [0, *changes.tolist(), len(mask)]
        return [(a, b, _runs(mask[a])) for a, b in zip(edges, edges[1:], strict=False)]


def boxes_of(shape: tuple[int, int], offset: int, sizes, strides) -> list[Box] | None:
    """The rectangles of a `[rows, columns]` matrix that a view of it is made of; None if it is not of a few.

    Raises:
        IndexError: the view reaches beyond the matrix.
    """
    num_rows, num_cols = shape
    dims = canonical(sizes, strides)
    if dims is None:
        return []
    last = offset + sum((size - 1) * stride for size, stride in dims)
    if offset < 0 or last >= num_rows * num_cols:
        raise IndexError(f"a view of elements {offset}..{last} is not inside {num_rows} x {num_cols}")
    row, col = divmod(offset, num_cols)
    if not dims:
        return [(row, row + 1, col, col + 1)]
    (size, stride), *inner = dims
    if not inner and stride == 1:
        return _boxes_of_run(num_cols, offset, size)
    if stride == num_cols and not inner:
        return [(row, row + size, col, col + 1)]
    if stride == num_cols and len(inner) == 1 and inner[0][1] == 1 and col + inner[0][0] <= num_cols:
        return [(row, row + size, col, col + inner[0][0])]
    return None


def canonical(sizes, strides) -> list[tuple[int, int]] | None:
    """A view's dimensions as (size, stride), widest stride first, merged where contiguous; None if it is empty.

    Transposed, reshaped and sliced views of the same elements have the same form.
    """
    if len(sizes) == 2 and strides[1] == 1 and sizes[1] > 1 < sizes[0] and sizes[1] < strides[0]:
        return [(sizes[0], strides[0]), (sizes[1], 1)]  # rows of a matrix, the usual case
    dims: list[tuple[int, int]] = []
    for stride, size in sorted(zip(strides, sizes, strict=True), reverse=True):
        if size == 0:
            return None
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def _boxes_of_run(num_cols, offset, size):
    """Neighbouring elements: the end of a row, whole rows, the start of a row."""
    row, col = divmod(offset, num_cols)
    if col + size <= num_cols:
        return [(row, row + 1, col, col + size)]
    boxes = []
    if col:
        boxes.append((row, row + 1, col, num_cols))
        size -= num_cols - col
        row += 1
    if size >= num_cols:
        boxes.append((row, row + size // num_cols, 0, num_cols))
        row += size // num_cols
    if size % num_cols:
        boxes.append((row, row + 1, 0, size % num_cols))
    return boxes


def _within(boxes, box):
    """What of the rectangles is in that one."""
    row0, row1, col0, col1 = box
    parts = ((max(a, row0), min(b, row1), max(c, col0), min(d, col1)) for a, b, c, d in boxes)
    return [part for part in parts if part[0] < part[1] and part[2] < part[3]]


def _union(columns, col0, col1):
    """Disjoint sorted intervals, with one more."""
    kept = []
    for start, end in columns:
        if end < col0 or start > col1:
            kept.append((start, end))
        else:
            col0, col1 = min(col0, start), max(col1, end)
    return tuple(sorted([*kept, (col0, col1)]))


def _complement(columns, num_cols):
    edges = [0, *(edge for interval in columns for edge in interval), num_cols]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _merge(bands):
    """Neighbouring bands with the same columns as one."""
    merged = []
    for band in bands:
        if merged and merged[-1][1] == band[0] and merged[-1][2] == band[2]:
            merged[-1] = (merged[-1][0], band[1], band[2])
        else:
            merged.append(band)
    return merged


def _area(bands):
    return sum((end - start) * sum(b - a for a, b in columns) for start, end, columns in bands)


def _runs(row):
    """The true intervals of a 1-D bool tensor."""
    padded = torch.nn.functional.pad(row.to(torch.int8), (1, 1))
    starts = (padded.diff() == 1).nonzero().flatten().tolist()
    ends = (padded.diff() == -1).nonzero().flatten().tolist()
    return tuple(zip(starts, ends, strict=True))
