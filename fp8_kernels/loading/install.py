"""Giving a model its results, and taking them back.

A tensor object that an engine holds, in `dict(model.named_parameters())` say, must be the parameter before and
after, with its class and attributes. So results are exchanged beneath the object and no object is replaced.
"""

from __future__ import annotations

import torch


def exchange(held: torch.Tensor, data: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
    """Let the tensor object `held` be `data`; returns another object that is what `held` was."""
    # `torch.utils.swap_tensors` also exchanges class and attributes, which must stay, and refuses tensors that
    # something else refers to, such as a view that the engine kept.
    other = data.detach().requires_grad_(requires_grad)
    torch._C._swap_tensor_impl(held, other)
    return other


class Snapshot:
    """What a model holds, to bring it back to exactly that."""

    def __init__(self, model: torch.nn.Module):
        modules = list(model.modules())
        self._registries = [(r, dict(r)) for m in modules for r in (m._parameters, m._buffers)]
        tensors = {id(t): t for _, saved in self._registries for t in saved.values() if t is not None}
        self._tensors = [(t, t.detach(), t.requires_grad) for t in tensors.values()]

    def restore(self):
        """The same tensor objects in the same places, each with the memory, shape and dtype that it had."""
        for registry, saved in self._registries:
            registry.clear()
            registry.update(saved)
        for t, was, requires_grad in self._tensors:
            if not _is_same(t, was):
                exchange(t, was, requires_grad)


def _is_same(t, was):
    return (
        t.untyped_storage()._cdata == was.untyped_storage()._cdata
        and (t.shape, t.stride(), t.storage_offset()) == (was.shape, was.stride(), was.storage_offset())
        and t.dtype == was.dtype
    )
