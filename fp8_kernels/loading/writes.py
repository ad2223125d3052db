"""Carrying out the reads and writes of tracked tensors: on real memory, recorded, and finished in time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from ..errors import ConflictingShardError, LoadError
from ..schemes import Scheme, have_same_groups
from .arena import Staging
from .arrivals import Arrivals
from .compare import are_equal, are_powers_of_two
from .coverage import Box
from .echoes import COPYING, Echoes
from .hands import Hands
from .launches import Launches
from .op_info import OpInfo, op_info
from .plan import Entry
from .records import Records
from .report import Report
from .staging import Tracked
from .streams import Streams
from .substitute import call, refuse, source_dtype, split
from .target import Target, streamed_error
from .unit import Unit

_COPIES = {"copy_", "fill_", "zero_"}


class Writes:
    """The state of one load: what is tracked, what is held open, what went wrong.

    Args:
        staging: where open units wait.
        report: counts what happens.
        on_unit: called with (unit, q, scale) after each unit.
        on_final: called with each `Tracked` when its last unit is final.
        progress: called with (unit) after each unit, or None.
        may_wait: small units may be quantized after they count as final; not where a hook looks at them.
    """

    def __init__(
        self,
        staging: Staging,
        report: Report,
        on_unit,
        on_final: Callable,
        progress: Callable | None,
        may_wait: bool = True,
    ):
        self.staging = staging
        self.device = staging.device
        self.report = report
        self.error: LoadError | None = None  # the first, in case the engine's own code swallows it
        self.has_tied_real = False
        self.echoes = Echoes()
        self._hands = Hands(report, on_unit, on_final, progress, Launches(staging) if may_wait else None)
        self._lock = threading.RLock()
        self._records = Records(report, staging.device)
        self._streams = Streams(staging, self._hands, self._records, report)
        self.arrivals = Arrivals(staging, self._hands, report, self._lock)
        self._by_storage: dict[int, tuple[Tracked, int]] = {}
        self._storages: list[torch.UntypedStorage] = []  # alive, so that no other storage takes their address
        self._frozen: dict[int, str] = {}  # storages that nothing may write, by the names of what they hold
        self._watched: dict[int, Entry] = {}  # storages of what needs not arrive
        self.touched: list[Entry] = []  # of these, those that were written

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

    def watch(self, entry: Entry, t: torch.Tensor):
        """From now on, notice a write to the storage of `t`, of which nothing has to arrive."""
        self._storages.append(t.untyped_storage())
        self._watched[t.untyped_storage()._cdata] = entry

    def find(self, t: torch.Tensor, written: bool) -> Target | None:
        """The target, if its storage is tracked."""
        if t.layout is not torch.strided:
            return None
        known = self._by_storage.get(t.untyped_storage()._cdata)
        if written and known is None:
            if self._frozen or self._watched:
                self._notice_write(t)
            if self.echoes:
                known = self._adopt(t)
        return known and Target(t, *known, written)

    def _adopt(self, t):
        """A write to the copy that stands in the place of a weight (`model.to(...)`) is one to the weight."""
        tracked = self.echoes.in_place(t)
        if tracked is None:
            return None
        if t.dtype != tracked.entry.dtype:
            self.error = self.error or LoadError(
                f"`{tracked.entry.name}` was cast to {t.dtype} before it had arrived, and is written now: cast the "
                "model before the context or after it"
            )
            raise self.error
        self.track(tracked, t)
        return self._by_storage[t.untyped_storage()._cdata]

    def _notice_write(self, t):
        entry, name = (held.get(t.untyped_storage()._cdata) for held in (self._watched, self._frozen))
        if entry is not None and entry not in self.touched:
            self.touched.append(entry)
        if name is not None:
            self.error = self.error or LoadError(
                f"`{name}` must not be written by this reload: it is out of its `scope`, or holds codes or scales"
            )
            raise self.error

    def copied(self, t: torch.Tensor, copy: torch.Tensor):
        """`copy` was made of `t`, which may be tracked, or a copy of what is."""
        tracked = self.owner(t) or self.echoes.of(t)
        if tracked is not None and not all(unit.has_arrived for unit in tracked.units):
            self.echoes.add(copy, tracked)

    @property
    def failure(self) -> BaseException | None:
        """Why the load cannot succeed, also where the engine's own code went on."""
        return self.error or self._hands.failure

    def forget(self):
        """Let go of failures, whose frames hold buffers."""
        self.error = self._hands.failure = None

    def owner(self, t: torch.Tensor) -> Tracked | None:
        """What the storage of `t` is tracked as."""
        if t.layout is not torch.strided:
            return None
        return self._by_storage.get(t.untyped_storage()._cdata, (None,))[0]

    def take(self, t: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> bool:
        """`t.copy_(source)` in the usual case, see `Arrivals`. Returns False, and has done nothing, in every other."""
        try:
            known = self._by_storage.get(t.untyped_storage()._cdata)
        except NotImplementedError:  # sparse, or batched by vmap
            return False
        if known is None or (self.echoes and self.echoes.of(source)):
            return False
        tracked, shape = known[0], t.shape
        if (
            not tracked.usual
            or t.dtype is not tracked.entry.dtype
            or t.stride() != tracked.row_strides
            or shape != source.shape
            or (t.requires_grad and torch.is_grad_enabled())
        ):
            return False
        number, start = divmod(t.storage_offset() - tracked.base, tracked.unit_numel)
        row0, col0 = divmod(start, tracked.unit_shape[1])
        num_rows, num_cols = shape
        return self.arrivals.take(tracked, number, (row0, row0 + num_rows, col0, col0 + num_cols), source, non_blocking)

    def write_box(self, tracked: Tracked, expert: int | None, box: Box | None, source: torch.Tensor):
        """Write a shard into a rectangle of a tracked tensor, as `copy_` into that view of it does, without a view.

        Args:
            expert: the index in the first dimension; None for the whole tensor or a matrix.
            box: rows from, to, columns from, to, of the matrix; None for all of it.
            source: of the shape of what it is written to, real, on any device.

        Raises:
            LoadError, ConflictingShardError: as writes do; also for a place that is not in the tensor.
        """
        whole, matrix = tracked.handle, tracked.entry.shape[0 if expert is None else 1 :]
        if expert is not None and not 0 <= expert < tracked.entry.shape[0]:
            raise LoadError(f"`{tracked.entry.name}` has {tracked.entry.shape[0]} experts, got number {expert}")
        if box is None and len(matrix) == 2:
            box = 0, matrix[0], 0, matrix[1]
        if box is not None:
            row0, row1, col0, col1 = box
            if len(matrix) != 2 or not (0 <= row0 <= row1 <= matrix[0] and 0 <= col0 <= col1 <= matrix[1]):
                raise LoadError(f"rectangle {box} is not in `{tracked.entry.name}`, of shape {tracked.entry.shape}")
            if source.shape == (row1 - row0, col1 - col0) and self.arrivals.take(tracked, expert or 0, box, source):
                return
        view = whole if expert is None else whole[expert]
        if box is not None:
            view = view[row0:row1, col0:col1]
        if view.shape != source.shape:
            place = f"{tuple(view.shape)} of `{tracked.entry.name}`"
            raise LoadError(f"a shard for {place} must be of that shape, got {tuple(source.shape)}")
        self.copy(view, source)

    def take_codes(self, t: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, stored: Scheme) -> bool:
        """Codes and scales for a view of a weight, as they are. Returns False, and has done nothing, where the weight
        is of another format, the view is not of whole groups, or something else was written there before.

        Args:
            t: a view of the weight, of rows.
            q, scale: codes of the shape of `t`; one scale for all of them, or `stored.scale_shape(q.shape)`.
            stored: what one of these scales covers.
        """
        with self._lock:
            self.staging.follow()
            target = self.find(t, written=True)
            tracked = target and target.tracked
            if tracked is None or not tracked.streams or not target.in_elements or tracked.entry.fp8_dtype != q.dtype:
                return False
            if tracked.maxima is not None:  # its scales are told already, and may be others
                return False
            target.locate()
            units, scheme = target.units, tracked.entry.scheme
            found = target.rectangle() if units and t.stride()[-2:] == (tracked.unit_shape[1], 1) else None
            if found is None or tracked.whole_groups(found[0]) != found[0]:
                return False
            box = found[0]
            if tracked.edges:
                scheme = scheme.part(*tracked.segments_in(box))
            exact = scale.dtype == scheme.scale_dtype or scheme.scale_dtype == torch.float32
            exact = exact and (not scheme.pow2 or are_powers_of_two(scale))
            same = tuple(scale.shape) == scheme.scale_shape(q.shape) and have_same_groups(scheme, stored, q.shape)
            fits = scale.numel() == 1 or same
            again = any(unit.final or unit.coverage.overlap_box(box) for unit in units)
            if not exact or not fits or (again and not all(unit.is_made(box) for unit in units)):
                return False
            self.staging.in_use = units
            self._hands.let_go(self._hands.mine(), units)
            tracked.allocate()
            codes, scales = tracked.result_of(target.first, len(units), box)
            q = q.reshape(codes.shape)
            scale = scale.reshape(()).expand(scales.shape) if scale.numel() == 1 else scale.reshape(scales.shape)
            if again:
                self._hands.launch()  # what waits for that is not there to be compared
                if not (are_equal(codes, q) and are_equal(scales, scale.to(scales.dtype))):
                    return False
                self.report.duplicates.append(str(target))
            else:
                self.staging.sources.bring(codes, q)
                self.staging.sources.bring(scales, scale)
                for unit in units:
                    unit.coverage.add_box(box)
                    unit.add_streamed(box)
            self._hands.hold_units(units)
            self.report.shards += 1
            self.report.bytes_in += q.nbytes + scale.nbytes
        return True

    def run(self, func, info: OpInfo, args, kwargs, targets: list[Target]):
        """Carry out an op that reads or writes tracked tensors; returns what the op returns."""
        with self._lock:
            self.staging.follow()
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
            unit.coverage.add_box(unit.tracked.unit_box)  # it may have to wait for other ranks
            self._hands.finish(unit)
        else:
            self._hands.pass_through(unit)

    def maxima_of(self, units: list[Unit]) -> list[torch.Tensor]:
        """The maxima of the groups of complete units."""
        with self._lock:
            self.staging.follow()
            self.staging.in_use = ()
            return [unit.amax() for unit in units]

    def finish_with(self, units: list[Unit], maxima: list[torch.Tensor]):
        """Finish complete units with these maxima in the place of their own."""
        with self._lock:
            self.staging.follow()
            self.staging.in_use = ()
            for unit, amax in zip(units, maxima, strict=True):
                self._hands.finish(unit, amax)

    def let_go(self):
        """Quantize what this thread holds open, so far as it can be."""
        with self._lock:
            self.staging.follow()
            self.staging.in_use = ()
            self._hands.let_go(self._hands.mine())

    def flush(self):
        """Finish every unit that is complete."""
        with self._lock:
            self.staging.follow()
            self.staging.in_use = ()
            self._hands.flush()

    # Reading and writing.

    def _run(self, func, info, args, kwargs, targets, also=()):
        """
        Args:
            also: units that this op is about too: it is a part of one that was split.
        """
        for target in targets:
            target.locate()
        self.staging.in_use = units = [unit for target in targets for unit in target.units]
        written = [t for t in targets if t.written]
        if not written:
            self._hands.settle(targets)
            buffers = [self._readable(t) for t in targets]
            result = call(func, info, args, kwargs, targets, buffers, self.staging)
            self._release(targets, buffers)
            if info.name in COPYING:
                self.copied(args[0], result)
            return result
        if info.is_copy and self._brings_nothing(written[0], targets, args[1]):
            return args[0]
        refuse(info, args, kwargs, targets)
        if len(written) > 1:
            _refuse_shared(written, info)
        quantized = [t for t in written if t.tracked.entry.scheme]
        if quantized and len(targets) == 1 and info.name in _COPIES:
            chunk = self._streams.chunk(written[0])
            if len(units) <= chunk and self._streams.take(func, info, args, kwargs, written[0], also):
                return args[0]
            if len(units) > 1:
                parts = split(args, written[0], chunk if len(units) > chunk else 1)
                if parts:
                    self._hands.settle(targets)
                    held = [unit for unit in self._hands.mine().units if unit in units] or also
                    for part_args in parts:
                        self._run(func, info, part_args, kwargs, self._targets_of(part_args), held)
                    return args[0]
        if any(unit.final for t in quantized for unit in t.units):
            return self._verify(func, info, args, kwargs, targets)
        if quantized and units:  # what this op reads is let go after it
            self._hands.settle(targets)
            self._hands.let_go(self._hands.mine(), [*units, *also])
        before = [self._records.before(t, info, args, kwargs) for t in written]
        buffers = [self._writable(t, info, args, kwargs, targets) if t.written else self._readable(t) for t in targets]
        result = call(func, info, args, kwargs, targets, buffers, self.staging)
        for target, seen in zip(written, before, strict=True):
            if seen is not None:
                seen.append(str(target))
            self._records.add(target, info, args, buffers[targets.index(target)])
            for unit in target.units:
                if unit.scheme is None and not unit.final and unit.coverage.complete:
                    self._hands.pass_through(unit)
        self._release(targets, buffers)
        self._hands.hold_units(unit for t in quantized for unit in t.units)
        return result

    def _refuse_streamed(self, target):
        """Raise where elements that an op has to see are quantized already."""
        for unit in target.units:
            if unit.streamed is not None and any(map(target.meets, unit.streamed.written())):
                raise streamed_error(target, unit, "cannot be read")

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
        self._refuse_streamed(target)
        for unit in target.units:
            unit.zero_gaps()
            unit.read_since_write = True
        return self._gather(target)

    def _brings_nothing(self, target, targets, source):
        """Is that what can be read of these very elements, some of which have not arrived?"""
        if all(unit.has_arrived for unit in target.units):
            return False
        if source is target.tensor:
            return True
        read = next((other for other in targets if not other.written), None)
        if read is not None:
            return _is_same_view(target, read)
        known = isinstance(source, torch.Tensor) and self.echoes and self.echoes.of(source) is target.tracked
        if not known or source.shape != target.tensor.shape or any(u.final or u.streamed for u in target.units):
            return False
        buffer = self._readable(target)
        held = target.view(buffer).to(source.dtype)
        same = source.to(held.device) == held
        if held.is_floating_point():
            same |= source.to(held.device).isnan() & held.isnan()
        self._release([target], [buffer])
        return bool(same.all())

    def _writable(self, target, info, args, kwargs, targets):
        """Real memory for an op to write into."""
        if not target.tracked.entry.scheme:
            return target.tensor
        if not info.replaces(args, kwargs):
            self._refuse_streamed(target)
        for unit in target.units:
            if not info.replaces(args, kwargs):
                unit.zero_gaps()
            unit.open(source_dtype(target, info, args, targets))
            unit.maximum = None
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

    def _verify(self, func, info, args, kwargs, targets):
        """A write to what is quantized: it must say what was said before."""
        written = [t for t in targets if t.written]
        target = written[0]
        if len(written) > 1 or len(target.units) > 1 or not info.replaces(args, kwargs):
            raise LoadError(f"{target} is quantized already; {info.name} cannot change it")
        (unit,) = target.units
        self._hands.let_go(self._hands.mine(), [unit])
        self._hands.launch()
        rectangle = target.rectangle() if info.name in _COPIES and target.in_elements and len(targets) == 1 else None
        if rectangle is not None:
            box, strides = rectangle
            values, result = self._streams.arrive(func, info, args, kwargs, target, box, strides)[0], args[0]
            same = unit.same_codes(values, box)
        else:
            values = self.staging.empty(unit.shape, unit.dtype_for(source_dtype(target, info, args, targets)))
            buffers = [values if t is target else self._readable(t) for t in targets]
            result = call(func, info, args, kwargs, targets, buffers, self.staging)
            self._release([t for t in targets if t is not target], [b for b in buffers if b is not values])
            mask = self._records.written_mask(target, info, args)[0]
            same = unit.same_codes(values, (0, unit.shape[0], 0, unit.shape[1]), mask)
        self.staging.release(values)
        if not same:
            raise ConflictingShardError(f"{target}: it is quantized already, and other values arrived now")
        self._records.count(target, info, args)
        self.report.duplicates.append(str(target))
        return result

    def _targets_of(self, args):
        found = (self.find(x, written=i == 0) for i, x in enumerate(args) if isinstance(x, torch.Tensor))
        return [target for target in found if target]


def _is_same_view(a, b):
    return all(getattr(a, name) == getattr(b, name) for name in ("tracked", "first", "offset", "sizes", "strides"))


def _refuse_shared(written, info):
    """Views of several units are written in a temporary tensor, which would take back what another output wrote."""
    for target in written:
        others = [unit for other in written if other is not target for unit in other.units]
        if len(target.units) > 1 and any(unit in others for unit in target.units):
            raise LoadError(f"{target}: {info.name} must not write one expert by two outputs")
