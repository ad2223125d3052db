"""What an op does to its arguments: told from its schema, but for the few ops that write only a part.

A schema says which arguments an op writes (`Tensor(a!)`) and which results are views (`Tensor(a)`). It does not
say that `index_put_` writes some elements only; those ops are listed here, each with how to mark what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Marks, on a boolean tensor of the destination's shape, what the op with these arguments writes.
PARTIAL: dict[str, Callable] = {
    "index_put_": lambda mark, indices, *_: mark.index_put_(_moved(indices, mark), _true(mark)),
    "_index_put_impl_": lambda mark, indices, *_: mark.index_put_(_moved(indices, mark), _true(mark)),
    "index_copy_": lambda mark, dim, index, *_: mark.index_fill_(dim, index.to(mark.device), True),
    "index_fill_": lambda mark, dim, index, *_: mark.index_fill_(dim, index.to(mark.device), True),
    "index_add_": lambda mark, dim, index, *_: mark.index_fill_(dim, index.to(mark.device), True),
    "index_reduce_": lambda mark, dim, index, *_: mark.index_fill_(dim, index.to(mark.device), True),
    "scatter_": lambda mark, dim, index, *_: mark.scatter_(dim, index.to(mark.device), True),
    "scatter_add_": lambda mark, dim, index, *_: mark.scatter_(dim, index.to(mark.device), True),
    "scatter_reduce_": lambda mark, dim, index, *_: mark.scatter_(dim, index.to(mark.device), True),
    "masked_fill_": lambda mark, mask, *_: mark.masked_fill_(mask.to(mark.device), True),
    "masked_scatter_": lambda mark, mask, *_: mark.masked_fill_(mask.to(mark.device), True),
    "put_": lambda mark, index, *_: mark.put_(index.to(mark.device), _true(mark).expand(index.shape)),
    "embedding_renorm_": lambda mark, index, *_: mark.index_fill_(0, index.flatten().to(mark.device), True),
    "fill_diagonal_": lambda mark, value, wrap=False: mark.fill_diagonal_(True, wrap),
}
# In-place ops whose result does not depend on what was there before, where they write.
_REPLACING = {
    "copy_", "fill_", "zero_", "index_put_", "_index_put_impl_", "index_copy_", "index_fill_", "scatter_",
    "masked_fill_", "masked_scatter_", "put_", "fill_diagonal_", "normal_", "uniform_",
}  # fmt: skip
_ACCUMULATE = {"index_put_": 3, "_index_put_impl_": 3, "put_": 3}  # position of `accumulate`
# Results are new tensors like an argument, whose values do not matter.
_LIKE = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
_LIKE |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}


@dataclass(frozen=True)
class OpInfo:
    """Attributes:
    name: without namespace and overload, such as `copy_`; with the namespace where that is not aten.
    written_args: positions of the arguments that it writes; each a tensor or a list of them.
    written_kwargs: names of the keyword arguments that it writes.
    is_view: it reads and writes no element: views, and changes of shape in place.
    is_like: it makes a new tensor after the shape of an argument.
    mark: for an op that writes only a part of its first argument; else None.
    is_copy: it is `copy_`.
    """

    name: str
    written_args: tuple[int, ...]
    written_kwargs: tuple[str, ...]
    is_view: bool
    is_like: bool
    mark: Callable | None
    is_copy: bool

    @property
    def writes(self) -> bool:
        return bool(self.written_args or self.written_kwargs)

    def replaces(self, args, kwargs) -> bool:
        """With these arguments, is what it writes independent of what was there?"""
        if self.written_kwargs and not self.written_args:  # out=, which may be an input too
            outputs = {id(kwargs.get(name)) for name in self.written_kwargs}
            return not any(id(x) in outputs for x in args if isinstance(x, torch.Tensor))
        if "reduce" in kwargs:  # scatter_
            return False
        position = _ACCUMULATE.get(self.name)
        if position is not None and len(args) > position and args[position]:
            return False
        return self.name in _REPLACING


def op_info(func) -> OpInfo | None:
    """What the op does; None for what has no schema. Constant time after the first call."""
    try:
        return _CACHE[func]
    except KeyError:
        info = _CACHE[func] = _analyse(func) if isinstance(func, torch._ops.OpOverload) else None
        return info


_CACHE: dict[object, OpInfo | None] = {}


def _analyse(func):
    schema = func._schema
    namespace, name = schema.name.split("::")
    written_args, written_kwargs, aliases = [], [], False
    for position, arg in enumerate(schema.arguments):
        if arg.alias_info is None:
            continue
        if not arg.alias_info.is_write:
            aliases = True
        elif arg.kwarg_only:
            written_kwargs.append(arg.name)
        else:
            written_args.append(position)
    in_place_view = torch.Tag.inplace_view in func.tags
    return OpInfo(
        name=name if namespace == "aten" else f"{namespace}::{name}",
        written_args=tuple(written_args),
        written_kwargs=tuple(written_kwargs),
        is_view=in_place_view or (aliases and not written_args and not written_kwargs),
        is_like=namespace == "aten" and name in _LIKE,
        mark=PARTIAL.get(name) if namespace == "aten" and not written_kwargs else None,
        is_copy=func is torch.ops.aten.copy_.default,
    )


def _true(mark):
    return torch.ones((), dtype=torch.bool, device=mark.device)


def _moved(indices, mark):
    return [None if index is None else index.to(mark.device) for index in indices]
