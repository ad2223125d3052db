"""Handing over what is on the device already, whole spans at a time, without a write that the mode would have to see.

For a loader of our own, which knows where every tensor belongs and reads nothing back: rows that are whole groups are
quantized where they arrived, straight into the model's codes, many weights in one launch. Anything else goes the way
of `t.copy_(w)`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .. import backends
from ..errors import LoadError
from ..ops import WEIGHT_DTYPES, as_bytes
from ..schemes import Scheme
from .coverage import Box
from .staging import Tracked, Unit
from .transfer import Memory
from .writes import Writes

_quantize_many_out = backends.OPS["quantize_many_out"]


@dataclass(slots=True)
class Rows:
    """Whole rows of a weight that becomes FP8, in the memory of a span.

    Attributes:
        tracked, first, count: neighbouring units that it has the same rows of.
        row, num_rows: of each.
        start: of its first byte in the span.
        dtype: of its elements.
    """

    tracked: Tracked
    first: int
    count: int
    row: int
    num_rows: int
    start: int
    dtype: torch.dtype

    @property
    def box(self) -> Box:
        """The rectangle of each unit."""
        return self.row, self.row + self.num_rows, 0, self.tracked.unit_shape[1]

    @property
    def units(self) -> list[Unit]:
        return self.tracked.units[self.first : self.first + self.count]

    @property
    def num_bytes(self) -> int:
        return self.count * self.num_rows * self.tracked.unit_shape[1] * self.dtype.itemsize

    def values(self, memory: Memory) -> torch.Tensor:
        """`[count, num_rows, columns]`."""
        return memory.view(self.start, self.dtype, (self.count, self.num_rows, self.tracked.unit_shape[1]))

    @property
    def target(self) -> torch.Tensor:
        """Where it belongs, as a view of the model's weight; the shape of its values."""
        handle = self.tracked.handle
        units = handle[None] if handle.ndim == 2 else handle[self.first : self.first + self.count]
        return units.narrow(1, self.row, self.num_rows)

    def joined(self, other: Rows) -> bool:
        """Take the next one in, if it continues this one in the unit and in memory."""
        if (
            self.tracked is not other.tracked
            or self.first != other.first
            or self.count != 1
            or other.count != 1
            or self.row + self.num_rows != other.row
            or self.start + self.num_bytes != other.start
            or self.dtype is not other.dtype
        ):
            return False
        self.num_rows += other.num_rows
        return True


@dataclass(slots=True)
class Plain:
    """Anything else.

    Attributes:
        target: a tensor of the model, or a view of one.
        start: of its first byte in the span.
        shape, dtype: of what is there; it fits into `target` as `copy_` has it.
    """

    target: torch.Tensor
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def values(self, memory: Memory) -> torch.Tensor:
        return memory.view(self.start, self.dtype, self.shape)


class Feed:
    """Takes spans for a load that is under way, outside of its mode.

    Args:
        writes: of the session.
    """

    def __init__(self, writes: Writes):
        self._writes, self._hands = writes, writes._hands
        self._report, self._staging = writes.report, writes.staging

    def take(self, shards: Iterable[Rows | Plain], memory: Memory):
        """Take what is in a span. Its memory is used by what is enqueued on the current stream meanwhile.

        Raises:
            LoadError: as `copy_` does inside a `LayerwiseLoader`.
        """
        batches: dict[tuple, list[tuple[Rows, Box, list[Unit]]]] = {}
        with self._writes._lock:
            self._writes.let_go()
            for shard in _joined(shards):
                if isinstance(shard, Rows):
                    entry, box, units = shard.tracked.entry, shard.box, shard.units
                    if self._is_direct(shard, box, units):
                        for unit in units:  # which another tensor of the span may be of, too
                            unit.coverage.add_box(box)
                        batches.setdefault((entry.scheme, entry.fp8_dtype), []).append((shard, box, units))
                        continue
                    self._quantize_all(batches, memory)
                self._copy(shard, memory)
            self._quantize_all(batches, memory)

    def has_arrived(self, tracked: Tracked):
        """A tensor that passes through has its values, though nothing was seen to write them."""
        unit = tracked.units[0]
        with self._writes._lock:
            if unit.final or not unit.coverage.empty:
                raise LoadError(f"`{unit}` arrived twice")
            unit.coverage.add_box((0, unit.shape[0], 0, unit.shape[1]))
            self._report.shards += 1
            self._report.bytes_in += tracked.handle.nbytes
            self._hands.pass_through(unit)

    def _is_direct(self, shard, box, units):
        """May it be quantized where it is: whole groups, none of which was written before?"""
        tracked = shard.tracked
        return (
            tracked.streams
            and not tracked.waits_for_ranks
            and shard.dtype in WEIGHT_DTYPES
            and tracked.device == self._staging.device
            and tracked.whole_groups(box) == box
            and not any(unit.final or unit.shards or unit.coverage.overlap_box(box) for unit in units)
        )

    def _quantize_all(self, batches, memory):
        while batches:
            (scheme, _), batch = batches.popitem()
            self._quantize(scheme, batch, memory)

    def _quantize(self, scheme: Scheme, batch: list[tuple[Rows, Box, list[Unit]]], memory):
        weights, codes, scales = [], [], []
        started = time.perf_counter()
        for shard, box, _ in batch:
            tracked = shard.tracked
            if tracked.maxima is not None or tracked.edges:  # what the many have no arguments for
                tracked.quantize(shard.first, shard.count, box, shard.values(memory))
                continue
            tracked.allocate()
            q, scale = tracked.result_of(shard.first, shard.count, box)
            weights.append(shard.values(memory))
            codes.append(q)
            scales.append(as_bytes(scale))
        if weights:
            with self._staging.on_device():
                _quantize_many_out(weights, codes, scales, *scheme.quantize_args)
        self._report.seconds_by_phase["quantize"] += time.perf_counter() - started
        in_parts: dict[Unit, None] = {}
        for shard, box, units in batch:
            self._report.shards += 1
            self._report.bytes_in += shard.num_bytes
            is_whole = box == shard.tracked.unit_box
            for unit in units:
                if is_whole:
                    self._hands.was_made(unit)
                else:
                    unit.add_streamed(box)
                    in_parts[unit] = None
        for unit in in_parts:
            if unit.coverage.complete:
                self._hands.finish(unit)

    def _copy(self, shard, memory):
        target, values = shard.target, shard.values(memory)
        if self._writes.owner(target) is None:
            target.copy_(values)
        else:
            self._writes.copy(target, values)


def _joined(shards):
    last = None
    for shard in shards:
        if not (isinstance(shard, Rows) and isinstance(last, Rows) and last.joined(shard)):
            if last is not None:
                yield last
            last = shard
    if last is not None:
        yield last
