"""Copies into rectangles of units: shards of any form, quantized without the units' buffers."""

from __future__ import annotations

import torch

from .arena import Staging
from .hands import Hands, around, part
from .op_info import OpInfo
from .records import Records
from .report import Report
from .substitute import named, source_dtype, write
from .target import Target, streamed_error, tied_conflict
from .unit import Shard

CHUNK_BYTES = 16 << 20  # of experts that arrive in one copy and are quantized in one launch


class Streams:
    """Takes them.

    Args:
        staging: where they wait.
        hands: what threads hold open of them.
        records, report: of what happens.
    """

    def __init__(self, staging: Staging, hands: Hands, records: Records, report: Report):
        self._staging, self._hands, self._records, self._report = staging, hands, records, report

    def chunk(self, target: Target) -> int:
        """How many units one launch takes."""
        tracked = target.tracked
        if not tracked.streams or not target.units:
            return 1
        elements = max(target.tensor.numel() // len(target.units), 1)
        return max(CHUNK_BYTES // (elements * tracked.entry.dtype.itemsize), 1)

    def take(self, func, info: OpInfo, args, kwargs, target: Target, also) -> bool:
        """Take a copy into a rectangle of units as a shard, held open and then quantized without their buffers;
        returns whether it could be."""
        tracked, units = target.tracked, target.units
        if not tracked.streams or not units or not target.in_elements or any(unit.final for unit in units):
            return False
        found = target.rectangle()
        if found is None or tracked.whole_groups(found[0]) is None and units[0].streamed is None:
            return False
        box, strides = found
        overlap = any(unit.coverage.overlap_box(box) for unit in units)
        if overlap and len(units) > 1:
            return False
        if overlap:
            self._hands.settle([target])
            if units[0].streamed is None or not units[0].streamed.overlap_box(box):
                return False
        elif tracked.whole_groups(box) is None:
            return False
        self._hands.let_go(self._hands.mine(), [*units, *also])
        buffer = self.arrive(func, info, args, kwargs, target, box, strides)
        self._records.count(target, info, args)
        if overlap:
            self._replace(target, units[0], box, buffer)
            self._staging.release(buffer)
        else:
            self._hands.hold(self._hands.mine(), Shard(tracked, target.first, units, box, buffer))
        return True

    def arrive(self, func, info: OpInfo, args, kwargs, target: Target, box, strides) -> torch.Tensor:
        """What a copy writes into a rectangle of units, as a buffer `[units, rows, columns]` of its own."""
        dtype = target.units[0].dtype_for(source_dtype(target, info, args, [target]))
        buffer = self._staging.empty((len(target.units), box[1] - box[0], box[3] - box[2]), dtype)
        try:
            into = buffer.as_strided(target.sizes, strides, buffer.storage_offset())
            with named(func, [target]):
                write(func, info, into, args, kwargs, self._staging)
        except BaseException:
            self._staging.release(buffer)
            raise
        return buffer

    def _replace(self, target, unit, box, buffer):
        """Values for a rectangle of which some is quantized: its whole groups are quantized again, and those that it
        has a part of have to stay as they are."""
        values, whole = buffer[0], unit.tracked.whole_groups(box)
        edges = around(whole, box) if whole else [box]
        for edge in edges:
            for inner in unit.streamed.written(edge):
                if not unit.same_codes(part(values, box, inner), inner):
                    raise streamed_error(target, unit, "cannot be changed in part")
        changed = False
        for inner in unit.staged(box):
            held = unit.open()[inner[0] : inner[1], inner[2] : inner[3]]
            changed = changed or not torch.equal(held, part(values, box, inner).to(held.dtype))
        for edge in edges:
            for inner in unit.streamed.missing(edge):
                unit.stage(inner, part(values, box, inner))
        if whole:
            changed = self._quantize_again(unit, whole, part(values, box, whole)) or changed
            unit.add_streamed(whole)
        if changed and target.tied and unit.coverage.complete:
            raise tied_conflict(target)
        (self._report.rewrites if changed else self._report.duplicates).append(str(target))
        unit.coverage.add_box(box)
        self._hands.hold_units([unit])

    def _quantize_again(self, unit, box, values):
        """Quantize whole groups; returns whether codes or scales of those that were quantized already have changed."""
        tracked = unit.tracked
        results = [tracked.result_of(unit.number, 1, inner) for inner in unit.streamed.written(box)]
        before = [(q.clone(), scale.clone()) for q, scale in results]
        tracked.quantize(unit.number, 1, box, values[None])
        return not all(
            torch.equal(_bytes(q), _bytes(new_q)) and torch.equal(_bytes(scale), _bytes(new_scale))
            for (q, scale), (new_q, new_scale) in zip(before, results, strict=True)
        )


def _bytes(t):
    return t.contiguous().view(torch.uint8)
