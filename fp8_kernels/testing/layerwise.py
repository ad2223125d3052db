"""The adapter of this project's own loader, which is also what an adapter looks like."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ConflictingShardError, IncompleteLoadError, LoadError, NonFiniteWeightError
from ..load import load_checkpoint
from ..loading import LayerwiseLoader
from .runner import Adapter
from .session import Session


class LayerwiseAdapter(Adapter):
    """Runs cases against `fp8_kernels.LayerwiseLoader`."""

    name = "fp8_kernels"
    offers = frozenset({"progress", "staged_bytes", "logical_shapes", "optional", "threads", "checkpoint"})
    restores = True
    errors = {
        "incomplete": IncompleteLoadError,
        "conflict": ConflictingShardError,
        "non_finite": NonFiniteWeightError,
        "load": LoadError,
    }

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def enter(self, session: Session):
        options = {key: value for key, value in session.load.facts.items() if key != "reads_back"}
        if "progress" in session.case.needs:
            names = {module: name for name, module in session.model.named_modules()}
            options["on_module"] = lambda module: session.finished.append(names[module])
        return LayerwiseLoader(session.model, session.case.scheme, device=self.device, **options)

    def worker(self, session: Session):
        return session.handle.worker()

    def load_checkpoint(self, model: torch.nn.Module, folder: Path, scheme: str):
        load_checkpoint(model, folder, scheme, device=self.device, runnable=False)

    def staged_bytes(self, session: Session):
        return session.handle.report.peak_staging_bytes
