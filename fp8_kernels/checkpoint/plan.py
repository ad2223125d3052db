"""What a checkpoint would become: decided from its headers alone, nothing is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from ..loading.report import size_text
from ..loading.rules import Rules
from ..schemes import Scheme, scheme_name
from .reader import Checkpoint


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the checkpoint; `scheme` is None where it stays as it is, and `why` says why."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme | None
    why: str

    @property
    def bytes_in(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_out(self) -> int:
        """Resident bytes: FP8 codes and scales, or what it was."""
        if self.scheme is None:
            return self.bytes_in
        return math.prod(self.shape) + math.prod(self.scheme.scale_shape(self.shape)) * self.scheme.scale_dtype.itemsize

    @property
    def num_units(self) -> int:
        """An expert is a unit; so is a weight of two dimensions."""
        return 0 if self.scheme is None else math.prod(self.shape[:-2])

    @property
    def unit_bytes(self) -> int:
        """High-precision bytes of one unit."""
        return self.bytes_in // self.num_units if self.num_units else 0


@dataclass(frozen=True)
class CheckpointPlan:
    """Made by `plan_checkpoint`. Prints as a table, layers of the same kind in one row."""

    tensors: tuple[PlannedTensor, ...]

    @property
    def bytes_in(self) -> int:
        return sum(t.bytes_in for t in self.tensors)

    @property
    def resident(self) -> int:
        """Bytes of the FP8 model."""
        return sum(t.bytes_out for t in self.tensors)

    @property
    def peak(self) -> int:
        """Forecast: the FP8 model, one unit being filled and one being finished."""
        return self.resident + 2 * max((t.unit_bytes for t in self.tensors), default=0)

    def as_dict(self) -> dict:
        """For `--json`."""
        return {
            "bytes_in": self.bytes_in,
            "resident": self.resident,
            "peak": self.peak,
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "dtype": str(t.dtype).removeprefix("torch."),
                    "scheme": t.scheme and scheme_name(t.scheme),
                    "why": t.why,
                    "units": t.num_units,
                }
                for t in self.tensors
            ],
        }

    def __str__(self):
        rows = [("tensor", "count", "shape", "becomes", "size")]
        for kind, members in _kinds(self.tensors):
            first = members[0]
            becomes = f"FP8 {scheme_name(first.scheme)}" if first.scheme else f"{_short(first.dtype)} ({first.why})"
            shape = "x".join(map(str, first.shape)) or "scalar"
            rows.append((kind, str(len(members)), shape, becomes, size_text(sum(t.bytes_out for t in members))))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        quantized = [t for t in self.tensors if t.scheme]
        num_units = sum(t.num_units for t in quantized)
        lines.append("")
        lines.append(f"{len(quantized)} of {len(self.tensors)} tensors become FP8, in {num_units} units")
        lines.append(
            f"{size_text(self.bytes_in)} in, {size_text(self.resident)} resident, "
            f"peak {size_text(self.peak)} (resident and two of the largest units)"
        )
        return "\n".join(lines)


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
    rules = Rules(scheme, ignore, include, schemes)
    planned = tuple(
        PlannedTensor(name, tuple(info.shape), info.dtype, *rules.decide(name, info.shape, info.dtype))
        for name, info in checkpoint.metadata().items()
    )
    rules.check_all_used()
    return CheckpointPlan(planned)


def _kinds(tensors):
    """(name with `*` for each number, the tensors that differ in nothing else), in the order of the checkpoint."""
    kinds: dict[tuple, list[PlannedTensor]] = {}
    for t in tensors:
        kinds.setdefault((re.sub(r"\d+", "*", t.name), t.shape, t.dtype, t.scheme), []).append(t)
    return [(name, members) for (name, *_), members in kinds.items()]


def _short(dtype):
    return str(dtype).removeprefix("torch.")
