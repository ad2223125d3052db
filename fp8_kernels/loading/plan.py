"""Which tensors of a model become FP8, in which units, and what memory that takes; nothing is loaded.

Everything a checkpoint can hold is in the plan: parameters and persistent buffers. Names that share a storage
(tied weights) are one entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import UnmatchedPatternError
from ..ops import FP8_DTYPES
from ..schemes import PerTensor, Scheme, scheme_name
from .forecast import Decision, Forecast
from .rules import Rules, as_patterns, matches


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor is registered: `module._parameters[leaf]`, or `_buffers`."""

    name: str
    module: torch.nn.Module
    leaf: str
    is_buffer: bool = False

    @property
    def registry(self) -> dict:
        """The module's own dict that holds it."""
        return self.module._buffers if self.is_buffer else self.module._parameters


@dataclass(frozen=True, eq=False)
class Entry(Decision):
    """One storage of the model.

    Attributes:
        places: every name and module it is known under; the first gives it its name.
        tensors: the tensor objects at those places, each once; several only where ties were made by sharing data.
        shape, dtype: as the model has them: `[N, K]`, `[E, N, K]` or anything that passes through.
        scheme: None for pass-through; `why` says why.
        logical: the part that a checkpoint holds; the rest is padding, zero and outside every scale.
        optional: may be absent from the checkpoint: it then keeps its value, or becomes 0 if it has none.
        stream: rows, blocks or groups are quantized as they arrive, before the unit is complete.
        tracked: False for what needs nothing to arrive in it: a buffer that has its value already, and a real tensor
            that overlaps others or itself.
    """

    places: tuple[Place, ...]
    tensors: tuple[torch.Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme | None
    why: str
    logical: tuple[int, ...]
    optional: bool
    fp8_dtype: torch.dtype
    stream: bool = True
    tracked: bool = True

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(place.name for place in self.places)

    @property
    def on_meta(self) -> bool:
        return self.tensors[0].is_meta

    def as_dict(self):
        return {**super().as_dict(), "names": list(self.names), "logical_shape": list(self.logical)}


@dataclass(frozen=True)
class Plan(Forecast):
    """Made by `make_plan`. Prints as a table, layers of the same kind in one row.

    Attributes:
        entries: everything that a checkpoint can hold.
        rebuild: non-persistent buffers on meta: no checkpoint holds them, so their owner has to compute them.
    """

    entries: tuple[Entry, ...]
    rebuild: tuple[str, ...] = field(default=())

    @property
    def decisions(self) -> tuple[Entry, ...]:
        return self.entries

    def check_loadable(self):
        """Raise ValueError for what `LayerwiseLoader` cannot load; the message names the way out."""
        real = [e.name for e in self.quantized if not e.on_meta]
        if real:
            raise ValueError(
                f"parameters that become FP8 must be on the meta device, got real ones: {listed(real)}; build the "
                'model under `torch.device("meta")`, or name them in `ignore`'
            )
        strided = [e.name for e in self.quantized if not e.tensors[0].is_contiguous()]
        if strided:
            raise ValueError(
                f"parameters that become FP8 must be contiguous, got {listed(strided)}; name them in `ignore`"
            )
        gappy = [e.name for e in self.entries if e.on_meta and not e.tracked]
        if gappy:
            raise ValueError(f"tensors on meta must fill their memory without gaps or repeats, got {listed(gappy)}")
        for entry in self.quantized:
            for place in entry.places:
                if _has(place.module, f"{place.leaf}_scale"):
                    raise ValueError(
                        f"`{place.name}` must not have a scale before it is quantized, got an existing "
                        f"`{place.leaf}_scale`; name the weight in `ignore`"
                    )

    def as_dict(self):
        return {**super().as_dict(), "rebuild": list(self.rebuild)}

    def __str__(self):
        table = super().__str__()
        if self.rebuild:
            table += f"\nnot in any checkpoint, to be rebuilt by the model's owner: {listed(self.rebuild)}"
        return table


def make_plan(
    model: torch.nn.Module,
    scheme: str | Scheme = "per_channel",
    *,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    schemes: Mapping[str, str | Scheme] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    optional: Iterable[str] = (),
    logical_shapes: Mapping[str, tuple[int, ...]] | None = None,
    stream: bool | Mapping[str, bool] = True,
    segments: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Decide for every parameter and persistent buffer of a model whether and how it becomes FP8.

    Args:
        model: on the meta device, or real (to look at; `LayerwiseLoader` wants what becomes FP8 on meta).
        scheme, ignore, include, schemes: see `Rules`. A tied weight stays in high precision if any of its
            names does.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        optional: patterns of tensors that the checkpoint may lack.
        logical_shapes: pattern -> shape of the upper left part that the checkpoint holds, where the model
            pads; leading dimensions (experts) must be whole.
        stream: False keeps a weight in high precision until it is complete, where else each row, block or group is
            quantized as soon as it has arrived: for loaders that come back to what they wrote long before. Or
            pattern -> whether; the last one that matches counts.
        segments: pattern -> the rows of each part of a fused `per_tensor` weight (q, k and v; gate and up; of this
            rank), each of which then has a scale of its own: `PerTensor(segments=...)`.

    Raises:
        UnmatchedPatternError: a pattern matched nothing.
        ValueError, TypeError: bad arguments, or tensors that overlap without being the same.
    """
    if dtype not in FP8_DTYPES:
        raise TypeError(f"`dtype` must be one of {FP8_DTYPES}, got {dtype}")
    rules = Rules(scheme, ignore, include, dict(schemes or {}))
    optional, logical_shapes = as_patterns("optional", optional), dict(logical_shapes or {})
    segments = {pattern: tuple(rows) for pattern, rows in (segments or {}).items()}
    by_default, streams = (True, dict(stream)) if isinstance(stream, Mapping) else (stream, {})
    unused = {*optional, *logical_shapes, *streams, *segments}
    places, rebuild = _places(model)
    entries = []
    for group, overlaps in places:
        tensors = list({id(t): t for t in (p.registry[p.leaf] for p in group)}.values())
        first, names = tensors[0], [p.name for p in group]
        decisions = [rules.decide(p.name, first.shape, first.dtype, p.module) for p in group]
        if group[0].is_buffer:
            decisions = [(None, "buffer")]
        overlaps = overlaps or not _is_dense(first)
        if overlaps:
            decisions = [(None, "overlaps other tensors or itself")]
        chosen, why = next((d for d in decisions if d[0] is None), decisions[0])
        found = [
            p for p in (*optional, *logical_shapes, *streams, *segments) if any(matches(p, name) for name in names)
        ]
        unused.difference_update(found)
        logical = next((tuple(logical_shapes[p]) for p in found if p in logical_shapes), tuple(first.shape))
        chosen = next((_in_segments(names[0], chosen, segments[p]) for p in found if p in segments), chosen)
        _check_scales(names[0], chosen, first.shape)
        _check_logical(names[0], logical, tuple(first.shape), chosen)
        has_value = group[0].is_buffer and not first.is_meta  # the model computed it; a checkpoint may lack it
        entries.append(
            Entry(
                places=tuple(group),
                tensors=tuple(tensors),
                shape=tuple(first.shape),
                dtype=first.dtype,
                scheme=chosen,
                why=why,
                logical=logical,
                optional=any(p in optional for p in found),
                stream=[by_default, *(streams[p] for p in found if p in streams)][-1],
                fp8_dtype=dtype,
                tracked=not (overlaps or has_value),
            )
        )
    rules.check_all_used()
    if unused:
        raise UnmatchedPatternError(f"no tensor is matched by {', '.join(map(repr, sorted(unused)))}")
    return Plan(tuple(entries), tuple(rebuild))


def _places(model):
    """Groups of places that hold the same memory in the same way, each with whether other tensors overlap it, in
    the model's order; and the names of what is to be rebuilt."""
    groups: dict[tuple, list[Place]] = {}
    rebuild = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        places = [(Place(dot + leaf, module, leaf), t) for leaf, t in module._parameters.items()]
        places += [(Place(dot + leaf, module, leaf, is_buffer=True), t) for leaf, t in module._buffers.items()]
        for place, t in places:
            if t is None:
                continue
            if isinstance(t, torch.nn.parameter.UninitializedTensorMixin):
                raise ValueError(f"`{place.name}` must have a shape before it can be loaded, got an uninitialized one")
            if place.is_buffer and place.leaf in module._non_persistent_buffers_set:
                if t.is_meta:
                    rebuild.append(place.name)
            else:
                key = t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype
                groups.setdefault(key, []).append(place)
    users: dict[int, list[Place]] = {}
    for (storage, *_), group in groups.items():
        users.setdefault(storage, []).append(group[0])
    for (storage, *_), (first, *_) in groups.items():
        others = [place.name for place in users[storage] if place is not first]
        if others and first.registry[first.leaf].is_meta:
            raise ValueError(f"tensors on meta must not overlap, got `{first.name}` with {listed(others)}")
    return [(group, len(users[storage]) > 1) for (storage, *_), group in groups.items()], rebuild


def _is_dense(t):
    """Does every element of the memory that it spans belong to it, once?"""
    extent = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride != extent:
            return t.numel() == 0
        extent *= size
    return True


def _has(module, name):
    """`hasattr`, which for what a module has not takes ten times as long."""
    held = module._parameters, module._buffers, module._modules, vars(module)
    return any(name in names for names in held) or hasattr(type(module), name)


def _in_segments(name, scheme, rows):
    """The scheme with a scale for each of these parts."""
    if not isinstance(scheme, PerTensor):
        got = "high precision" if scheme is None else scheme_name(scheme)
        raise ValueError(f"`{name}` must be per_tensor to have `segments`, got {got}")
    return replace(scheme, segments=rows)


def _check_scales(name, scheme, shape):
    try:
        if scheme is not None:
            scheme.scale_shape(shape)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None


def _check_logical(name, logical, shape, scheme):
    inside = len(logical) == len(shape) and all(0 <= a <= b for a, b in zip(logical, shape, strict=True))
    if not inside or logical[:-2] != shape[:-2]:
        raise ValueError(f"the logical shape of `{name}` must be a corner of {shape}, got {logical}")
    if logical != shape and len(shape) > 2 and not scheme:
        raise ValueError(f"a logical shape of `{name}` must be of one or two dimensions, got {logical}")


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Names for a message: quoted, the first few of many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + more
