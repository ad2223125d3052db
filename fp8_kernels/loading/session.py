"""One load, from entering the loader's context to leaving it: what is tracked, installed and checked."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import LoadError
from ..ops import FP8_DTYPES
from .arena import Staging, outliving
from .checks import check_complete, check_finite, check_nothing_on_meta
from .copy_counter import BelowModes, CopyCounter
from .coverage import Box
from .install import Snapshot, exchange
from .origin import remember
from .plan import Entry, Plan
from .ranks import Ranks
from .reload import Reload
from .report import Report
from .reserve import LARGEST_BYTES, SMALL_BYTES, reserve
from .rules import matches
from .staging import Tracked
from .unit import Unit
from .writes import Writes

_SLACK_BYTES = 96 << 20  # of staging and of what is read ahead


@dataclass(frozen=True)
class Hooks:
    """What a caller is told of a load; see `LayerwiseLoader`."""

    on_unit: Callable[[Unit, torch.Tensor, torch.Tensor], None] | None = None
    on_module: Callable[[torch.nn.Module], None] | None = None
    on_finish: Callable[[torch.nn.Module], None] | None = None
    progress: Callable[[int, int, str], None] | None = None


class Session:
    """The state of one load.

    Args:
        model, plan: what is loaded; the plan's tensors on meta or real.
        staging: where open units wait, and the device.
        report: counts what happens.
        hooks: of the caller.
        reload: what the model holds already; None for its first load.
        ranks: the others that load with this one; None if it is alone.
        offload: patterns of what is on the CPU in the end.
        amax: maxima of `per_tensor` weights that are known before they arrive.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        staging: Staging,
        report: Report,
        hooks: Hooks,
        reload: Reload | None = None,
        ranks: Ranks | None = None,
        offload: tuple[str, ...] = (),
        amax: Mapping[str, torch.Tensor] | None = None,
    ):
        self._offload, self._amax = offload, amax or {}
        self.model, self.plan, self.report, self._reload, self._ranks = model, plan, report, reload, ranks
        self._staging = staging
        self._hooks = Hooks(*map(self._on_device, (hooks.on_unit, hooks.on_module, hooks.on_finish)), hooks.progress)
        self._device = staging.device
        self._started = time.perf_counter()
        self._bytes_done = 0
        self._exits, self._mode = contextlib.ExitStack(), None
        self.given: dict[str, torch.Tensor] | None = None  # see `LayerwiseLoader.prepared`
        advance = None if hooks.progress is None else self._advance
        may_wait = hooks.on_unit is None and hooks.on_module is None
        self.writes = Writes(staging, report, self._hooks.on_unit, self._tensor_is_final, advance, may_wait)
        self.tracked: list[Tracked] = []
        self._at: dict[tuple[int, str], Tracked] = {}  # (module, leaf) -> what is registered there
        self._named: dict[str, Tracked] = {}
        self._waiting: dict[torch.nn.Module, int] = {}  # how many of its tensors are not final

    def start(self):
        """From now on, what this thread writes to the plan's tensors is seen."""
        if self._reload is None and self.given is None:
            for entry in self.plan.passed_through:
                if self._bytes_to_make(entry) > LARGEST_BYTES:  # apart, so that the rest can be reserved
                    self._make_real(entry)
            sizes = [size for size in map(self._bytes_to_make, self.plan.entries) if size > SMALL_BYTES]
            reserve(self._device, sum(sizes), max(sizes, default=0), _SLACK_BYTES)
        if self._device.type == "cuda":
            torch.cuda.init()  # a load may be the first that the process does on a GPU
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._reload is not None:
            self._reload.stage(self.plan)
            for name, t in self._reload.frozen:
                self.writes.freeze(name, t)
        for entry in self.plan.entries:
            self._track(entry)
        for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook):
            self._exits.callback(register(self._registered).remove)
        self._mode = CopyCounter(self.writes)
        self._mode.__enter__()

    def write_box(self, name: str, expert: int | None, box: Box | None, source: torch.Tensor):
        """Write a shard to where it belongs, past the mode: for loaders of our own, of which each op's cost counts.

        Coverage, checks, errors and results are those of `copy_` into that view of the parameter; a thread needs no
        `worker()` for it, but has to call `writes.let_go()` when it has written its last.

        Args:
            name: of a tensor of the plan, any that it is known under.
            expert, box, source: see `Writes.write_box`.

        Raises:
            KeyError: nothing of that name is loaded.
            LoadError, ConflictingShardError: as for any write.
        """
        with BelowModes():
            self.writes.write_box(self._named[name], expert, box, source)

    def stop(self):
        """The end of loading: ops go their usual way again. May be called again."""
        if self._mode is not None:
            self._mode.leave()
        self._exits.close()

    def close(self):
        """Let go of every buffer and of the model, also where something still refers to this session."""
        self.stop()
        if self.writes is not None:
            self.writes.forget()
        for tracked in self.tracked:  # which refer to their units, and these to them
            for unit in tracked.units:
                unit.buffer = unit.spilled = None
                unit.shards.clear()
            tracked.units, tracked.q, tracked.scale, tracked.handle = [], None, None, None
        if self._staging is not None:
            self._staging.close()
        self.writes = self._staging = self._hooks = self.model = self._mode = None
        self.tracked, self._at, self._named, self._waiting, self.given = [], {}, {}, {}, None

    def _track(self, entry):
        if entry.scheme is None:
            self.report.passed_through[entry.name] = entry.why
            self.report.fp8_tensors += entry.dtype in FP8_DTYPES
            if entry.on_meta:
                self._make_real(entry)
        if not entry.tracked:
            for t in entry.tensors if self._reload is not None else ():
                self.writes.watch(entry, t)
            return
        tracked = Tracked(entry, self._staging)
        tracked.device = self._device_of(entry)
        if tracked.one_scale:
            known = next((self._amax[name] for name in entry.names if name in self._amax), None)
            tracked.maxima = known if known is None else known.to(self._device)
        if self._reload is not None:
            self._reload.prepare(tracked)
        tracked.waits_for_ranks = self._ranks is not None and self._ranks.shares(entry)
        self.tracked.append(tracked)
        for place in tracked.places:
            self._at[id(place.module), place.leaf] = tracked
        self._named.update(dict.fromkeys(entry.names, tracked))
        for t in entry.tensors:
            self.writes.track(tracked, t)
        for module in tracked.modules:
            self._waiting[module] = self._waiting.get(module, 0) + 1

    def _device_of(self, entry):
        """Where an entry is when it is loaded."""
        offloaded = any(matches(pattern, name) for pattern in self._offload for name in entry.names)
        return torch.device("cpu") if offloaded else self._device

    def _bytes_to_make(self, entry):
        """Of the tensor that an entry becomes on the load's device; 0 where it is there already."""
        makes = entry.on_meta and self._device_of(entry) == self._device
        return math.prod(entry.shape) * (1 if entry.scheme else entry.dtype.itemsize) if makes else 0

    def _make_real(self, entry: Entry):
        first = entry.tensors[0]
        real = self.given.pop(entry.name, None) if self.given else None
        if real is None:
            device = self._device_of(entry)
            with outliving():
                real = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device=device)
        if entry.logical != entry.shape or entry.optional:
            real.zero_()
        for t in entry.tensors:
            exchange(t, real, t.requires_grad)

    def fill_dummy(self, seed: int):
        """Write generated values to everything that has not arrived, unit by unit, as an engine's loader would."""
        for tracked in self.tracked:
            shape, logical = tracked.handle.shape, tracked.entry.logical
            target = tracked.handle[tuple(slice(size) for size in logical)] if logical != shape else tracked.handle
            units = [target] if tracked.entry.scheme is None or target.ndim == 2 else list(target)
            for unit, part in zip(tracked.units, units, strict=True):
                if not unit.has_arrived:
                    _generate(part, str(unit), seed, self._device if part.is_meta else part.device)

    # While the engine loads.

    def _registered(self, module, leaf, value):
        """A tensor takes the place of a tracked one (`module.weight = Parameter(w)`): that is a write of it."""
        tracked = self._at.get((id(module), leaf))
        if tracked is None or value is None or tracked.installed or value.is_meta or self.writes.owner(value):
            return None
        self.writes.assign(tracked, tracked.handle, value)
        place = next(p for p in tracked.places if p.module is module and p.leaf == leaf)
        return tracked.object_at[place]  # not what is there now, which may be a copy of it, or tied to another

    def _tensor_is_final(self, tracked: Tracked):
        if self._hooks.on_module is None:
            return
        for module in tracked.modules:
            self._waiting[module] -= 1
            if not self._waiting[module]:
                self._install_module(module)

    def _install_module(self, module):
        for leaf in (*module._parameters, *module._buffers):
            tracked = self._at.get((id(module), leaf))
            if tracked is not None:
                self._install(tracked)
        if self._hooks.on_module is not None:
            self._hooks.on_module(module)

    def _install(self, tracked: Tracked):
        if tracked.installed or tracked.entry.scheme is None:
            return
        tracked.installed = True
        tracked.allocate()  # a weight without experts has had no unit to do it
        for t in {id(t): t for t in (p.registry[p.leaf] for p in tracked.places)}.values():
            exchange(t, tracked.q)
        self.writes.track(tracked, tracked.q)  # what still arrives is verified
        scale = torch.nn.Parameter(tracked.scale, requires_grad=False)
        for place in tracked.places:
            place.module.register_parameter(f"{place.leaf}_scale", scale)
        self.report.quantized_tensors += 1

    def _advance(self, unit: Unit):
        entry = unit.tracked.entry
        self._bytes_done += entry.bytes_in // len(unit.tracked.units)
        self._hooks.progress(self._bytes_done, self.plan.bytes_in, str(unit))

    def _on_device(self, hook):
        """The hook, called with the load's device as the current one, on whichever thread."""
        if hook is None:
            return None

        def called(*args):
            with staging.on_device():
                hook(*args)

        staging = self._staging
        return called

    # The end.

    def finish(self, snapshot: Snapshot, error: BaseException | None):
        """Check that everything arrived, install the results and call the hooks; a reload then commits.

        Args:
            snapshot: of the model before the load.
            error: why the load has failed already. There is nothing to finish then, but to tell the other ranks.
        """
        started, quantizing = time.perf_counter(), self.report.seconds_by_phase.get("quantize", 0.0)
        maxima = []
        with self._agreed(error):
            if error is None:
                self._check_arrived(snapshot)
                maxima = self.writes.maxima_of(self._shared_units())
        if error is not None:
            return
        with self._agreed():
            self._conclude(maxima)
        if self._reload is not None:
            self._reload.commit(snapshot, self.tracked)
        self._complete_report(started, quantizing)
        if self._reload is None:
            remember(self.plan, self.tracked)

    @contextlib.contextmanager
    def _agreed(self, error=None):
        """A step that all ranks have to succeed in before any goes on."""
        try:
            yield
        except BaseException as failure:
            if self._ranks is not None:
                self._ranks.agree(failure, [], self._device)
            raise
        if self._ranks is not None:
            self._ranks.agree(error, self._shared_units(), self._device)

    def _shared_units(self):
        return [u for tracked in self.tracked if tracked.waits_for_ranks for u in tracked.units if not u.final]

    def _check_arrived(self, snapshot):
        if self.writes.failure is not None:
            raise self.writes.failure
        self._follow_replaced()
        self.writes.flush()
        for tracked in list(self.tracked):
            self._fill_in(tracked, snapshot)
        check_complete(self.tracked, self.report.shards)

    def _conclude(self, maxima):
        if self._ranks is not None:
            units = self._shared_units()
            self.writes.finish_with(units, self._ranks.share(units, maxima, self._device))
        check_finite(self.tracked)
        for tracked in self.tracked:
            self._install(tracked)
        check_nothing_on_meta(self.model, self.plan)
        if self._hooks.on_module is not None:
            for module, count in self._waiting.items():
                if count:
                    self._hooks.on_module(module)
        if self._hooks.on_finish is not None:
            self._hooks.on_finish(self.model)

    def _follow_replaced(self):
        """Find by identity what no op tells of: tensors that were tied, replaced or exchanged meanwhile."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for tracked in self.tracked:
            for place in list(tracked.places):
                current = place.registry.get(place.leaf)
                if tracked.installed:
                    continue
                owner = modules.get(place.name.rpartition(".")[0])
                if owner not in (None, place.module) and hasattr(owner, place.leaf):
                    raise LoadError(
                        f"`{place.name}` is that of another module now, which nothing was loaded into: replace modules "
                        "before the context, in `on_module` or in `on_finish`"
                    )
                if current is None:
                    raise LoadError(f"`{place.name}` was removed from its module while it was loaded")
                owner = self.writes.owner(current)
                if owner is None:
                    if current.is_meta:
                        raise LoadError(f"`{place.name}` was replaced by another tensor on meta while it was loaded")
                    self.writes.assign(tracked, tracked.handle, current)
                    place.registry[place.leaf] = held = tracked.object_at[place]
                    if self.writes.owner(held) is None:
                        exchange(held, tracked.handle, held.requires_grad)
                elif owner is not tracked:  # tied to another parameter
                    tracked.places.remove(place)
                    owner.places.append(place)
                    self._at[id(place.module), place.leaf] = owner
                elif tuple(current.shape) != tracked.entry.shape:
                    raise LoadError(
                        f"`{place.name}` must keep the shape {tracked.entry.shape} while it loads, got "
                        f"{tuple(current.shape)}; change layouts in `on_module` or `on_finish`"
                    )
        self.tracked = [tracked for tracked in self.tracked if tracked.places]

    def changed(self) -> dict[torch.nn.Module, list[str]]:
        """Module -> names of its tensors in which something has arrived."""
        names: dict[torch.nn.Module, list[str]] = {}
        arrived = [t.places for t in self.tracked if any(u.final or not u.coverage.empty for u in t.units)]
        for place in (place for places in (*arrived, *(e.places for e in self.writes.touched)) for place in places):
            names.setdefault(place.module, []).append(place.name)
        return names

    def _fill_in(self, tracked, snapshot):
        """Finish what nothing has to arrive for: units without elements, and optional tensors that did not."""
        absent = tracked.entry.optional and all(not u.final and u.coverage.empty for u in tracked.units)
        if absent:
            self.report.defaulted.append(tracked.entry.name)
            if self._reload is not None:
                self._keep(tracked, snapshot)
                return
        for unit in tracked.units:
            if not unit.final and (absent or unit.coverage.complete):
                self.writes.finish_as_it_is(unit)

    def _keep(self, tracked, snapshot):
        """An optional tensor that did not arrive keeps what it was."""
        self.tracked.remove(tracked)
        for place in tracked.places:
            snapshot.put_back(place.module, place.leaf)
        for module in tracked.modules:
            if not any(module in other.modules for other in self.tracked):
                del self._waiting[module]

    def _complete_report(self, started, quantizing):
        report = self.report
        report.bytes_out = sum(tracked.entry.bytes_out for tracked in self.tracked)
        brought = self._staging.sources.summary()
        if brought is not None and report.transfer is None:
            report.transfer, report.transfer_bytes, report.transfer_seconds = brought
        report.peak_staging_bytes = self._staging.peak
        report.spills, report.spilled_bytes = self._staging.spills, self._staging.spilled_bytes
        self._staging.close()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            report.resident = torch.cuda.memory_allocated(self._device)
            report.peak_allocated = torch.cuda.max_memory_allocated(self._device)
            report.peak_reserved = torch.cuda.max_memory_reserved(self._device)
        now = time.perf_counter()
        report.seconds = now - self._started
        phases = report.seconds_by_phase
        phases["load"] = started - self._started - quantizing
        phases["finish"] = now - started - (phases.get("quantize", 0.0) - quantizing)


def _generate(t, name, seed, device):
    """Values that a model computes with and stays finite: small weights, norms of 1, biases of 0."""
    if not t.is_floating_point() or t.element_size() == 1 or name.endswith("bias"):
        t.zero_()
    elif t.ndim < 2:
        t.fill_(1)
    else:
        generator = torch.Generator(device)
        bound = t.size(-1) ** -0.5 if t.numel() else 0.0
        t.uniform_(-bound, bound, generator=generator.manual_seed(seed ^ zlib.crc32(name.encode())))
