"""What a write changes of what was written before, and what it has written: coverage and the report."""

from __future__ import annotations

import torch

from ..errors import LoadError
from .compare import COMPARE_ELEMENTS
from .hands import part
from .op_info import OpInfo
from .report import Report
from .target import Target, streamed_error, tied_conflict
from .unit import Unit


class Records:
    """Keeps them.

    Args:
        report: counts what happens.
        device: where units are staged.
    """

    def __init__(self, report: Report, device: torch.device):
        self._report, self._device = report, device

    def before(self, target: Target, info: OpInfo, args, kwargs) -> list[str] | None:
        """The list of the report that this write belongs on, if its elements were written before."""
        if len(target.units) != 1:
            return None
        (unit,) = target.units
        count = unit.coverage.overlap(target.region)
        if not count:
            return None
        if not self._changes(target, unit, info, args, whole=count == target.region.numel):
            return self._report.duplicates
        if target.tied and info.replaces(args, kwargs) and unit.coverage.complete and not unit.read_since_write:
            raise tied_conflict(target)
        return self._report.rewrites

    def add(self, target: Target, info: OpInfo, args, buffer: torch.Tensor):
        """Note what a write into `buffer`, of the target's units, has written."""
        self.count(target, info, args)
        streamed = any(unit.streamed is not None for unit in target.units)
        if len(target.units) == 1 and info.mark is None and not streamed:
            (unit,) = target.units
            unit.coverage.add(target.region)
        elif target.units:
            written = self.written_mask(target, info, args)
            for i, unit in enumerate(target.units):
                values = buffer[i] if len(target.units) > 1 else buffer
                for box in unit.streamed.written() if unit.streamed is not None else ():
                    if not unit.same_codes(part(values, (0, 0, 0, 0), box), box, written[i]):
                        raise streamed_error(target, unit, "cannot be changed in part")
                if len(target.units) > 1:
                    unit.open(buffer.dtype).copy_(buffer[i])
                if target.region is not None and info.mark is None:
                    unit.coverage.add(target.region)
                else:
                    unit.coverage.add_mask(written[i])
        for unit in target.units:
            unit.read_since_write = False

    def count(self, target: Target, info: OpInfo, args):
        """Count a shard."""
        source = args[1] if info.is_copy and isinstance(args[1], torch.Tensor) else target.tensor
        self._report.shards += 1
        self._report.bytes_in += target.tensor.numel() * source.element_size()

    def written_mask(self, target: Target, info: OpInfo, args) -> torch.Tensor:
        """Bool `[units, N, K]`: the elements that the op has written."""
        unit = target.units[0]
        written = torch.zeros((len(target.units), *unit.shape), dtype=torch.bool, device=self._device)
        view = written.as_strided(target.sizes, target.strides, target.offset)
        if info.mark is None:
            view.fill_(True)
        elif view.shape != target.tensor.shape:
            raise LoadError(f"{target}: {info.name} must be called on elements, not on a {target.tensor.dtype} view")
        else:
            mark = torch.zeros(view.shape, dtype=torch.bool, device=written.device)
            info.mark(mark, *args[1:])
            view.copy_(mark)
        return written

    def _changes(self, target, unit: Unit, info, args, whole):
        """Would this write change what was written? Compared in pieces; what cannot be compared does."""
        if info.name == "zero_":
            value = torch.zeros((), device=self._device)
        elif info.name in ("copy_", "fill_"):
            value = torch.as_tensor(args[1])
        else:
            return True
        if value.is_meta:  # another tracked tensor
            return True
        view, whole = target.view(unit.open()), whole and unit.streamed is None
        dtype = view.dtype if unit.scheme is None else value.dtype  # what passes through is rounded as it arrives
        if not whole and view.shape != target.sizes:
            return True
        value = value.expand(view.shape)
        written = None if whole else target.region.of(unit.staged_mask())
        if not view.ndim:
            view, value = view[None], value[None]
            written = written if written is None else written[None]
        step = max(COMPARE_ELEMENTS // max(view[:1].numel(), 1), 1)
        for start in range(0, len(view), step):
            piece = slice(start, start + step)
            differ = view[piece] != value[piece].to(view.device, dtype)
            if bool(differ.any() if written is None else (differ & written[piece]).any()):
                return True
        return False
