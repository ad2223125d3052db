"""What an FP8 parameter was before it was quantized: kept on its module, for loads that come after.

It survives an engine that puts other parameter objects, of other layouts, in their places.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops import FP8_DTYPES, block_of
from ..schemes import WHOLE, PerBlock, PerChannel, PerTensor, Scheme
from .plan import Plan
from .staging import Tracked

RECORD = "_fp8_loaded"  # on a module: leaf -> Origin, or None for what passed through
UNCHANGED = "_fp8_checkpoint_layout"  # on a parameter: the object, and the layout, that the load gave the module


class _Memory:
    """A storage, told from every other one, also from one that takes its address later; it is not kept alive.

    Copies of a model have memory of their own, so a copy of this is no storage's.
    """

    def __init__(self, t: torch.Tensor | None = None):
        self._reference = None if t is None else StorageWeakRef(t.untyped_storage())

    @property
    def known(self) -> bool:
        return self._reference is not None

    def holds(self, t: torch.Tensor) -> bool:
        return self.known and self._reference.cdata == t.untyped_storage()._cdata

    def __reduce__(self):
        return _Memory, ()


@dataclass(frozen=True)
class Origin:
    """What an FP8 parameter was before it was quantized.

    Attributes:
        shape, dtype, logical: of the high-precision parameter.
        scheme: how it was quantized.
        memory: what held its codes, in the checkpoint's layout, when the load ended.
        kind, attributes: class and attributes of the parameter object.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    logical: tuple[int, ...]
    scheme: Scheme
    memory: _Memory
    kind: type = torch.nn.Parameter
    attributes: dict = field(default_factory=dict)


def remember(plan: Plan, tracked_tensors: Iterable[Tracked]):
    """Note on the modules, after a first load, what a later one has to know."""
    records: dict[torch.nn.Module, dict[str, Origin | None]] = {}
    for entry in plan.entries:
        for place in entry.places:
            records.setdefault(place.module, {})[place.leaf] = None
    quantized = set()
    for tracked in tracked_tensors:
        entry = tracked.entry
        if entry.scheme is None:
            continue
        for place in tracked.places:
            held = tracked.object_at.get(place, entry.tensors[0])
            if place.registry.get(place.leaf) is held:
                setattr(held, UNCHANGED, True)
            records[place.module][place.leaf] = Origin(
                entry.shape,
                entry.dtype,
                entry.logical,
                entry.scheme,
                _Memory(tracked.q),
                type(held),
                {key: value for key, value in vars(held).items() if key != UNCHANGED},
            )
            quantized.add(place.module)
    for module in quantized:
        vars(module)[RECORD] = records[module]


def carry_over(old: torch.nn.Module, new: torch.nn.Module):
    """Let a module that takes the place of another, on the same tensors, be reloadable too."""
    if RECORD in vars(old):
        vars(new)[RECORD] = vars(old)[RECORD]


def like(origin: Origin, meta: torch.Tensor) -> torch.nn.Parameter:
    """A parameter object as the model's owner made it."""
    made = torch.Tensor._make_subclass(origin.kind, meta, False)
    vars(made).update(origin.attributes)
    return made


def inferred(module: torch.nn.Module) -> dict[str, Origin]:
    """The origins of FP8 weights that no load of ours has recorded."""
    found = {}
    for leaf, held in module._parameters.items():
        scale = module._parameters.get(f"{leaf}_scale")
        if held is None or scale is None or held.dtype not in FP8_DTYPES:
            continue
        scheme = getattr(module, "scheme", None)
        scheme = scheme if isinstance(scheme, Scheme) else scheme_of(held, scale)
        shape = tuple(held.shape)
        setattr(held, UNCHANGED, True)
        found[leaf] = Origin(shape, torch.bfloat16, shape, scheme, _Memory())
    return found


def scheme_of(weight: torch.Tensor, scale: torch.Tensor) -> Scheme:
    """The scheme, from shapes alone.

    Raises:
        ValueError: they fit several.
    """
    block = block_of(weight, scale)
    known = {(WHOLE, WHOLE): PerTensor, (1, WHOLE): PerChannel}.get(block)
    options = {"scale_dtype": scale.dtype, "pow2": scale.dtype == torch.float8_e8m0fnu}
    return known(**options) if known else PerBlock(*block, **options)


def live(module: torch.nn.Module, leaf: str, origin: Origin) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Codes and scales in the checkpoint's layout, as views of what the module holds; (None, None) if there are none.

    Only memory that a load wrote, or the parameter object that it left, is known to be in that layout: kernels'
    layouts may have the same shape.
    """
    held, scale = (module._parameters.get(name) for name in (leaf, f"{leaf}_scale"))
    if held is None or scale is None or held.dtype not in FP8_DTYPES:
        return None, None
    if tuple(scale.shape) != origin.scheme.scale_shape(origin.shape) or scale.dtype != origin.scheme.scale_dtype:
        return None, None
    if origin.memory.holds(held) and held.numel() == math.prod(origin.shape):
        strides = torch.empty(origin.shape, device="meta").stride()
        return held.detach().as_strided(origin.shape, strides, 0), scale.detach()
    moved = held.is_contiguous() or not origin.memory.known  # to another device, say, as it was
    if hasattr(held, UNCHANGED) and tuple(held.shape) == origin.shape and moved:
        return held.detach(), scale.detach()
    return None, None
