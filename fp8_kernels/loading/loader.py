"""`LayerwiseLoader`: an engine's own weight loading inside it gives an FP8 model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping

import torch

from ..schemes import Scheme, scheme_name
from .copy_counter import CopyCounter
from .install import Snapshot
from .plan import Plan, make_plan
from .report import Report
from .session import Hooks, Session
from .staging import Staging, Unit


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
        self._hooks = Hooks(on_unit, on_module, on_finish, progress)
        self._session: Session | None = None

    def __enter__(self) -> LayerwiseLoader:
        if self._session is not None:
            raise RuntimeError("this loader's context is entered already")
        self.plan = make_plan(self.model, **self._rules)
        self.plan.check_loadable()
        schemes = sorted({scheme_name(e.scheme) for e in self.plan.quantized})
        self.report = Report(scheme=", ".join(schemes), device=str(self.device), rebuild=list(self.plan.rebuild))
        self._snapshot = Snapshot(self.model)
        self._session = Session(self.model, self.plan, Staging(self.device), self.report, self._hooks)
        try:
            self._session.start()
        except BaseException:
            self._roll_back()
            raise
        return self

    def __exit__(self, kind, error, traceback):
        self._session.stop()
        try:
            if error is None:
                self._session.finish()
        except BaseException:
            self._roll_back()
            raise
        if error is not None:
            self._roll_back()
        else:
            self._let_go()

    @contextlib.contextmanager
    def worker(self):
        """The context for a thread, other than the one that entered the loader, that loads weights too."""
        if self._session is None:
            raise RuntimeError("the loader's context must be entered before a worker's")
        with CopyCounter(self._session.writes):
            yield self

    def _roll_back(self):
        self._snapshot.restore()
        self._let_go()

    def _let_go(self):
        """Drop every buffer and every reference into the model."""
        self._session.close()
        self._session = self._snapshot = None


def _real_device(device):
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("`device` must be a real device, got meta")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
