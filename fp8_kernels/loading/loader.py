"""`LayerwiseLoader`: an engine's own weight loading inside it gives an FP8 model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import LoadError
from ..schemes import Scheme, scheme_name
from .checks import check_complete, check_finite, check_nothing_on_meta
from .copy_counter import CopyCounter
from .install import Snapshot, exchange
from .plan import Entry, Plan, make_plan
from .report import Report
from .staging import Staging, Tracked, Unit
from .writes import Writes


class LayerwiseLoader:
    """A context in which whatever is written to a model's weights becomes FP8 as soon as a weight is complete.

    Inside, the model's own loading code runs unchanged: `copy_`, `narrow`, `weight_loader(...)`, assignment by
    index, `p.data = w`. Leaving the context checks that everything arrived and installs the results: each
    quantized parameter is then FP8, without gradient, and beside it is `<leaf>_scale` (`weight_scale`,
    `w13_scale`). On any exception the model is exactly as it was.

        with LayerwiseLoader(model, scheme="per_channel", ignore=["lm_head"]) as loader:
            model.load_weights(weights)
        print(loader.report)

    Args:
        model: its parameters that become FP8 on the meta device; others on meta (they become real on `device`
            when the context is entered) or real (used as they are).
        scheme, ignore, include, schemes, dtype, optional, logical_shapes: see `make_plan`.
        device: where the FP8 model lives and is made; by default the current CUDA device, else the CPU.
        on_unit: called with (unit, q, scale) when a unit (a weight, or one expert) is quantized.
        on_module: called with the module when all its tensors are final and installed, once a module.
        on_finish: called with the model when everything is installed, once.
        progress: called with (bytes done, bytes in all, name) when a unit is done; bytes are of the
            high-precision model.

    Attributes:
        plan: the `Plan`; also there before the context is entered.
        report: the `Report`; complete after the context is left. On CUDA, entering the context resets torch's peak
            memory statistics of the device, from which the report's peaks are.

    Raises:
        ValueError: at construction, for a model that cannot be loaded so; the message names the way out.
        IncompleteLoadError: on leaving, where something never arrived.
        NonFiniteWeightError: on leaving, where weights hold NaN or Inf.
        ConflictingShardError: inside, where a second, different value arrives for what is quantized already.
        LoadError: inside, for data that cannot become a weight.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        scheme: str | Scheme = "per_channel",
        device: torch.device | str | None = None,
        ignore: Iterable[str] = (),
        include: Iterable[str] = (),
        schemes: Mapping[str, str | Scheme] | None = None,
        dtype: torch.dtype = torch.float8_e4m3fn,
        optional: Iterable[str] = (),
        logical_shapes: Mapping[str, tuple[int, ...]] | None = None,
        on_unit: Callable[[Unit, torch.Tensor, torch.Tensor], None] | None = None,
        on_module: Callable[[torch.nn.Module], None] | None = None,
        on_finish: Callable[[torch.nn.Module], None] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ):
        self.model = model
        self.device = _real_device(device)
        self._rules = {
            "scheme": scheme,
            "ignore": tuple(ignore),
            "include": tuple(include),
            "schemes": schemes,
            "dtype": dtype,
            "optional": tuple(optional),
            "logical_shapes": logical_shapes,
        }
        self.plan: Plan = make_plan(model, **self._rules)
        self.plan.check_loadable()
        self.report = Report()
        self._on_unit, self._on_module, self._on_finish, self._progress = on_unit, on_module, on_finish, progress
        self._exits: contextlib.ExitStack | None = None

    def __enter__(self) -> LayerwiseLoader:
        if self._exits is not None:
            raise RuntimeError("this loader's context is entered already")
        self.plan = make_plan(self.model, **self._rules)
        self.plan.check_loadable()
        self._started = time.perf_counter()
        self._snapshot = Snapshot(self.model)
        self._staging = Staging(self.device)
        self._bytes_done = 0
        schemes = sorted({scheme_name(e.scheme) for e in self.plan.quantized})
        self.report = Report(scheme=", ".join(schemes), device=str(self.device))
        self.report.rebuild = list(self.plan.rebuild)
        self._writes = Writes(self._staging, self.report, self._on_unit, self._tensor_is_final, self._advance)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self._track_all()
            with contextlib.ExitStack() as exits:
                for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook):
                    exits.callback(register(self._registered).remove)
                exits.enter_context(CopyCounter(self._writes))
                self._exits = exits.pop_all()
        except BaseException:
            self._roll_back()
            raise
        return self

    def __exit__(self, kind, error, traceback):
        self._exits.close()
        try:
            if error is None:
                self._finish()
        except BaseException:
            self._roll_back()
            raise
        if error is not None:
            self._roll_back()
        self._let_go()

    @contextlib.contextmanager
    def worker(self):
        """The context for a thread, other than the one that entered the loader, that loads weights too."""
        if self._exits is None:
            raise RuntimeError("the loader's context must be entered before a worker's")
        with CopyCounter(self._writes):
            yield self

    # Setting up.

    def _track_all(self):
        self._tracked: list[Tracked] = []
        self._at: dict[tuple[int, str], Tracked] = {}  # (module, leaf) -> what is registered there
        self._waiting: dict[torch.nn.Module, int] = {}  # how many of its tensors are not final
        for entry in self.plan.entries:
            if entry.scheme is None:
                self.report.passed_through[entry.name] = entry.why
                if entry.on_meta:
                    self._make_real(entry)
            if not entry.tracked:
                continue
            tracked = Tracked(entry, self._staging)
            self._tracked.append(tracked)
            for place in tracked.places:
                self._at[id(place.module), place.leaf] = tracked
            for t in entry.tensors:
                self._writes.track(tracked, t)
            for module in tracked.modules:
                self._waiting[module] = self._waiting.get(module, 0) + 1

    def _make_real(self, entry: Entry):
        first = entry.tensors[0]
        real = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device=self.device)
        if entry.logical != entry.shape or entry.optional:
            real.zero_()
        for t in entry.tensors:
            exchange(t, real, t.requires_grad)

    # While the engine loads.

    def _registered(self, module, leaf, value):
        """A tensor takes the place of a tracked one (`module.weight = Parameter(w)`): that is a write of it."""
        tracked = self._at.get((id(module), leaf))
        if tracked is None or value is None or tracked.installed or value.is_meta or self._writes.owner(value):
            return None
        self._writes.assign(tracked, tracked.handle, value)
        place = next(p for p in tracked.places if p.module is module and p.leaf == leaf)
        return place.registry.get(leaf, tracked.entry.tensors[0])

    def _tensor_is_final(self, tracked: Tracked):
        if self._on_module is None:
            return
        for module in tracked.modules:
            self._waiting[module] -= 1
            if not self._waiting[module]:
                self._install_module(module)

    def _install_module(self, module):
        for tracked in self._tracked:
            if module in tracked.modules:
                self._install(tracked)
        if self._on_module is not None:
            self._on_module(module)

    def _install(self, tracked: Tracked):
        if tracked.installed or tracked.entry.scheme is None:
            return
        tracked.installed = True
        tracked.allocate(self.device)  # a weight without experts has had no unit to do it
        for t in {id(t): t for t in (p.registry[p.leaf] for p in tracked.places)}.values():
            exchange(t, tracked.q)
        self._writes.track(tracked, tracked.q)  # what still arrives is verified
        scale = torch.nn.Parameter(tracked.scale, requires_grad=False)
        for place in tracked.places:
            place.module.register_parameter(f"{place.leaf}_scale", scale)
        self.report.quantized_tensors += 1

    def _advance(self, unit: Unit):
        if self._progress is not None:
            entry = unit.tracked.entry
            self._bytes_done += entry.bytes_in // len(unit.tracked.units)
            self._progress(self._bytes_done, self.plan.bytes_in, str(unit))

    # The end.

    def _finish(self):
        started, quantizing = time.perf_counter(), self.report.seconds_by_phase.get("quantize", 0.0)
        if self._writes.error is not None:
            raise self._writes.error
        self._follow_replaced()
        self._writes.flush()
        for tracked in self._tracked:
            self._fill_in(tracked)
        check_complete(self._tracked, self.report.shards)
        check_finite(self._tracked)
        for tracked in self._tracked:
            self._install(tracked)
        check_nothing_on_meta(self.model, self.plan)
        if self._on_module is not None:
            for module, count in self._waiting.items():
                if count:
                    self._on_module(module)
        if self._on_finish is not None:
            self._on_finish(self.model)
        self._complete_report(started, quantizing)

    def _follow_replaced(self):
        """Find by identity what no op tells of: tensors that were tied, replaced or exchanged meanwhile."""
        for tracked in self._tracked:
            for place in list(tracked.places):
                current = place.registry.get(place.leaf)
                if tracked.installed:
                    continue
                if current is None:
                    raise LoadError(f"`{place.name}` was removed from its module while it was loaded")
                owner = self._writes.owner(current)
                if owner is None:
                    if current.is_meta:
                        raise LoadError(f"`{place.name}` was replaced by another tensor on meta while it was loaded")
                    self._writes.assign(tracked, tracked.handle, current)
                    place.registry[place.leaf] = held = tracked.object_at[place]
                    if self._writes.owner(held) is None:
                        exchange(held, tracked.handle, held.requires_grad)
                elif owner is not tracked:  # tied to another parameter
                    tracked.places.remove(place)
                    owner.places.append(place)
                elif tuple(current.shape) != tracked.entry.shape:
                    raise LoadError(
                        f"`{place.name}` must keep the shape {tracked.entry.shape} while it loads, got "
                        f"{tuple(current.shape)}; change layouts in `on_module` or `on_finish`"
                    )
        self._tracked = [tracked for tracked in self._tracked if tracked.places]

    def _fill_in(self, tracked):
        """Finish what nothing has to arrive for: units without elements, and optional tensors that did not."""
        absent = tracked.entry.optional and all(not u.final and u.coverage.empty for u in tracked.units)
        if absent:
            self.report.defaulted.append(tracked.entry.name)
        for unit in tracked.units:
            if not unit.final and (absent or unit.coverage.complete):
                self._writes.finish_as_it_is(unit)

    def _complete_report(self, started, quantizing):
        report = self.report
        report.bytes_out = sum(tracked.entry.bytes_out for tracked in self._tracked)
        report.peak_staging_bytes = self._staging.peak
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            report.resident = torch.cuda.memory_allocated(self.device)
            report.peak_allocated = torch.cuda.max_memory_allocated(self.device)
            report.peak_reserved = torch.cuda.max_memory_reserved(self.device)
        now = time.perf_counter()
        report.seconds = now - self._started
        phases = report.seconds_by_phase
        phases["load"] = started - self._started - quantizing
        phases["finish"] = now - started - (phases.get("quantize", 0.0) - quantizing)

    def _roll_back(self):
        self._snapshot.restore()
        self._let_go()

    def _let_go(self):
        """Drop every buffer and every reference into the model."""
        self._exits = self._writes = self._staging = self._snapshot = None
        self._tracked, self._at, self._waiting = [], {}, {}


def _real_device(device):
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("`device` must be a real device, got meta")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
