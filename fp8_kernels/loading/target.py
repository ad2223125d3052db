"""A tensor argument that belongs to a tracked parameter: which elements of which units it means."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import LoadError
from .coverage import boxes_of, canonical
from .staging import Tracked, Unit


@dataclass(eq=False)
class Target:
    """A tensor argument whose storage is tracked."""

    tensor: torch.Tensor
    tracked: Tracked
    itemsize: int
    written: bool

    def locate(self):
        """Find the region, and the units [first, last] it lies in; none if the region is empty."""
        self.offset, self.sizes, self.strides = self.tracked.region(self.tensor, self.itemsize)
        dims = canonical(self.sizes, self.strides)
        numel = self.tracked.unit_numel
        if dims is None or not numel:
            self.first, self.last = 0, -1
            return self
        end = self.offset + sum((size - 1) * stride for size, stride in dims)
        self.first, self.last = self.offset // numel, end // numel
        if self.offset < 0 or self.last >= len(self.tracked.units):
            raise LoadError(f"a write of elements {self.offset}..{end} is not inside `{self.tracked.entry.name}`")
        self.offset -= self.first * numel
        return self

    @property
    def units(self) -> list[Unit]:
        return self.tracked.units[self.first : self.last + 1]

    @property
    def in_elements(self) -> bool:
        """Does the caller see the parameter's own elements (and not their bytes, say)?"""
        return self.tensor.dtype == self.tracked.entry.dtype or (
            self.tracked.installed and self.tensor.dtype == self.tracked.entry.fp8_dtype
        )

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The same view of real memory that begins where the first unit does."""
        if not self.tracked.entry.scheme:
            return self.tensor
        if self.in_elements:
            return buffer.as_strided(self.sizes, self.strides, self.offset)
        name, t = self.tracked.entry.name, self.tensor
        if buffer.dtype != self.tracked.entry.dtype:
            raise LoadError(
                f"`{name}` is held in {buffer.dtype}, as its data arrived, and cannot be seen as {t.dtype}: copy its "
                f"data as {self.tracked.entry.dtype}, or without changing the parameter's dtype"
            )
        offset = self.offset * buffer.element_size()
        if offset % t.element_size():
            raise LoadError(f"`{name}` cannot be seen as {t.dtype} from byte {offset} on")
        flat = torch.empty(0, dtype=t.dtype, device=buffer.device)
        return flat.set_(buffer.untyped_storage(), offset // t.element_size(), t.shape, t.stride())

    def __str__(self):
        """Where it is, in the model's names."""
        if self.first != self.last:
            return f"{self.tracked.entry.name}[{self.first}:{self.last + 1}]"
        unit = self.tracked.units[self.first]
        boxes = boxes_of(unit.shape, self.offset, self.sizes, self.strides)
        if boxes is None:
            return f"{unit}, a part"
        if boxes == [(0, unit.shape[0], 0, unit.shape[1])]:
            return str(unit)
        return f"{unit} {'; '.join(describe(box, unit.shape) for box in boxes)}"


def describe(box, shape) -> str:
    """A rectangle of a matrix, for people."""
    row0, row1, col0, col1 = box
    rows = "all rows" if (row0, row1) == (0, shape[0]) else f"rows {row0}:{row1} of {shape[0]}"
    columns = "all columns" if (col0, col1) == (0, shape[1]) else f"columns {col0}:{col1} of {shape[1]}"
    return f"{rows}, {columns}"
