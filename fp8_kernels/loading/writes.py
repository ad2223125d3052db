"""Carrying out the reads and writes of tracked tensors: on real memory, recorded, and finished in time.

A unit that became complete stays open until its thread writes to another unit: composed loaders copy a weight and
then write a function of it back. So a thread holds one complete unit and one that is being filled; more only where
one op writes several at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from ..errors import ConflictingShardError, LoadError
from .op_info import OpInfo, op_info
from .report import Report
from .staging import COMPARE_ELEMENTS, Staging, Tracked, Unit
from .substitute import call, refuse, source_dtype, split
from .target import Target

_SPLIT = {"copy_", "fill_", "zero_"}


class Writes:
    """The state of one load: what is tracked, what is held open, what went wrong.

    Args:
        staging: where open units wait.
        report: counts what happens.
        on_unit: called with (unit, q, scale) after each unit.
        on_final: called with each `Tracked` when its last unit is final.
        progress: called with (unit) after each unit.
    """

    def __init__(self, staging: Staging, report: Report, on_unit, on_final: Callable, progress: Callable):
        self.staging = staging
        self.device = staging.device
        self.report = report
        self.error: LoadError | None = None  # the first, in case the engine's own code swallows it
        self.has_tied_real = False
        self._on_unit, self._on_final, self._progress = on_unit, on_final, progress
        self._lock = threading.RLock()
        self._by_storage: dict[int, tuple[Tracked, int]] = {}
        self._storages: list[torch.UntypedStorage] = []  # alive, so that no other storage takes their address
        self._frozen: dict[int, str] = {}  # storages that nothing may write, by the names of what they hold
        self._held: dict[int, list[Unit]] = {}  # thread -> the units that its last write completed

    def track(self, tracked: Tracked, t: torch.Tensor):
        """From now on, what is written to the storage of `t` is a shard of `tracked`."""
        storage = t.untyped_storage()
        self._storages.append(storage)
        self._by_storage[storage._cdata] = tracked, t.element_size()
        if not t.is_meta and not tracked.entry.scheme and len(tracked.entry.names) > 1:
            self.has_tied_real = True

    def freeze(self, name: str, t: torch.Tensor):
        """From now on, writing to the storage of `t` is an error, unless it is tracked."""
        self._storages.append(t.untyped_storage())
        self._frozen[t.untyped_storage()._cdata] = name

    def find(self, t: torch.Tensor, written: bool) -> Target | None:
        """The target, if its storage is tracked."""
        if t.layout is not torch.strided:
            return None
        known = self._by_storage.get(t.untyped_storage()._cdata)
        if written and known is None and self._frozen:
            self._check_not_frozen(t)
        return known and Target(t, *known, written)

    def _check_not_frozen(self, t):
        name = self._frozen.get(t.untyped_storage()._cdata)
        if name is not None:
            self.error = self.error or LoadError(
                f"`{name}` must not be written by this reload: it is out of its `scope`, or holds codes or scales"
            )
            raise self.error

    def owner(self, t: torch.Tensor) -> Tracked | None:
        """What the storage of `t` is tracked as."""
        target = self.find(t, written=False)
        return target and target.tracked

    def run(self, func, info: OpInfo, args, kwargs, targets: list[Target]):
        """Carry out an op that reads or writes tracked tensors; returns what the op returns."""
        with self._lock:
            try:
                return self._run(func, info, args, kwargs, targets)
            except LoadError as error:
                self.error = self.error or error
                raise

    def assign(self, tracked: Tracked, destination: torch.Tensor, value: torch.Tensor):
        """A tensor took the place of a tracked one: a write of the whole."""
        if tuple(value.shape) != tracked.entry.shape:
            raise LoadError(
                f"`{tracked.entry.name}` must keep the shape {tracked.entry.shape} while it loads, got a tensor of "
                f"{tuple(value.shape)} in its place; change layouts in `on_module` or `on_finish`"
            )
        self.copy(destination.detach(), value.detach())

    def copy(self, destination: torch.Tensor, source: torch.Tensor):
        """`destination.copy_(source)`, of a view of a tracked tensor."""
        func, args = torch.ops.aten.copy_.default, (destination, source)
        self.run(func, op_info(func), args, {}, self._targets_of(args))

    def finish_as_it_is(self, unit: Unit):
        """Finish a unit that no write completed; what is not written of it is 0."""
        if unit.scheme is not None:
            unit.zero_gaps()
            self._finish(unit)
        else:
            self._pass(unit)

    def flush(self):
        """Finish every unit that is complete."""
        with self._lock:
            for thread in list(self._held):
                for unit in self._held.pop(thread):
                    self._finish(unit)

    # Reading and writing.

    def _run(self, func, info, args, kwargs, targets):
        for target in targets:
            target.locate()
        written = [t for t in targets if t.written]
        if not written:
            buffers = [self._readable(t) for t in targets]
            result = call(func, info, args, kwargs, targets, buffers, self.device)
            self._release(targets, buffers)
            return result
        refuse(info, args, kwargs, targets)
        if len(written) == 1 and len(written[0].units) > 1 and info.name in _SPLIT:
            parts = split(args, written[0])
            if parts:
                for part in parts:
                    self.run(func, info, part, kwargs, self._targets_of(part))
                return args[0]
        quantized = [t for t in written if t.tracked.entry.scheme]
        if any(unit.final for t in quantized for unit in t.units):
            return self._verify(func, info, args, kwargs, targets)
        if quantized:  # what this op reads is let go after it
            self._let_go([unit for t in targets for unit in t.units])
        before = [self._before(t, info, args, kwargs) for t in written]
        buffers = [self._writable(t, info, args, kwargs, targets) if t.written else self._readable(t) for t in targets]
        result = call(func, info, args, kwargs, targets, buffers, self.device)
        completed = []
        for target, seen in zip(written, before, strict=True):
            if seen is not None:
                seen.append(str(target))
            completed += self._record(target, info, args, buffers[targets.index(target)])
        self._release(targets, buffers)
        if completed:
            self._let_go(completed)
            self._held[threading.get_ident()] = completed
        return result

    def _readable(self, target):
        """Real memory that holds what was written to the target's units."""
        if not target.tracked.entry.scheme:
            target.tracked.units[0].read_since_write = True
            return target.tensor
        if any(unit.final for unit in target.units):
            raise LoadError(
                f"`{target.tracked.entry.name}` cannot be read: it is quantized already. A loader may read a weight "
                "until it writes another one; name the weight in `ignore` if it must be read later"
            )
        for unit in target.units:
            unit.zero_gaps()
            unit.read_since_write = True
        return self._gather(target)

    def _writable(self, target, info, args, kwargs, targets):
        """Real memory for an op to write into."""
        if not target.tracked.entry.scheme:
            return target.tensor
        for unit in target.units:
            if not info.replaces(args, kwargs):
                unit.zero_gaps()
            unit.open(source_dtype(target, info, args, targets))
        return self._gather(target)

    def _gather(self, target):
        """The buffer of the target's unit, or several units in a row in a temporary one."""
        if not target.units:
            return torch.empty(0, dtype=target.tracked.entry.dtype, device=self.device)
        if len(target.units) == 1:
            return target.units[0].open()
        for unit in target.units:
            unit.zero_gaps()
        dtype = max((unit.open().dtype for unit in target.units), key=lambda d: d.itemsize)
        together = self.staging.empty((len(target.units), *target.tracked.unit_shape), dtype)
        for row, unit in zip(together, target.units, strict=True):
            row.copy_(unit.buffer)
        return together

    def _release(self, targets, buffers):
        """Let go of what `_gather` had to put together."""
        for target, buffer in zip(targets, buffers, strict=True):
            if len(target.units) > 1:
                self.staging.release(buffer)

    def _before(self, target, info, args, kwargs):
        """The list of the report that this write belongs on, if its elements were written before."""
        if len(target.units) != 1:
            return None
        (unit,) = target.units
        count = unit.coverage.overlap(target.region)
        if not count:
            return None
        if not self._changes(target, unit, info, args, whole=count == target.region.numel):
            return self.report.duplicates
        if target.tied and info.replaces(args, kwargs) and unit.coverage.complete and not unit.read_since_write:
            raise ConflictingShardError(
                f"{target}: other values arrived before; it is one tensor under the names "
                f"{', '.join(f'`{name}`' for name in target.tracked.entry.names)}"
            )
        return self.report.rewrites

    def _changes(self, target, unit, info, args, whole):
        """Would this write change what was written? Compared in pieces; what cannot be compared does."""
        if info.name == "zero_":
            value = torch.zeros((), device=self.device)
        elif info.name in ("copy_", "fill_"):
            value = torch.as_tensor(args[1])
        else:
            return True
        if value.is_meta:  # another tracked tensor
            return True
        view = target.view(unit.buffer)
        if not whole and view.shape != target.sizes:
            return True
        value = value.expand(view.shape)
        written = None if whole else target.region.of(unit.coverage.as_mask())
        if not view.ndim:
            view, value = view[None], value[None]
            written = written if written is None else written[None]
        step = max(COMPARE_ELEMENTS // max(view[:1].numel(), 1), 1)
        for start in range(0, len(view), step):
            piece = slice(start, start + step)
            differ = view[piece] != value[piece].to(view.device)
            if bool(differ.any() if written is None else (differ & written[piece]).any()):
                return True
        return False

    def _record(self, target, info, args, buffer):
        """Note what a write has written; returns the quantized units that are complete now."""
        self._count(target, info, args)
        if len(target.units) == 1 and info.mark is None:
            (unit,) = target.units
            unit.coverage.add(target.region)
        elif target.units:
            written = self._written_mask(target, info, args)
            for i, unit in enumerate(target.units):
                if len(target.units) > 1:
                    unit.open(buffer.dtype).copy_(buffer[i])
                unit.coverage.add_mask(written[i])
        completed = []
        for unit in target.units:
            unit.read_since_write = False
            if not unit.final and unit.coverage.complete:
                if unit.scheme is None:
                    self._pass(unit)
                else:
                    completed.append(unit)
        return completed

    def _count(self, target, info, args):
        source = args[1] if info.is_copy and isinstance(args[1], torch.Tensor) else target.tensor
        self.report.shards += 1
        self.report.bytes_in += target.tensor.numel() * source.element_size()

    def _written_mask(self, target, info, args):
        """Bool `[units, N, K]`: the elements that the op has written."""
        unit = target.units[0]
        written = torch.zeros((len(target.units), *unit.shape), dtype=torch.bool, device=self.device)
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

    def _verify(self, func, info, args, kwargs, targets):
        """A write to what is quantized: it must say what was said before."""
        written = [t for t in targets if t.written]
        target = written[0]
        if len(written) > 1 or len(target.units) > 1 or not info.replaces(args, kwargs):
            raise LoadError(f"{target} is quantized already; {info.name} cannot change it")
        (unit,) = target.units
        self._let_go([unit])
        values = self.staging.empty(unit.shape, unit.dtype_for(source_dtype(target, info, args, targets)))
        buffers = [values if t is target else self._readable(t) for t in targets]
        result = call(func, info, args, kwargs, targets, buffers, self.device)
        self._release([t for t in targets if t is not target], [b for b in buffers if b is not values])
        boxes = target.region.boxes
        mask = None if boxes is not None and info.mark is None else self._written_mask(target, info, args)[0]
        same = unit.same_codes(values, boxes if mask is None else None, mask)
        self.staging.release(values)
        if not same:
            raise ConflictingShardError(f"{target}: it is quantized already, and other values arrived now")
        self._count(target, info, args)
        self.report.duplicates.append(str(target))
        return result

    # Finishing.

    def _let_go(self, units):
        """This thread turns to these units: what else it held open is finished."""
        held = self._held.get(threading.get_ident())
        if held and units and any(unit not in units for unit in held):
            self._held[threading.get_ident()] = [unit for unit in held if unit in units]
            for unit in held:
                if unit not in units:
                    self._finish(unit)

    def _pass(self, unit):
        unit.final = True
        self._progress(unit)
        self._on_final(unit.tracked)

    def _finish(self, unit):
        if unit.final:  # two threads held it
            return
        started = time.perf_counter()
        q, scale = unit.finalize()
        self.report.quantized_units += 1
        phases = self.report.seconds_by_phase
        phases["quantize"] = phases.get("quantize", 0.0) + time.perf_counter() - started
        if self._on_unit is not None:
            self._on_unit(unit, q, scale)
        self._progress(unit)
        if unit.tracked.final:
            self._on_final(unit.tracked)

    def _targets_of(self, args):
        found = (self.find(x, written=i == 0) for i, x in enumerate(args) if isinstance(x, torch.Tensor))
        return [target for target in found if target]
