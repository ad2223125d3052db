"""`LayerwiseLoader`: an engine's own weight loading inside it gives an FP8 model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.distributed import ProcessGroup

from ..errors import UnmatchedPatternError
from ..schemes import PerTensor, Scheme, scheme_name
from .arena import Staging
from .collector import collector_paused
from .copy_counter import CopyCounter
from .fp8_source import copy_codes
from .install import Snapshot, forget_frames, uninterrupted
from .plan import Plan, make_plan
from .poison import check_not_poisoned
from .prefetch import Prefetch
from .ranks import Ranks
from .reload import Reload
from .report import Report
from .rules import as_patterns, matches
from .session import Hooks, Session
from .unit import Unit

_DEFAULT_RULES = {
    "scheme": "per_channel",
    "ignore": (),
    "include": (),
    "schemes": None,
    "dtype": torch.float8_e4m3fn,
    "optional": (),
    "logical_shapes": None,
    "segments": None,
}


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
        scheme, ignore, include, schemes, dtype, optional, logical_shapes, stream, segments: see `make_plan`; by
            default `per_channel`.
        device: where the FP8 model lives and is made; by default the current CUDA device, else the CPU.
        staging_budget: bytes of device memory that high-precision data may take; by default the larger of 256 MiB
            and two of the largest units. Units that are open beyond it wait on the host, in pinned memory.
        on_unit: called with (unit, q, scale) when a unit (a weight, or one expert) is quantized.
        on_module: called with the module when all its tensors are final and installed, once a module.
        on_finish: called with the model when everything is installed, once.
        progress: called with (bytes done, bytes in all, name) when a unit is done; bytes are of the
            high-precision model.
        reload: "transactional" or "streaming", for a model that is FP8 already: new values for the same tensors, at
            the same addresses. Transactional keeps the new values beside the old ones until everything has arrived
            and every hook has returned; a failure leaves the old values. Streaming takes no memory for that; a
            failure leaves the model marked: its modules refuse to run until they are reloaded.
        scope: with `reload`, patterns of what is loaded anew; by default everything.
        offload: patterns of what is on the CPU in the end; its weights are quantized on `device` all the same.
        scale_group: ranks of torch.distributed that load together, for scales equal to those of the whole weight where
            each rank holds a part: a process group, for all `per_tensor` weights and experts; or pattern -> group (or
            None), the first match counts, also for `per_channel` ones, whose rows a rank may hold in part. Such
            weights stay in high precision until all ranks have theirs (within the staging budget, else on the host),
            and a failure on one rank fails all. By default each rank has scales of its own and is on its own.
        amax: parameter -> `max |w|` of its elements, fp32 `[]`, or `[E]` for experts, where that is known before they
            arrive: under `per_tensor` these tell the scales, and shards are quantized as they arrive, as under other
            schemes. Of the whole weight where this rank holds a part, they give each rank the scales of the whole.
            Nothing compares them with what arrives: a larger element saturates.

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
        scheme: str | Scheme | None = None,
        device: torch.device | str | None = None,
        ignore: Iterable[str] = (),
        include: Iterable[str] = (),
        schemes: Mapping[str, str | Scheme] | None = None,
        dtype: torch.dtype = torch.float8_e4m3fn,
        optional: Iterable[str] = (),
        logical_shapes: Mapping[str, tuple[int, ...]] | None = None,
        stream: bool | Mapping[str, bool] = True,
        segments: Mapping[str, Sequence[int]] | None = None,
        staging_budget: int | None = None,
        on_unit: Callable[[Unit, torch.Tensor, torch.Tensor], None] | None = None,
        on_module: Callable[[torch.nn.Module], None] | None = None,
        on_finish: Callable[[torch.nn.Module], None] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        reload: str | None = None,
        scope: Iterable[str] | None = None,
        scale_group: ProcessGroup | Mapping[str, ProcessGroup | None] | None = None,
        offload: Iterable[str] = (),
        amax: Mapping[str, torch.Tensor] | None = None,
    ):
        self.model = model
        self._rules = {
            "scheme": "per_channel" if scheme is None else scheme,
            "ignore": as_patterns("ignore", ignore),
            "include": as_patterns("include", include),
            "schemes": schemes,
            "dtype": dtype,
            "optional": as_patterns("optional", optional),
            "logical_shapes": logical_shapes,
            "stream": stream,
            "segments": segments,
        }
        if staging_budget is not None and staging_budget < 0:
            raise ValueError(f"`staging_budget` must be a number of bytes, got {staging_budget}")
        self._staging_budget = staging_budget
        self._offload = as_patterns("offload", offload)
        self._amax = dict(amax or {})
        if self._amax and scale_group is not None:
            raise ValueError("`amax` must not come with `scale_group`: where maxima are told, ranks have none to share")
        if scope is not None:
            scope = as_patterns("scope", scope)
        self._ranks = None if scale_group is None else Ranks(scale_group)
        self._reload_options = None
        if reload is not None:
            may_be_given = {name: self._rules[name] for name in ("optional", "stream")}
            if self._rules != {**_DEFAULT_RULES, **may_be_given} or scheme is not None or self._offload:
                raise ValueError(
                    "a reload keeps each weight's scheme, dtype, shape and device: give it `scope` and `optional`"
                )
            has_hooks = on_module is not None or on_finish is not None
            self._reload_options = (reload, scope, self._rules["optional"], has_hooks, stream)
            if device is None:
                device = Reload(model, *self._reload_options).device
        elif scope is not None:
            raise ValueError("`scope` must come with `reload`; a first load takes `ignore`")
        self.device = _real_device(device)
        self._plan: Plan | None = None
        self._given: dict[str, torch.Tensor] | None = None  # of a load that is prepared
        self.report = Report()
        self._hooks = Hooks(on_unit, on_module, on_finish, progress)
        self._snapshot: Snapshot | None = None
        self._session: Session | None = None
        self._reload: Reload | None = None

    @property
    def plan(self) -> Plan:
        """What becomes of the model; made when it is first asked for, and anew when the context is entered."""
        if self._plan is None:
            self._plan = self._first_plan()
        return self._plan

    def __enter__(self) -> LayerwiseLoader:
        if self._session is not None:
            raise RuntimeError("this loader's context is entered already")
        try:
            with collector_paused():
                self._snapshot = Snapshot(self.model)
                if self._given is None:
                    self._plan, self._reload = self._make_plan()
                self._start()
            return self
        except BaseException as failure:
            uninterrupted(self._undo, failure)
            raise

    def _start(self):
        schemes = sorted({scheme_name(scheme) for scheme in {e.scheme for e in self.plan.quantized}})
        self.report = Report(scheme=", ".join(schemes), device=str(self.device), rebuild=list(self.plan.rebuild))
        sources = Prefetch(self.device) if self.device.type == "cuda" else None
        staging = Staging(self.device, self.plan.largest_unit, self._staging_budget, sources)
        self._session = Session(
            self.model,
            self.plan,
            staging,
            self.report,
            self._hooks,
            self._reload,
            self._ranks,
            self._offload,
            self._amax,
        )
        self._session.given = self._given
        self._session.start()

    def __exit__(self, kind, error, traceback):
        if self._session is None:
            raise RuntimeError("this loader's context is not entered, or was left already")
        try:
            self._session.stop()
            with collector_paused():
                self._session.finish(self._snapshot, error)
            if error is not None:
                uninterrupted(self._undo, error)
        except BaseException as failure:
            uninterrupted(self._undo, failure)
            raise
        uninterrupted(self._let_go)

    @contextlib.contextmanager
    def worker(self):
        """The context for a thread, other than the one that entered the loader, that loads weights too."""
        if self._session is None:
            raise RuntimeError("the loader's context must be entered before a worker's")
        with CopyCounter(self._session.writes):
            yield self
        if self._session is not None:
            self._session.writes.let_go()

    def copy_codes(self, t: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, scheme: str | Scheme | None = None):
        """`t.copy_(w)` for a `w` that is FP8 already, with its scale.

        Where `t` becomes FP8 of the same dtype with scales for the same groups, codes and scales are taken as they are;
        anywhere else `q * scale`, in float32, is copied into `t` and becomes what the plan says.

        Args:
            t: a parameter of the model or a view of it, as the engine would copy into.
            q: FP8, the shape of `t`.
            scale: `w ~ q * scale`: one for all of `q`, or of the scheme's `scale_shape`.
            scheme: what one scale covers; told from the shapes where it is not given, as 128 x 128 where these are
                those of 128 x 128 blocks.

        Raises:
            LoadError: other shapes or dtypes, or NaN in the codes; the message names the weight.
            ValueError: the shapes do not tell what one scale covers.
        """
        if self._session is None:
            raise RuntimeError("the loader's context must be entered before codes are copied")
        copy_codes(self._session.writes, t, q, scale, scheme)

    def fill_dummy(self, seed: int = 0):
        """Give everything that has not arrived generated values, for measurements without a checkpoint.

        The same plan, units, kernels and memory as a real load. Weights are uniform within `+-1 / sqrt(K)`, vectors 1,
        biases and integers 0; the same seed gives the same values on the same kind of device.
        """
        if self._session is None:
            raise RuntimeError("the loader's context must be entered before the model is filled")
        self._session.fill_dummy(seed)

    def _first_plan(self):
        if self._reload_options is None:
            return self._make_plan()[0]
        snapshot = Snapshot(self.model)
        try:
            return self._make_plan()[0]
        finally:
            uninterrupted(snapshot.restore)

    def take_plan(self, plan: Plan):
        """Load by this plan, which `make_plan` made by the same rules, of the model as it is now."""
        check_not_poisoned(self.model)
        self._plan = self._checked(plan)

    def prepared(self, given: Mapping[str, torch.Tensor] | None) -> LayerwiseLoader:
        """Enter the context next, for a first load that was prepared: nothing has changed the model since there is a
        plan, and memory is reserved.

        Args:
            given: by name, tensors that pass through, on `device`, to become the model's in the place of new ones.
                Their values still have to arrive. None for a load that was not prepared.
        """
        self._given = None if given is None else dict(given)
        return self

    def _make_plan(self):
        """The plan, and for a reload the state of the model that it is about."""
        if self._reload_options is None:
            check_not_poisoned(self.model)
            with collector_paused():
                reload, plan = None, make_plan(self.model, **self._rules)
        else:
            reload = Reload(self.model, *self._reload_options)
            plan = reload.present()
        return self._checked(plan), reload

    def _checked(self, plan):
        """The plan, which this loader can load; as all ranks see it."""
        plan.check_loadable()
        unused = [p for p in self._offload if not any(matches(p, name) for e in plan.entries for name in e.names)]
        if unused:
            raise UnmatchedPatternError(f"no tensor is matched by {', '.join(map(repr, unused))} of `offload`")
        if self._ranks is not None:
            plan = self._ranks.checked(plan)
        _check_amax(self._amax, plan)
        return plan

    def _undo(self, error):
        """Bring the model back; may be called again."""
        if self._session is not None:
            self._session.stop()
        if self._snapshot is not None:
            self._snapshot.restore()
            if self._reload is not None and self._session is not None:
                self._reload.poison(self._session.changed())
        self._let_go()
        forget_frames(error)

    def _let_go(self):
        """Drop every buffer and every reference into the model; may be called again."""
        if self._session is not None:
            self._session.close()
        self._snapshot = self._session = self._reload = self._given = None


def _check_amax(amax, plan):
    entries = {name: entry for entry in plan.entries for name in entry.names}
    for name, known in amax.items():
        if name not in entries:
            raise ValueError(f"`amax` must name tensors of the model, got {name!r}")
        shape = PerTensor().scale_shape(entries[name].shape)
        if not isinstance(known, torch.Tensor) or known.dtype != torch.float32 or tuple(known.shape) != shape:
            found = f"{known.dtype} {tuple(known.shape)}" if isinstance(known, torch.Tensor) else repr(known)
            raise ValueError(f"`amax` of `{name}` must be float32 of shape {shape}, got {found}")
        bad = known[~(known.isfinite() & (known >= 0))]
        if bad.numel():
            raise ValueError(f"`amax` of `{name}` must be finite and no less than 0, got {bad[0].item()}")


def _real_device(device):
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("`device` must be a real device, got meta")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
