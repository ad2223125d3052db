"""What is checked when a load ends."""

from __future__ import annotations

import math

import torch

from ..errors import IncompleteLoadError, LoadError, NonFiniteWeightError
from ..ops import FP8_DTYPES
from .fp8_source import holds_nan
from .plan import Plan
from .staging import Tracked
from .target import describe

MAX_REGIONS = 8  # listed of one tensor
LOOK_BYTES = 4 << 20  # of scales that are put together to be looked at


def check_complete(tracked_tensors: list[Tracked], num_shards: int):
    """Raise IncompleteLoadError for every element that never arrived."""
    missing = {}
    for tracked in tracked_tensors:
        lines = _missing_regions(tracked)
        if lines:
            missing[tracked.entry.name] = lines
    if not missing:
        return
    lines = [f"  {name}: {'; '.join(regions)}" for name, regions in missing.items()]
    hint = "other threads that load must enter `loader.worker()`; what a checkpoint may lack goes into `optional`"
    if not num_shards:
        hint = "nothing was written at all: did the weights load inside the context, and in this thread?"
    raise IncompleteLoadError(
        f"{len(missing)} of {len(tracked_tensors)} tensors are incomplete ({hint}):\n" + "\n".join(lines)
    )


def check_finite(tracked_tensors: list[Tracked]):
    """Raise NonFiniteWeightError; one look at all scales, since a NaN or Inf in a weight is in its scale, and one at
    what was FP8 already."""
    quantized = [t for t in tracked_tensors if t.entry.scheme and t.units]
    names = _not_finite_fp8(tracked_tensors)
    kinds: dict[tuple, list[Tracked]] = {}
    for t in quantized:
        kinds.setdefault((t.scale.device, t.scale.dtype), []).append(t)
    for there in kinds.values():
        if _all_finite([t.scale for t in there]):
            continue
        bad = torch.cat([_not_finite(t.scale).reshape(len(t.units), -1).any(dim=1) for t in there]).tolist()
        units = [unit for t in there for unit in t.units]
        names += [str(unit) for unit, is_bad in zip(units, bad, strict=True) if is_bad]
    if names:
        raise NonFiniteWeightError(f"{len(names)} weights hold NaN or Inf: {', '.join(names)}")


def check_nothing_on_meta(model: torch.nn.Module, plan: Plan):
    """Raise for parameters on meta that are not in the plan, since nothing could have loaded them."""
    planned = {id(place.module): set() for entry in plan.entries for place in entry.places}
    for entry in plan.entries:
        for place in entry.places:
            planned[id(place.module)].add(place.leaf)
    late = [
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in model.named_modules()
        for leaf, t in module._parameters.items()
        if t is not None and t.is_meta and leaf not in planned.get(id(module), ())
    ]
    if late:
        raise LoadError(f"parameters must exist before the loader is entered, got new ones on meta: {', '.join(late)}")


def _missing_regions(tracked):
    """What has not been written of a tensor, for people; experts that lack everything in one item."""
    experts, regions = [], []
    for unit in tracked.units:
        boxes = [] if unit.final else unit.coverage.missing()
        if not boxes:
            continue
        if unit.index is not None and unit.coverage.empty:
            experts.append(unit.index)
        elif unit.coverage.empty:
            regions.append("everything")
        else:
            regions += [
                (f"expert {unit.index}: " if unit.index is not None else "") + describe(b, unit.shape) for b in boxes
            ]
    if len(experts) == len(tracked.units) and experts:
        regions.append("everything")
    elif experts:
        regions.insert(0, f"experts {_ranges(experts)} of {len(tracked.units)}")
    more = len(regions) - MAX_REGIONS
    return regions if more <= 0 else [*regions[:MAX_REGIONS], f"and {more} more regions"]


def _ranges(numbers):
    """Sorted numbers as `0:3, 5:6`."""
    starts = [n for n in numbers if n - 1 not in set(numbers)]
    ends = [n + 1 for n in numbers if n + 1 not in set(numbers)]
    return ", ".join(f"{start}:{end}" for start, end in zip(starts, ends, strict=True))


def _all_finite(scales):
    """One look, of few launches and little memory, at scales of one dtype, which are no less than 0; may miss that they
    are."""
    is_exponent = scales[0].dtype == torch.float8_e8m0fnu
    found, piece, size = [], [], 0
    for scale in [*scales, None]:
        if piece and (scale is None or size + scale.nbytes > LOOK_BYTES):
            flat = piece[0] if len(piece) == 1 else torch.cat(piece)
            found.append(flat.view(torch.uint8).max() if is_exponent else flat.sum(dtype=torch.float32))
            piece, size = [], 0
        if scale is not None and scale.numel():
            piece.append(scale.reshape(-1))
            size += scale.nbytes
    if not found:
        return True
    # A sum that is infinite may be one of large scales.
    return int(torch.stack(found).max()) != 0xFF if is_exponent else math.isfinite(torch.stack(found).sum())


def _not_finite_fp8(tracked_tensors):
    """Names of weights that passed through in FP8 and are not finite, by their codes or by the scales beside them."""
    by_name = {name: t.handle for t in tracked_tensors if t.entry.scheme is None for name in t.entry.names}
    flags = {}
    for tracked in tracked_tensors:
        name = tracked.entry.name
        if tracked.entry.scheme is None and tracked.entry.dtype in FP8_DTYPES:
            flags[name] = holds_nan(by_name[name])
            scale = by_name.get(f"{name}_scale")
            if scale is not None and scale.is_floating_point():
                flags[name] |= _not_finite(scale).any().to(flags[name].device)
    device = next(iter(flags.values())).device if flags else None
    found = torch.stack([flag.to(device) for flag in flags.values()]).tolist() if flags else []  # one wait
    return [name for name, is_bad in zip(flags, found, strict=True) if is_bad]


def _not_finite(scale):
    if scale.dtype == torch.float8_e8m0fnu:
        return scale.view(torch.uint8) == 0xFF
    return ~scale.isfinite()
