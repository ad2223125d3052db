"""Tensors of a checkpoint that are read when their values are needed, and only so much of them as was asked for."""

from __future__ import annotations

import itertools
import math
import os
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError
from ..loading.engine import EngineError, read_rows

if TYPE_CHECKING:
    from .reader import Checkpoint

_MAX_THREADS = 8


class LazyTensor:
    """A tensor of a file, or a rectangle of one, that has not been read.

    Narrowing it (`t[rows, columns]`, `narrow`, `chunk`, `split`) reads nothing. `read` does, and so does any torch
    function that it is given to: `param.copy_(t.narrow(0, start, size))` reads the rows that one rank keeps, and
    nothing else.

    Attributes:
        name: of the tensor in the checkpoint.
        dtype, shape: of what would be read.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, ranges=None, kept=None):
        self._checkpoint, self.name = checkpoint, name
        self._info = checkpoint.metadata()[name]
        self._ranges: list[range] = [range(n) for n in self._info.shape] if ranges is None else ranges
        self._kept: list[int] = list(range(len(self._ranges))) if kept is None else kept  # dimensions that are left
        self.dtype = self._info.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size(len(self._ranges[dim]) for dim in self._kept)

    @property
    def ndim(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return math.prod(self.shape)

    def get_shape(self) -> list[int]:
        """As safetensors' slices have it."""
        return list(self.shape)

    def narrow(self, dim: int, start: int, length: int) -> LazyTensor:
        """`torch.Tensor.narrow`, without reading."""
        size = self.shape[dim]
        start = start + size if start < 0 else start
        if not 0 <= start <= start + length <= size:
            raise IndexError(f"`{self.name}` has {size} along dimension {dim}, not {start} to {start + length}")
        return self._with(self._kept[dim], slice(start, start + length))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[LazyTensor, ...]:
        """`torch.Tensor.chunk`, without reading."""
        if not self.shape[dim]:
            return (self,) * chunks  # as torch does
        return self.split(-(-self.shape[dim] // chunks), dim)

    def split(self, split_size: int | list[int], dim: int = 0) -> tuple[LazyTensor, ...]:
        """`torch.Tensor.split`, without reading."""
        total = self.shape[dim]
        if isinstance(split_size, int):
            split_size = [min(split_size, total - start) for start in range(0, total, split_size)] or [0]
        starts = itertools.accumulate(split_size, initial=0)
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, split_size, strict=False))

    def __getitem__(self, index) -> LazyTensor:
        """Integers, slices of step 1 and `...`: without reading."""
        index = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index[at : at + 1] = [slice(None)] * (self.ndim - len(index) + 1)
        if len(index) > self.ndim or any(not isinstance(i, (int, slice)) for i in index):
            raise IndexError(f"`{self.name}` must be indexed by at most {self.ndim} integers and slices, got {index}")
        found = self
        for dim, i in reversed(list(enumerate(index))):
            size = found.shape[dim]
            if isinstance(i, slice):
                start, stop, step = i.indices(size)
                if step != 1:
                    raise IndexError(f"`{self.name}` must be sliced in steps of 1, got {step}")
                found = found._with(found._kept[dim], slice(start, max(start, stop)))
            else:
                if not -size <= i < size:
                    raise IndexError(f"`{self.name}` has {size} along dimension {dim}, not an index {i}")
                found = found._with(found._kept[dim], slice(i % size, i % size + 1))
                found._kept.remove(found._kept[dim])
        return found

    def __len__(self):
        return self.shape[0]

    def read(self) -> torch.Tensor:
        """Its values, on the CPU, in memory of their own.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if self._info.offset is None:
            whole = self._checkpoint.read(self.name)
            return whole[tuple(slice(r.start, r.stop) for r in self._ranges)].reshape(self.shape).clone()
        out = torch.empty(self.shape, dtype=self.dtype)
        if out.numel():
            self._read_into(out.reshape(-1))
        return out

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = _read_all(args), {key: _read_all(value) for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.read(), name)  # t.to(device), t.float(): values are needed

    def __repr__(self):
        return f"LazyTensor(`{self.name}`, {tuple(self.shape)}, {self.dtype})"

    def _with(self, dim, part):
        ranges = list(self._ranges)
        ranges[dim] = ranges[dim][part]
        return LazyTensor(self._checkpoint, self.name, ranges, list(self._kept))

    def _read_into(self, out):
        """Runs of bytes that are as long as they can be, at equal distances, for each index of the outer dimensions."""
        shape, ranges, size = self._info.shape, self._ranges, self.dtype.itemsize
        inner = len(shape)  # dimensions from here on are whole
        while inner and len(ranges[inner - 1]) == shape[inner - 1]:
            inner -= 1
        strides = [math.prod(shape[i + 1 :]) * size for i in range(len(shape))]
        run = math.prod(len(r) for r in ranges[max(inner - 1, 0) :]) * size
        offset = self._info.offset + sum(r.start * stride for r, stride in zip(ranges, strides, strict=True))
        outer = ranges[: max(inner - 1, 0)]
        num_rows, stride = (len(outer[-1]), strides[len(outer) - 1]) if outer else (1, run)
        path = self._checkpoint.folder / self._info.file
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        try:
            step = num_rows * run // size
            for i, index in enumerate(itertools.product(*(range(len(r)) for r in outer[:-1]))):
                start = offset + sum(j * s for j, s in zip(index, strides, strict=False))
                read_rows(fd, start, stride, run, num_rows, out[i * step : (i + 1) * step], _MAX_THREADS)
        except EngineError as error:
            raise CheckpointError(f"cannot read `{self.name}` from {path}: {error.what}") from error
        finally:
            os.close(fd)


def _read_all(x):
    """The same with every lazy tensor read."""
    if isinstance(x, LazyTensor):
        return x.read()
    if type(x) in (list, tuple):
        return type(x)(map(_read_all, x))
    return x
