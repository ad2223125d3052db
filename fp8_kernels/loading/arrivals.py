"""Shards in the usual case: whole elements of one unit, row by row, written for the first time.

`Writes.run` does the same for any op; this is what a shard costs where there are thousands of them.
"""

from __future__ import annotations

import threading

import torch

from ..ops import WEIGHT_DTYPES, copy_amax
from .arena import Staging, outliving
from .coverage import Box
from .hands import Hand, Hands
from .report import Report
from .staging import Tracked
from .unit import Shard, Unit

_PLAIN = (torch.Tensor, torch.nn.Parameter)
WHOLE_BYTES = 32 << 20  # of units whose shards are quantized together if they arrive one after the other
# Of units with one scale, above which their maximum is taken from each shard in the copy itself (`copy_amax`), so that
# completion is the cast alone. Measured on an H100: a smaller unit stays on the chip, or in its cache, while it is
# quantized, which reads it once in any case. For shards from the host it pays at no size: each would need a launch of
# its own, which the next copy waits for (bench/README.md).
ACCUMULATE_BYTES = 112 << 20


class Arrivals:
    """Takes shards.

    Args:
        staging: where they wait.
        hands: what threads hold open of them.
        report: counts them.
        lock: held while one is taken.
    """

    def __init__(self, staging: Staging, hands: Hands, report: Report, lock: threading.RLock):
        self._staging, self._hands, self._report, self._lock = staging, hands, report, lock

    def take(self, tracked: Tracked, number: int, box: Box, source: torch.Tensor, non_blocking: bool = False) -> bool:
        """Copy a shard into a rectangle of a unit. Returns False, and has done nothing, where that is not the usual
        case.

        Args:
            number: of the unit.
            source: `[rows, columns]`, the shape of `box`.
        """
        dtype = source.dtype
        if (
            not tracked.usual
            or dtype not in WEIGHT_DTYPES
            or type(source) not in _PLAIN
            or source.layout is not torch.strided
            or source.is_meta
            or (source.requires_grad and torch.is_grad_enabled())
        ):
            return False
        row0, row1, col0, col1 = box
        num_rows, num_cols = tracked.unit_shape
        if not (row0 < row1 <= num_rows and col0 < col1 <= num_cols):
            return False
        unit, staging, hands = tracked.units[number], self._staging, self._hands
        with self._lock:
            if unit.final or unit.coverage.overlap_box(box):
                return False
            staging.follow()
            staging.in_use = (unit,)
            hand = hands.mine()
            if dtype is not unit.dtype:
                dtype = unit.dtype_for(dtype)
            shard = hand.shard
            if shard is not None and shard.units[0] is unit:
                together = shard.with_next(box, dtype)
                if together is not None:
                    self._bring(_part(shard.buffer, num_cols, box), source, non_blocking)
                    shard.box = together
                    self._count(unit, box, source)
                    return True
            if tracked.streams and tracked.whole_groups(box) is not None:
                # A small unit that is filled from its start is quantized in one launch.
                starts = unit.coverage.empty and tracked.unit_numel * dtype.itemsize <= WHOLE_BYTES
                room = tracked.unit_box if starts else box
                self._stream(hand, tracked, unit, box, room, source, dtype, non_blocking)
            else:
                self._stage(hand, unit, box, source, dtype, non_blocking)
        return True

    def _stream(self, hand: Hand, tracked, unit: Unit, box, room, source, dtype, non_blocking):
        """Hold the shard open, in a buffer of its own, which has place for all of `room`."""
        staging, shape = self._staging, tracked.unit_shape
        size = (1, room[1] - room[0], room[3] - room[2])
        units = staging.in_use
        # What is let go is quantized after this copy where there is room for both: a copy from the host waits for what
        # was enqueued before it, and that would be a kernel, instead of running beside the next shard's way.
        buffer = staging.spare(size, dtype)
        let_go_first = buffer is None
        if let_go_first:
            self._hands.let_go(hand, units)
            self._hands.launch_less_than(size[1] * size[2] * dtype.itemsize)
            buffer = staging.empty(size, dtype)
        try:
            self._bring(_part(buffer, shape[1], box) if room != box else buffer[0], source, non_blocking)
        except BaseException:
            staging.release(buffer)
            raise
        if not let_go_first:
            self._hands.let_go(hand, units)
        hand.shard = shard = Shard(tracked, unit.number, units, box, buffer, room)
        unit.shards.append(shard)
        self._count(unit, box, source)

    def _stage(self, hand: Hand, unit: Unit, box, source, dtype, non_blocking):
        """Let the shard wait in the buffer of its unit."""
        staging = self._staging
        units = staging.in_use
        let_go_first = unit.buffer is None and not staging.has_room(unit.shape, dtype)
        if let_go_first:
            self._hands.let_go(hand, units)
            self._hands.launch_less_than(unit.tracked.unit_numel * dtype.itemsize)
        place, tracked = _part(unit.open(dtype), unit.shape[1], box), unit.tracked
        is_large = tracked.unit_numel * dtype.itemsize > ACCUMULATE_BYTES
        # Padding may arrive with a shard, and is outside of every scale.
        if is_large and tracked.one_scale and tracked.unit_logical == tracked.unit_shape:
            self._bring_and_look(unit, place, source, non_blocking)
        else:
            self._bring(place, source, non_blocking)
        self._count(unit, box, source)
        unit.read_since_write = False
        if not let_go_first:
            self._hands.let_go(hand, units)
        if unit.coverage.complete and unit not in hand.units:
            hand.units.append(unit)

    def _bring_and_look(self, unit: Unit, place, source, non_blocking):
        """Copy a shard and raise the unit's maximum to its own, where that is one op."""
        if unit.coverage.empty:
            with outliving():
                unit.maximum = torch.zeros((), device=place.device)
        if unit.maximum is not None and source.device == place.device and source.dtype is place.dtype:
            copy_amax(source, place, unit.maximum)
        else:
            unit.maximum = None
            self._bring(place, source, non_blocking)

    def _bring(self, destination, source, non_blocking):
        if source.is_cuda:
            destination.copy_(source, non_blocking)
        else:
            self._staging.sources.bring(destination, source, non_blocking)

    def _count(self, unit, box, source):
        unit.coverage.add_box(box)
        report = self._report
        report.shards += 1
        report.bytes_in += source.nbytes


def _part(buffer, num_cols, box):
    """A rectangle of a contiguous buffer of a unit."""
    row0, row1, col0, col1 = box
    start = buffer.storage_offset() + row0 * num_cols + col0
    return buffer.as_strided((row1 - row0, col1 - col0), (num_cols, 1), start)
