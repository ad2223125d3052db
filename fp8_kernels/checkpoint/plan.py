"""What a checkpoint would become: decided from its headers alone, nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..loading.forecast import Decision, Forecast
from ..loading.rules import Rules
from ..schemes import Scheme
from .formats import TRANSPOSED_MODEL_TYPES
from .reader import Checkpoint, TensorInfo


@dataclass(frozen=True)
class PlannedTensor(Decision):
    """A tensor of the checkpoint; `scheme` is None where it stays as it is, and `why` says why."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme | None
    why: str


@dataclass(frozen=True)
class CheckpointPlan(Forecast):
    """Made by `plan_checkpoint`. Prints as a table, with the forecast of peak memory."""

    tensors: tuple[PlannedTensor, ...]

    @property
    def decisions(self) -> tuple[PlannedTensor, ...]:
        return self.tensors


def plan_checkpoint(
    checkpoint: Checkpoint, scheme="per_channel", ignore=(), include=(), schemes=None
) -> CheckpointPlan:
    """Decide every tensor of a checkpoint.

    Args:
        checkpoint: from `open_checkpoint`.
        scheme, ignore, include, schemes: see `Rules`.

    Raises:
        UnmatchedPatternError: a pattern matched nothing.
    """
    plan = plan_tensors(checkpoint.metadata(), scheme, ignore, include, schemes)
    if checkpoint.config.get("model_type") in TRANSPOSED_MODEL_TYPES:  # neither a format nor a module has them in FP8
        kept = {t.name: replace(t, scheme=None, why="stored as [K, N]") for t in plan.quantized}
        plan = CheckpointPlan(tuple(kept.get(t.name, t) for t in plan.tensors))
    return plan


def plan_tensors(
    tensors: Mapping[str, TensorInfo | torch.Tensor], scheme="per_channel", ignore=(), include=(), schemes=None
) -> CheckpointPlan:
    """`plan_checkpoint` for anything that has shapes and dtypes, tensors on meta included."""
    rules = Rules(scheme, ignore, include, schemes)
    planned = tuple(
        PlannedTensor(name, tuple(info.shape), info.dtype, *rules.decide(name, info.shape, info.dtype))
        for name, info in tensors.items()
    )
    rules.check_all_used()
    return CheckpointPlan(planned)
