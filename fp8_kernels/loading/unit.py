"""Units, and the shards of them that threads hold open.

A *unit* is what has scales of its own: a weight `[N, K]`, or one expert of `[E, N, K]`. Where its scheme has several
groups a unit, those that arrived whole are quantized before the unit is complete (*streamed*), and its buffer holds
only what is left. A pass-through tensor is tracked as one unit that is never quantized, whose buffer is the tensor
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ..ops import amax
from ..schemes import Scheme
from .arena import Arena, Staging
from .compare import same_codes
from .coverage import Box, Coverage

if TYPE_CHECKING:
    from .staging import Tracked


class Shard:
    """Data that has arrived and waits, held open by its thread: one rectangle of neighbouring units.

    Attributes:
        tracked, first, units: which ones.
        box: which rectangle of each.
        buffer: `[count, rows, columns]`.
        room: the rectangle that the buffer has place for: `box`, or the whole of one unit, where what arrives next to
            `box` joins it.
    """

    __slots__ = ("box", "buffer", "first", "room", "tracked", "units")

    def __init__(
        self,
        tracked: Tracked,
        first: int,
        units: Sequence[Unit],
        box: Box,
        buffer: torch.Tensor,
        room: Box | None = None,
    ):
        self.tracked, self.first, self.units, self.box, self.buffer = tracked, first, units, box, buffer
        self.room = room or box

    @property
    def is_whole(self) -> bool:
        """Is it all of one unit?"""
        return len(self.units) == 1 and self.box == self.tracked.unit_box

    @property
    def values(self) -> torch.Tensor:
        """What has arrived, `[count, rows, columns]`."""
        if self.room == self.box:
            return self.buffer
        row0, row1, col0, col1 = self.box
        return self.buffer[:, row0 - self.room[0] : row1 - self.room[0], col0 - self.room[2] : col1 - self.room[2]]

    def with_next(self, box: Box, dtype: torch.dtype) -> Box | None:
        """The rectangle that this and one next to it, of the same unit, are together, if there is room for that."""
        mine = self.box
        if self.room == mine or self.buffer.dtype is not dtype:
            return None
        if mine[1] == box[0] and mine[2:] == box[2:]:
            return mine[0], box[1], mine[2], mine[3]
        if box[1] == mine[0] and mine[2:] == box[2:]:
            return box[0], mine[1], mine[2], mine[3]
        return None


class Unit:
    """One unit of a tracked tensor; passed to `on_unit`.

    Attributes:
        name: of the parameter.
        index: of the expert; None for a weight of two dimensions.
        shape: (N, K), padding included.
        scheme: None for pass-through.
        dtype: what its high-precision values are held in.
        final: quantized (or, for pass-through, fully written).
        coverage: what was written.
        streamed: what of it is quantized already, in whole groups; None if nothing is.
        shards: what of it threads hold open.
        maximum: fp32, of all that was written, where that is known.
        spilled: what waits on the host, as (rectangle, data), instead of in a buffer.
    """

    def __init__(self, tracked: Tracked, number: int, staging: Staging):
        entry = tracked.entry
        self.tracked = tracked
        self.number = number
        self.index = number if entry.scheme and len(entry.shape) == 3 else None
        self.shape = tracked.unit_shape
        self.coverage = Coverage(self.shape, tracked.unit_logical, staging.device)
        self.streamed: Coverage | None = None
        self.shards: list[Shard] = []
        self.buffer: torch.Tensor | None = None
        self.spilled: list[tuple[Box, torch.Tensor]] | None = None
        self.maximum: torch.Tensor | None = None
        self.final = False
        self.read_since_write = False
        self._staging = staging
        self.dtype = entry.dtype
        self._gaps_are_zero = False

    @property
    def name(self) -> str:
        return self.tracked.entry.name

    @property
    def scheme(self) -> Scheme | None:
        return self.tracked.entry.scheme

    @property
    def has_arrived(self) -> bool:
        """Is every element of it written, or quantized already?"""
        return self.final or self.coverage.complete

    def __str__(self):
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    def dtype_for(self, dtype: torch.dtype | None = None) -> torch.dtype:
        """What the unit has to be held in so that `dtype` is not rounded.

        Quantizing rounds once, from what the checkpoint held, so fp32 data for a bf16 parameter waits in fp32.
        """
        if dtype is self.dtype and dtype is not torch.float64:
            return dtype
        wanted = self.dtype if dtype is None else torch.promote_types(self.dtype, dtype)
        return torch.float32 if wanted == torch.float64 else wanted

    def open(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The buffer, wide enough to hold `dtype`; what waited on the host is back in it."""
        wanted, staging = self.dtype_for(dtype), self._staging
        if self.buffer is None:
            self.buffer = staging.empty(self.shape, wanted)
            staging.opened(self)
            if self.spilled is not None:
                staging.restore(self, self.buffer)
        elif self.buffer.dtype != wanted:
            wider = staging.empty(self.shape, wanted).copy_(self.buffer)
            staging.release(self.buffer)
            self.buffer = wider
        self.dtype = wanted
        return self.buffer

    def keep(self, shard: Shard) -> bool:
        """Move a shard that a thread held open into the buffer; returns whether its memory has become the buffer."""
        i, dtype = self.number - shard.first, shard.buffer.dtype
        fits = len(shard.units) == 1 and shard.buffer.shape[1:] == self.shape and dtype == self.dtype_for(dtype)
        if fits and self.buffer is None and self.spilled is None:
            self.buffer, self.dtype = shard.buffer[0], dtype
            self._staging.opened(self)
            return True
        self.stage(shard.box, shard.values[i])
        return False

    def stage(self, box: Box, values: torch.Tensor):
        """Let the values of a rectangle wait in the buffer."""
        row0, row1, col0, col1 = box
        self.open(values.dtype)[row0:row1, col0:col1].copy_(values)

    def add_streamed(self, box: Box):
        """A rectangle of whole groups is quantized."""
        if self.streamed is None:
            self.streamed = Coverage(self.shape)
        self.streamed.add_box(box)

    def is_made(self, box: Box) -> bool:
        """Is that rectangle quantized?"""
        return self.final or (self.streamed is not None and not self.streamed.missing(box))

    def bytes_of(self, box: Box) -> int:
        """Of a rectangle of the buffer."""
        return (box[1] - box[0]) * (box[3] - box[2]) * self.buffer.element_size()

    def spill(self, host: Arena) -> int:
        """Move what was written and is not quantized to the host; returns its bytes."""
        self.spilled, spilled = [], 0
        for box in self.staged():
            row0, row1, col0, col1 = box
            waiting = host.take((row1 - row0, col1 - col0), self.buffer.dtype)
            waiting.copy_(self.buffer[row0:row1, col0:col1], non_blocking=True)
            self.spilled.append((box, waiting))
            spilled += waiting.nbytes
        self._gaps_are_zero = False
        self.close()
        return spilled

    def close(self):
        """Let go of the buffer."""
        if self.buffer is not None:
            self._staging.release(self.buffer)
            self._staging.closed(self)
            self.buffer = None

    def staged(self, box: Box | None = None) -> list[Box]:
        """The rectangles, of those in `box`, that are written but not quantized."""
        written = self.coverage.written(box)
        if self.streamed is None:
            return written
        return [gap for part in written for gap in self.streamed.missing(part)]

    def staged_mask(self) -> torch.Tensor:
        """Bool `[N, K]`: the elements that are written but not quantized. Not to be changed."""
        mask = self.coverage.as_mask()
        if self.streamed is not None:
            mask = mask.clone()
            for row0, row1, col0, col1 in self.streamed.written():
                mask[row0:row1, col0:col1] = False
        return mask

    def zero_gaps(self):
        """Give what was not written yet the value 0, so that reading it is at least deterministic."""
        if not self._gaps_are_zero:
            buffer = self.open()
            for row0, row1, col0, col1 in self.coverage.missing():
                buffer[row0:row1, col0:col1].zero_()
            self._zero_padding()
            self._gaps_are_zero = True

    def finalize(self, amax: torch.Tensor | None = None):
        """Quantize what is not yet, and let go of the buffer.

        Args:
            amax: of the unit's groups, the shape of its scales, to use instead of its own.
        """
        if self.streamed is None:
            self.open()
            self._zero_padding()
            self.tracked.quantize_unit(self.number, self.buffer[None], self.maximum if amax is None else amax)
        elif not self.streamed.complete:
            for row0, row1, col0, col1 in self.streamed.missing():
                values = self.open()[None, row0:row1, col0:col1]
                self.tracked.quantize(self.number, 1, (row0, row1, col0, col1), values)
        self.close()
        self.finished()

    def amax(self) -> torch.Tensor:
        """The maxima of its groups, fp32 of the shape of its scales."""
        if self.maximum is not None:
            return self.maximum
        buffer = self.open()
        self._zero_padding()
        with self._staging.on_device():
            return amax(buffer, self.scheme)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its codes and scales."""
        return self.tracked.destination(self.number)

    def finished(self):
        """Nothing of it waits any more."""
        self.final = True
        self.coverage = self.streamed = self.maximum = None
        self.tracked.finished_unit()

    def same_codes(self, values: torch.Tensor, box: Box, mask: torch.Tensor | None = None) -> bool:
        """Are these values, cast with the stored scales, the stored codes?

        Args:
            values: of the rectangle `box`.
            mask: bool, the shape of the unit: only elements where it is true count.
        """
        row0, row1, col0, col1 = box
        num_rows, num_cols = self.tracked.unit_logical
        row1, col1 = min(row1, num_rows), min(col1, num_cols)
        if row0 >= row1 or col0 >= col1:  # padding alone
            return True
        q, scale = self.result()
        scale = scale.to(values.device)  # from the host, where it is offloaded
        if not self.tracked.edges:
            return same_codes(self.scheme, self.tracked.group, q, scale, values, (row0, row1, col0, col1), mask)
        for i, (start, end) in enumerate(pairwise(self.tracked.edges)):
            inside = max(row0, start), min(row1, end), col0, col1
            if inside[0] < inside[1]:
                part = values[inside[0] - row0 : inside[1] - row0]
                if not same_codes(self.scheme, self.tracked.group, q, scale[i], part, inside, mask):
                    return False
        return True

    def _zero_padding(self):
        num_rows, num_cols = self.tracked.unit_logical
        if self.scheme and (num_rows, num_cols) != self.shape:
            self.buffer[num_rows:].zero_()
            self.buffer[:, num_cols:].zero_()
