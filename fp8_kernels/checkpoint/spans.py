"""Cutting a checkpoint's files into spans, runs of bytes that are moved to a device as a whole."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch

from ..loading.transfer import Span
from .reader import Checkpoint, TensorInfo
from .safetensors_file import num_bytes

# Two fit into `transfer.RING_BYTES`: one arrives while one is used. One holds the three weights of a usual expert.
SPAN_BYTES = 18 << 20
_WHOLE = 1.4  # of that limit: a weight that is quantized at once should not wait in two spans
_ROWS = 128  # large tensors are cut at multiples of this, so that no block of scales is


@dataclass(slots=True)
class Piece:
    """A tensor, or some of its rows.

    Attributes:
        name: of the tensor.
        start: of its first byte in the span.
        shape, dtype: of the piece.
        lead: indices of the leading dimensions that it is of one index of.
        first: its first index along the dimension after those.
        whole: whether it is all of the tensor.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    lead: tuple[int, ...] = ()
    first: int = 0
    whole: bool = True

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same part of a tensor of that name, as a view."""
        if self.whole:
            return tensor
        return tensor[self.lead].narrow(0, self.first, self.shape[0])


def make_spans(
    checkpoint: Checkpoint, limit: int = SPAN_BYTES, without: Container[str] = ()
) -> list[tuple[Span, list[Piece]]]:
    """Every byte of every tensor of a checkpoint of safetensors files, in file order.

    Tensors of one module, or of one expert, stay together where they fit into a span. A tensor that does not fit is cut
    between rows.

    Args:
        limit: bytes of a span at most, up to which tensors are put together; one that has a little more is one span all
            the same, and so is a row.
        without: names of tensors to leave out.

    Returns:
        Spans, each with the pieces that it holds. Tensors without elements are pieces of a span of others, or of none
        where there are no others.
    """
    spans = _Spans(limit)
    paths = {file: str(checkpoint.folder / file) for file in checkpoint.files}
    for file, family in _families(checkpoint):
        spans.begin(paths[file], sum(info.num_bytes for _, info in family))
        for name, info in family:
            if name in without:
                spans.close()
            elif info.num_bytes <= limit * _WHOLE:
                spans.add(Piece(name, 0, info.shape, info.dtype), info.offset, info.num_bytes)
            else:
                for piece, offset in _cut(name, info, limit):
                    spans.add(piece, offset, num_bytes(piece.dtype, piece.shape))
    spans.close()
    return spans.done


class _Spans:
    """Puts pieces one after the other into spans."""

    def __init__(self, limit):
        self.limit, self.done = limit, []
        self._path, self._start, self._end, self._pieces = None, 0, 0, []

    def begin(self, path, size):
        """What comes next is of that file, and that much should stay together."""
        if path != self._path or self._end - self._start + size > self.limit:
            self.close()
        self._path = path

    def add(self, piece, offset, size):
        if self._end - self._start + size > self.limit or (offset - self._start) % piece.dtype.itemsize:
            self.close()
        if not self._pieces:
            self._start = self._end = offset
        piece.start = offset - self._start
        self._pieces.append(piece)
        self._end += size

    def close(self):
        if self._pieces:
            self.done.append((Span(self._path, self._start, self._end - self._start), self._pieces))
        self._pieces, self._start = [], self._end


def _families(checkpoint) -> Iterator[tuple[str, list[tuple[str, TensorInfo]]]]:
    """(file, tensors) for runs of tensors that are leaves of one module's children, as
    `experts.3.up_proj.weight`."""
    family, owner, file = [], None, None
    for name, info in checkpoint.metadata().items():
        known = name.rsplit(".", 2)[0]
        if known != owner or info.file != file:
            if family:
                yield file, family
            family, owner, file = [], known, info.file
        family.append((name, info))
    if family:
        yield file, family


def _cut(name, info, limit, lead=()):
    """(piece, offset in the file) of a tensor that is too large for one span, or of one index of it."""
    shape, offset = info.shape[len(lead) :], info.offset
    for i, index in enumerate(lead):
        offset += index * num_bytes(info.dtype, info.shape[i + 1 :])
    row_bytes = num_bytes(info.dtype, shape[1:])
    if row_bytes > limit and len(shape) > 2:
        for index in range(shape[0]):
            yield from _cut(name, info, limit, (*lead, index))
        return
    step = max(limit // row_bytes, 1)
    step = step // _ROWS * _ROWS or step
    for first in range(0, shape[0], step):
        rows = min(step, shape[0] - first)
        yield Piece(name, 0, (rows, *shape[1:]), info.dtype, lead, first, False), offset + first * row_bytes
