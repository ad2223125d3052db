"""Carrying out an op on real memory in the place of tensors on meta, without knowing what a load is."""

from __future__ import annotations

import torch

from ..errors import LoadError
from ..ops import FP8_DTYPES
from .arena import Staging
from .op_info import OpInfo
from .target import Target


def write(func, info: OpInfo, into: torch.Tensor, args, kwargs, staging: Staging):
    """Run the op, of which only the first argument is tracked, on real memory in its place."""
    if info.is_copy and isinstance(args[1], torch.Tensor) and args[1].layout is torch.strided:
        staging.sources.bring(into, *args[1:], **kwargs)
    else:
        func(into, *args[1:], **kwargs)


def call(func, info: OpInfo, args, kwargs, targets: list[Target], buffers: list[torch.Tensor], staging: Staging):
    """Run the op with real views in the place of the tracked tensors; returns what it returns to the engine.

    Args:
        buffers: for each target, real memory that begins where its first unit does.
        staging: of the load.
    """
    if info.is_copy and len(targets) == 1 and targets[0].written and args[1] is not args[0]:  # nearly always
        with named(func, targets):
            write(func, info, targets[0].view(buffers[0]), args, kwargs, staging)
        return args[0]
    device = staging.device
    views = {id(t.tensor): t.view(b) for t, b in zip(targets, buffers, strict=True)}
    originals = {id(v): t.tensor for t in targets if (v := views[id(t.tensor)]) is not t.tensor}
    staged = bool(originals)
    written = {id(views[id(t.tensor)]) for t in targets if t.written}
    wide = {t.tracked.entry.dtype: b.dtype for t, b in zip(targets, buffers, strict=True) if t.in_elements}

    def real(x):
        if isinstance(x, torch.Tensor):
            if id(x) in views:
                return views[id(x)]
            if staged and not info.is_copy and not x.is_meta:
                # The engine saw the meta device and could not know where the data is, nor in what width.
                if x.ndim and x.device != device:
                    x = x.to(device)
                if x.dtype in wide and x.dtype != wide[x.dtype]:
                    x = x.to(wide[x.dtype])
            return x
        if isinstance(x, (list, tuple)):
            return type(x)(real(item) for item in x)
        return x

    args, kwargs = real(args), {key: real(value) for key, value in kwargs.items()}
    with named(func, targets):
        result = func(*args, **kwargs)
    for target in targets:
        if target.written and views[id(target.tensor)].shape != target.tensor.shape:
            raise LoadError(
                f"`{target.tracked.entry.name}`: {func} was given an output of shape {tuple(target.tensor.shape)} "
                f"for a result of shape {tuple(views[id(target.tensor)].shape)}"
            )

    def virtual(x):
        if isinstance(x, torch.Tensor):
            return originals[id(x)] if id(x) in written and id(x) in originals else x
        return type(x)(map(virtual, x)) if isinstance(x, (list, tuple)) else x

    return virtual(result)


def refuse(info: OpInfo, args, kwargs, targets: list[Target]):
    """Raise for data that cannot become a weight."""
    if len(targets) > 1 or not info.is_copy or not isinstance(args[1], torch.Tensor) or args[1].is_meta:
        known = {id(t.tensor) for t in targets}
        if any(x.is_meta and id(x) not in known for x in _tensors((args, *kwargs.values()))):
            raise LoadError(f"{_names(targets)}: a tensor on the meta device holds no data to load ({info.name})")
    if not info.is_copy:
        return
    target, source = next(t for t in targets if t.written), args[1]
    if not isinstance(source, torch.Tensor):  # a number
        return
    into, dtype, scheme = target.tensor.dtype, source.dtype, target.tracked.entry.scheme
    if into == dtype and scheme and into == target.tracked.entry.dtype:
        return
    if not target.in_elements:
        if dtype != into:
            raise LoadError(f"{_names(targets)}: a view as {into} must be written with {into}, got {dtype}")
    elif scheme and not dtype.is_floating_point and source.ndim:
        raise LoadError(f"{_names(targets)} must be loaded from floating-point data, got {dtype}")
    elif scheme and dtype.itemsize == 1 and source.ndim:
        raise LoadError(f"{_names(targets)} must be loaded from high precision, got {dtype} without its scale")
    elif into in FP8_DTYPES and dtype != into and not scheme:
        raise LoadError(
            f"{_names(targets)} is {into}: a cast from {dtype} would drop the scale; quantize it, or use `reload=`"
        )


def split(args, target: Target, step: int):
    """The arguments of one `copy_`, `fill_` or `zero_` to several experts as one set for every `step` of them, so that
    these can be finished at once; None where the view does not fall apart at experts."""
    t, source = args[0], args[1] if len(args) > 1 else None
    numel = target.tracked.unit_numel * target.itemsize // t.element_size()
    is_tensor = isinstance(source, torch.Tensor) and source.ndim > 0
    if is_tensor:
        source = source.expand(t.shape)
    dim = next((d for d, s in enumerate(t.stride()) if s and s % numel == 0 and t.size(d) > 1), None)
    if dim is not None:
        starts = [(i, min(step, t.size(dim) - i)) for i in range(0, t.size(dim), step)]
        if step == 1:
            parts = [(t.select(dim, i), source.select(dim, i) if is_tensor else source) for i, _ in starts]
        else:
            parts = [(t.narrow(dim, *p), source.narrow(dim, *p) if is_tensor else source) for p in starts]
    elif t.is_contiguous():
        flat, start = t.view(-1), target.offset * target.itemsize // t.element_size()
        source = source.reshape(-1) if is_tensor else source
        first = numel - start if start else step * numel
        edges = [0, *range(first, flat.numel(), step * numel), flat.numel()]
        pairs = zip(edges, edges[1:], strict=False)
        parts = [(flat[a:b], source[a:b] if is_tensor else source) for a, b in pairs]
    else:
        return None
    return [(part, part_source, *args[2:])[: len(args)] for part, part_source in parts]


def source_dtype(target: Target, info: OpInfo, args, targets: list[Target]) -> torch.dtype | None:
    """The dtype of floating-point data that is copied into elements; None for everything else."""
    if not info.is_copy or not target.in_elements or not isinstance(args[1], torch.Tensor):
        return None
    for source in targets:
        if source.tensor is args[1] and source.tracked.entry.scheme and source.units:
            return source.units[0].dtype_for()  # as it is held, not as the engine sees it
    return args[1].dtype if args[1].is_floating_point() else None


class named:
    """Errors of torch inside it name the parameters."""

    __slots__ = ("func", "targets")

    def __init__(self, func, targets):
        self.func, self.targets = func, targets

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if kind is not None and issubclass(kind, RuntimeError) and kind is not torch.OutOfMemoryError:
            raise RuntimeError(f"{self.func} on {_names(self.targets)}: {error}") from error


def _names(targets):
    """The parameters that an op writes, or else reads."""
    return ", ".join(f"`{t.tracked.entry.name}`" for t in [t for t in targets if t.written] or targets)


def _tensors(args):
    for x in args:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)
