"""New weights for a model that an engine loaded by `quantize_weights`, and then laid out for its kernels.

Kernels want other shapes than loaders, mostly views of the same memory. Engines then have no way back: their loaders do
not know the parameters any more. What a loader needs of them is kept here.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..checkpoint import QuantizedWeights, quantize_weights
from ..errors import LoadError
from ..loading.report import Report
from ..ops import FP8_DTYPES
from ..schemes import dtype_name


class CodesStayCodes(TorchDispatchMode):
    """While an engine takes weights of this stream: codes that it would cast, and so use without their scales, are an
    error. It sees what this thread copies.
    """

    def __init__(self, stream: QuantizedWeights):
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[1].dtype in FP8_DTYPES and args[0].dtype not in FP8_DTYPES:
            raise LoadError(
                f"`{self._stream.name}` must stay {dtype_name(args[0].dtype)}, as the engine has it, but became FP8: "
                "leave it out of `include`, or give it to `ignore`"
            )
        return func(*args, **(kwargs or {}))


_COMPUTED = ("k_scale", "v_scale")  # parameters while a model loads, which high-precision checkpoints do not hold


class Serving:
    """A model whose weights came through here: how they are loaded again, into the memory they have.

    While new weights arrive, parameters as the loaders know them are in their places, over the memory that serves.

    Args:
        model: with a `load_weights`.
        options: of `quantize_weights`, by which it was loaded.
        check: called with (model, names) after each update, to raise for names that belong into one.

    Attributes:
        device: of the model.
        stream: of the first load.
        ready: whether it serves.
        report: of the last update.
    """

    def __init__(self, model, options, check):
        self.model, self.options, self.ready, self._check = model, options, False, check
        self.device, self.report = next(model.parameters()).device, Report()
        self.stream: QuantizedWeights | None = None
        self._replaced: list[tuple[torch.nn.Module, str, _Loaded]] = []
        self._moved: list[str] = []

    @contextlib.contextmanager
    def remembered(self):
        """Around the engine's post-processing of the first load."""
        loaded = [
            (f"{name}.{leaf}", module, leaf, _Loaded(p), p.detach().clone() if "scale" in leaf else None)
            for name, module in self.model.named_modules()
            for leaf, p in module.named_parameters(recurse=False)
            if leaf not in _COMPUTED
        ]
        yield
        for name, module, leaf, parameter, scales in loaded:
            found = module._parameters.get(leaf)
            if not parameter.is_served_by(found) or not parameter.holds(scales, found):
                self._moved.append(name)
            elif id(found) != parameter.identity:
                self._replaced.append((module, leaf, parameter))
        self.model.load_weights = functools.partial(self.update, self.model.load_weights)
        if hasattr(self.model, "post_load_weights"):
            self.model.post_load_weights = functools.partial(self.call_as_loaded, self.model.post_load_weights)
        self.ready = True

    def update(self, load, weights, *args, **kwargs):
        """`model.load_weights` of a serving model: all or some of its weights, in the checkpoint's precision."""
        if self._moved:
            raise RuntimeError(
                f"`{self._moved[0]}` ({len(self._moved)} in all) must lie where it was loaded to take new weights, but "
                "the engine made another tensor of it for its kernels; the model has to be loaded again"
            )
        names = []
        noted = ((names.append(name), (name, tensor))[1] for name, tensor in weights)
        stream = quantize_weights(noted, **self.options, partial=True, device=self.device)
        with CodesStayCodes(stream):
            result = self.call_as_loaded(load, stream, *args, **kwargs)
        self.report = stream.report
        self._check(self.model, names)
        return result

    def call_as_loaded(self, function, *args, **kwargs):
        """Call a method of the model's that expects its parameters as they are loaded."""
        served = [(module, leaf, module._parameters[leaf]) for module, leaf, _ in self._replaced]
        try:
            for module, leaf, parameter in self._replaced:
                module._parameters[leaf] = parameter.over(module._parameters[leaf])
            return function(*args, **kwargs)
        finally:
            for module, leaf, parameter in served:
                module._parameters[leaf] = parameter


class _Loaded:
    """A parameter as the engine's loaders fill it, without its memory: where kernels want copies, that goes back."""

    def __init__(self, parameter):
        self.identity = id(parameter)
        self._kind, self._attributes = type(parameter), dict(vars(parameter))
        self._layout, self._dtype = _layout(parameter), parameter.dtype
        self._storage = StorageWeakRef(parameter.untyped_storage())

    def is_served_by(self, found):
        """Is this the same memory?"""
        if found is None or found.untyped_storage()._cdata != self._storage.cdata or found.dtype != self._dtype:
            return False
        return id(found) != self.identity or _layout(found) == self._layout

    def holds(self, values, found):
        """Are scales the same values? Blocks that kernels want with powers of two are quantized again in place."""
        return values is None or torch.equal(found.detach().as_strided(*self._layout), values)

    def over(self, served):
        """The parameter, over the memory of the one that serves."""
        made = torch.Tensor._make_subclass(self._kind, served.detach().as_strided(*self._layout), False)
        made.__dict__.update(self._attributes)
        return made


def _layout(t):
    return t.shape, t.stride(), t.storage_offset()
