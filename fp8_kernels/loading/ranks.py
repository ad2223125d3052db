"""Loads of several ranks that belong together: scales that span them, and one outcome for all.

Nothing is sent while weights arrive, since ranks may complete units in different orders. When all have, ranks tell
each other whether they succeeded, share their maxima in one all-reduce, and, before anyone commits, tell each other
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from ..errors import LoadError, UnmatchedPatternError
from ..schemes import PerChannel, PerTensor
from .plan import Entry, Plan
from .rules import matches
from .unit import Unit


class Ranks:
    """The ranks of one load.

    Args:
        scale_group: a process group, for every `per_tensor` weight and expert; or pattern -> group, the first match
            counts, for `per_tensor` and `per_channel` ones. All groups have to be the same.

    Raises:
        TypeError, ValueError: something else, or several groups.
    """

    def __init__(self, scale_group: dist.ProcessGroup | Mapping[str, dist.ProcessGroup | None]):
        self._patterns = dict(scale_group) if isinstance(scale_group, Mapping) else None
        groups = [scale_group] if self._patterns is None else [g for g in self._patterns.values() if g is not None]
        wrong = [g for g in groups if not isinstance(g, dist.ProcessGroup)]
        if wrong or not groups:
            raise TypeError(f"`scale_group` must be a process group or a mapping to one, got {scale_group!r}")
        if any(g is not groups[0] for g in groups):
            raise ValueError("`scale_group` must name one process group, got several")
        self._group = groups[0]
        self._layouts: list[dict[str, int]] = []

    def checked(self, plan: Plan) -> Plan:
        """The plan, in which weights that share scales stay staged until they are complete.

        Raises:
            UnmatchedPatternError: a pattern matches nothing.
            ValueError: groups of a weight cannot span ranks.
        """
        unused = [p for p in self._patterns or () if not any(matches(p, n) for e in plan.quantized for n in e.names)]
        if unused:
            raise UnmatchedPatternError(f"no weight is matched by {', '.join(map(repr, unused))} of `scale_group`")
        for entry in plan.quantized:
            if self.shares(entry) and not isinstance(entry.scheme, (PerTensor, PerChannel)):
                raise ValueError(
                    f"`{entry.name}` must be per_tensor or per_channel to share its scales, got {entry.scheme}: blocks "
                    "and groups lie where each rank's part begins"
                )
        entries = (replace(entry, stream=False) if self.shares(entry) else entry for entry in plan.entries)
        return replace(plan, entries=tuple(entries))

    def shares(self, entry: Entry) -> bool:
        """Do the scales of this weight span the ranks?"""
        if entry.scheme is None:
            return False
        if self._patterns is None:
            return isinstance(entry.scheme, PerTensor)
        found = [g for p, g in self._patterns.items() if any(matches(p, name) for name in entry.names)]
        return bool(found) and found[0] is not None

    def agree(self, error: BaseException | None, units: list[Unit], device: torch.device):
        """Wait for all ranks; raise LoadError if another one failed, or holds other units.

        Args:
            error: why this rank failed, which its caller raises.
            units: what this rank will share.
            device: of the load.
        """
        text = None if error is None else f"{type(error).__name__}: {error}"
        told = [None] * dist.get_world_size(self._group)
        with _current(device):
            dist.all_gather_object(told, (text, {str(u): _num_scales(u) for u in units}), group=self._group)
        if error is not None:
            return
        failures = [f"rank {rank} failed with {text}" for rank, (text, _) in enumerate(told) if text is not None]
        if failures:
            raise LoadError(f"no rank loads because {'; '.join(failures)}")
        self._layouts = [layout for _, layout in told]
        sizes: dict[str, int] = {}
        for layout in self._layouts:
            for name, size in layout.items():
                if sizes.setdefault(name, size) != size:
                    raise LoadError(f"`{name}` must have as many scales on every rank, got {sizes[name]} and {size}")

    def share(self, units: list[Unit], maxima: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """The maxima of these units over all ranks, from those of this one; one all-reduce, in plan order."""
        sizes = {name: size for layout in reversed(self._layouts) for name, size in layout.items()}
        names = list(dict.fromkeys(name for layout in self._layouts for name in layout))
        starts, total = {}, 0
        for name in names:
            starts[name], total = total, total + sizes[name]
        # As integers, magnitudes are in order, NaN above all; as floats, a reduction may lose a NaN.
        together = torch.zeros(total, dtype=torch.float32, device=device)
        for unit, amax in zip(units, maxima, strict=True):
            amax = torch.where(amax.isnan(), torch.full_like(amax, float("nan")), amax)
            together[starts[str(unit)] :][: amax.numel()] = amax.flatten()
        bits = together.view(torch.int32)
        bits = bits if "nccl" in dist.get_backend(self._group) else bits.cpu()
        with _current(device):
            dist.all_reduce(bits, dist.ReduceOp.MAX, group=self._group)
        together = bits.to(device).view(torch.float32)
        return [
            together[starts[str(u)] :][: amax.numel()].view(amax.shape) for u, amax in zip(units, maxima, strict=True)
        ]


def _num_scales(unit):
    return torch.empty(unit.scheme.scale_shape(unit.shape), device="meta").numel()


def _current(device):
    """Collectives over objects use the current CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
