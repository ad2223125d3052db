"""The adapter of this project's own loader, which is also what an adapter looks like."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

from ..errors import ConflictingShardError, IncompleteLoadError, LoadError, NonFiniteWeightError, PoisonedModelError
from ..load import load_checkpoint
from ..loading import LayerwiseLoader
from ..loading.poison import check_not_poisoned
from .case import NEEDS
from .runner import Adapter
from .session import Session


class LayerwiseAdapter(Adapter):
    """Runs cases against `fp8_kernels.LayerwiseLoader`."""

    name = "fp8_kernels"
    offers = frozenset(NEEDS) - {"cuda"}
    restores = True
    errors = {
        "incomplete": IncompleteLoadError,
        "conflict": ConflictingShardError,
        "non_finite": NonFiniteWeightError,
        "load": LoadError,
    }

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.offers = self.offers | {"cuda"}

    def enter(self, session: Session):
        load = session.load
        options = dict(load.facts)
        if "reads_back" in options:
            options["stream"] = dict.fromkeys(options.pop("reads_back"), False)
        if "scale_group" in options:
            options["scale_group"] = dict.fromkeys(options["scale_group"], torch.distributed.group.WORLD)
        if "progress" in session.case.needs:
            names = {module: name for name, module in session.model.named_modules()}
            options["on_module"] = lambda module: session.finished.append(names[module])
        for name in ("on_module", "on_finish"):
            if getattr(load, name) is not None:
                options[name] = functools.partial(getattr(load, name), session)
        if load.mode == "first":
            options |= {"scheme": session.case.scheme, "device": self.device}
        else:
            options["reload"] = load.mode
        return LayerwiseLoader(session.model, **options)

    def worker(self, session: Session):
        return session.handle.worker()

    def fill_dummy(self, session: Session):
        session.handle.fill_dummy()

    def load_checkpoint(self, model: torch.nn.Module, folder: Path, scheme: str):
        load_checkpoint(model, folder, scheme, device=self.device, runnable=False)

    def half_loaded(self, model: torch.nn.Module):
        try:
            check_not_poisoned(model)
        except PoisonedModelError as error:
            return re.findall("`(.*?)`", str(error))
        return []

    def staged_bytes(self, session: Session):
        return session.handle.report.peak_staging_bytes
