"""What a checkpoint would become: decided from its headers alone, nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..loading.forecast import Decision, Forecast
from ..loading.rules import Rules
from ..schemes import Scheme
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
    return plan_tensors(checkpoint.metadata(), scheme, ignore, include, schemes)


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
