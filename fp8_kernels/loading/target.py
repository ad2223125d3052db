"""A tensor argument that belongs to a tracked parameter: which elements of which units it means."""

from __future__ import annotations

import torch

from ..errors import ConflictingShardError, LoadError
from .coverage import Box, Region, canonical
from .staging import Tracked
from .unit import Unit


class Target:
    """A tensor argument whose storage is tracked.

    Attributes:
        tensor: the argument; on meta, or the tensor itself where it passes through.
        written: does the op write it?
        units: those it has elements in, after `locate`; none if it has no elements.
        region: its elements in the unit, where it is one.
        offset, sizes, strides: the view in elements of the parameter, from the start of its first unit.
    """

    __slots__ = ("tensor", "tracked", "itemsize", "written", "units", "region", "offset", "sizes", "strides", "first")

    def __init__(self, tensor: torch.Tensor, tracked: Tracked, itemsize: int, written: bool):
        self.tensor, self.tracked, self.itemsize, self.written = tensor, tracked, itemsize, written

    def locate(self):
        """Find the elements.

        Raises:
            LoadError: the view cuts elements in two, or reaches beyond the parameter.
        """
        offset, self.sizes, self.strides = self.tracked.region(self.tensor, self.itemsize)
        dims, numel, units = canonical(self.sizes, self.strides), self.tracked.unit_numel, self.tracked.units
        self.offset, self.first, self.units, self.region = 0, 0, [], None
        if dims is None or not numel:
            return
        end = offset + sum((size - 1) * stride for size, stride in dims)
        if offset < 0 or end >= numel * len(units):
            raise LoadError(f"a view of elements {offset}..{end} is not inside `{self.tracked.entry.name}`")
        self.first, last = offset // numel, end // numel
        self.offset = offset - self.first * numel
        self.units = units[self.first : last + 1]
        if self.first == last:
            self.region = Region(self.tracked.unit_shape, self.offset, self.sizes, self.strides)

    def meets(self, box: Box) -> bool:
        """May the view have an element of that rectangle of its units?"""
        if self.region is not None:
            boxes = self.region.boxes
        else:
            found = self.rectangle()
            boxes = found and [found[0]]
        return boxes is None or any(a[0] < box[1] and box[0] < a[1] and a[2] < box[3] and box[2] < a[3] for a in boxes)

    def rectangle(self) -> tuple[Box, tuple[int, ...]] | None:
        """The view as one rectangle, the same one in each of its units: the rectangle, and the view's strides in a
        contiguous `[units, rows, columns]` of only that. None where it is not of that form."""
        num_cols, numel, count = self.tracked.unit_shape[1], self.tracked.unit_numel, len(self.units)
        sizes, strides, region = self.sizes, self.strides, self.region
        if count > 1:
            if canonical(sizes, strides) == [(count * numel, 1)] and not self.offset:
                return (0, numel // num_cols, 0, num_cols), strides
            dim = next((d for d, n in enumerate(sizes) if n == count and strides[d] == numel), None)
            if dim is None:
                return None
            inner = sizes[:dim] + sizes[dim + 1 :], strides[:dim] + strides[dim + 1 :]
            if self.offset + sum((n - 1) * s for n, s in zip(*inner, strict=True)) >= numel:
                return None
            region = Region(self.tracked.unit_shape, self.offset, *inner)
        if region is None or region.boxes is None or len(region.boxes) != 1:
            return None
        (box,) = region.boxes
        num_rows, width = box[1] - box[0], box[3] - box[2]
        if width != num_cols:
            strides = tuple(s // num_cols * width if s % num_cols == 0 else s for s in strides)
        if count > 1:
            strides = (*strides[:dim], num_rows * width, *strides[dim + 1 :])
        return box, strides

    @property
    def in_elements(self) -> bool:
        """Does the caller see the parameter's own elements (and not their bytes, say)?"""
        return self.tensor.dtype == self.tracked.entry.dtype or (
            self.tracked.installed and self.tensor.dtype == self.tracked.entry.fp8_dtype
        )

    @property
    def tied(self) -> bool:
        """Has the parameter several names?"""
        return len(self.tracked.entry.places) > 1

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The same view of real memory that begins where the first unit does."""
        entry, t = self.tracked.entry, self.tensor
        if not entry.scheme:
            return t
        if self.in_elements:
            return buffer.as_strided(self.sizes, self.strides, buffer.storage_offset() + self.offset)
        if buffer.dtype != entry.dtype:
            raise LoadError(
                f"`{entry.name}` is held in {buffer.dtype}, as its data arrived, and cannot be seen as {t.dtype}: copy "
                f"its data as {entry.dtype}, or without changing the parameter's dtype"
            )
        offset = (buffer.storage_offset() + self.offset) * buffer.element_size()
        if offset % t.element_size():
            raise LoadError(f"`{entry.name}` cannot be seen as {t.dtype} from byte {offset} on")
        flat = torch.empty(0, dtype=t.dtype, device=buffer.device)
        return flat.set_(buffer.untyped_storage(), offset // t.element_size(), t.shape, t.stride())

    def __str__(self):
        """Where it is, in the model's names."""
        if self.region is None:
            return f"{self.tracked.entry.name}[{self.first}:{self.first + len(self.units)}]"
        unit: Unit = self.units[0]
        if self.region.boxes is None:
            return f"{unit}, a part"
        if self.region.boxes == [(0, unit.shape[0], 0, unit.shape[1])]:
            return str(unit)
        return f"{unit} {'; '.join(describe(box, unit.shape) for box in self.region.boxes)}"


def describe(box: Box, shape: tuple[int, int]) -> str:
    """A rectangle of a matrix, for people."""
    row0, row1, col0, col1 = box
    rows = "all rows" if (row0, row1) == (0, shape[0]) else f"rows {row0}:{row1} of {shape[0]}"
    columns = "all columns" if (col0, col1) == (0, shape[1]) else f"columns {col0}:{col1} of {shape[1]}"
    return f"{rows}, {columns}"


def streamed_error(target: Target, unit: Unit, what: str) -> LoadError:
    """What of a unit is quantized already cannot be what an op needs."""
    return LoadError(
        f"{target} {what}: it is quantized already, as it arrived. For a loader that needs that, name the weight: "
        f"`stream={{{unit.name!r}: False}}`"
    )


def tied_conflict(target: Target) -> ConflictingShardError:
    """One tensor under several names was given several values."""
    names = ", ".join(f"`{name}`" for name in target.tracked.entry.names)
    return ConflictingShardError(f"{target}: other values arrived before; it is one tensor under the names {names}")
