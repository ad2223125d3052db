"""Tracked tensors: the units that a tensor of the plan has, and the FP8 tensors that these become."""

from __future__ import annotations

import math

import torch

from ..errors import LoadError
from ..ops import WEIGHT_DTYPES, quantize, quantize_into
from ..schemes import WHOLE, PerTensor, Scheme
from .arena import Staging, outliving
from .coverage import Box
from .plan import Entry
from .unit import Unit


class Tracked:
    """A plan entry during a load: its units, and what they become.

    Attributes:
        places: where it is registered; grows and shrinks when tensors are tied while they load.
        handle: the tensor as it was found, for writes that do not come through an op.
        q, scale: the FP8 result, allocated when the first group is quantized.
        installed: the model already holds the result.
        group: (rows, columns) that share a scale.
        maxima: of its units, fp32 of the shape of its scales, where they are known before anything arrives: the scales
            then are theirs, and any rectangle is quantized as it arrives.
        usual: shards may come by `Arrivals`.
        unit_box: all of a unit.
        edges: rows at which segments with a scale each begin and end, if it has such.
        one_scale: a unit has one.
        row_strides: of a view of whole rows, or of columns of them.
        streams: groups are quantized as soon as they are whole; else nothing is before its unit is.
        num_open: how many of its units are not final.
        device: where the result is: the CPU for what is offloaded, else where it is quantized.
        waits_for_ranks: its scales span ranks, so its units stay staged until all ranks have theirs.
    """

    def __init__(self, entry: Entry, staging: Staging):
        self.entry, self.staging = entry, staging
        self.q: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        self._layout_of_q = self._layout_of_scale = self._results = None
        self.installed = False
        first = entry.tensors[0]
        self.handle = first.detach()
        self.places = list({(id(p.module), p.leaf): p for p in entry.places}.values())
        self.object_at = {place: place.registry[place.leaf] for place in self.places}
        self.base = first.storage_offset()
        self.unit_shape, self.unit_logical = _unit_shapes(entry, first)
        self.unit_numel = math.prod(self.unit_shape)
        self.group = self.unit_shape
        if entry.scheme:
            block = entry.scheme.block
            self.group = tuple(n if b == WHOLE else b for n, b in zip(self.unit_shape, block, strict=True))
        self.unit_box = (0, self.unit_shape[0], 0, self.unit_shape[1])
        self.edges = entry.scheme.edges if entry.scheme and entry.scheme.segments else None
        self.one_scale = isinstance(entry.scheme, PerTensor) and not entry.scheme.segments
        self.row_strides = (self.unit_shape[1], 1)
        self.usual = bool(entry.scheme and entry.dtype in WEIGHT_DTYPES and self.unit_numel)
        # Padding has to be in the groups that it shares a scale with.
        self.streams = bool(entry.scheme and entry.stream and entry.logical == entry.shape and self.unit_numel)
        self.units = [Unit(self, i, staging) for i in range(entry.num_units if entry.scheme else 1)]
        self.num_open = len(self.units)
        self.device = staging.device
        self.waits_for_ranks = False
        self.maxima: torch.Tensor | None = None
        if not entry.scheme:
            self.units[0].buffer = first

    @property
    def final(self) -> bool:
        """Are all units final?"""
        return not self.num_open

    def finished_unit(self):
        """One more of its units is final."""
        self.num_open -= 1
        if not self.num_open:
            self._results = None

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The modules that hold it, each once."""
        return list(dict.fromkeys(place.module for place in self.places))

    def whole_groups(self, box: Box) -> Box | None:
        """The part of a rectangle of a unit that is made of whole groups; None if there is none.

        Where the scale is known already, every rectangle is.
        """
        if self.maxima is not None:
            return box
        (num_rows, num_cols), (group_n, group_k) = self.unit_shape, self.group
        row0, row1, col0, col1 = box
        if self.edges:
            row0 = next(edge for edge in self.edges if edge >= row0)
            row1 = next(edge for edge in reversed(self.edges) if edge <= row1)
            return (row0, row1, col0, col1) if row0 < row1 and col1 - col0 == num_cols else None
        row0, col0 = -(-row0 // group_n) * group_n, -(-col0 // group_k) * group_k
        row1 = row1 if row1 == num_rows else row1 // group_n * group_n
        col1 = col1 if col1 == num_cols else col1 // group_k * group_k
        return (row0, row1, col0, col1) if row0 < row1 and col0 < col1 else None

    def quantize(self, first: int, count: int, box: Box, values: torch.Tensor) -> Box:
        """Quantize what whole groups a rectangle of neighbouring units has, in one launch; returns where they are.

        Args:
            values: `[count, rows, columns]`.
        """
        whole = self.whole_groups(box)
        if whole != box:
            row0, row1, col0, col1 = whole
            values = values[:, row0 - box[0] : row1 - box[0], col0 - box[2] : col1 - box[2]]
        self.allocate()
        scheme = self.entry.scheme.part(*self.segments_in(whole)) if self.edges else self.entry.scheme
        amax = None if self.maxima is None else self.maxima.reshape(-1)[first : first + count]
        with self.staging.on_device():
            quantize_to(values, scheme, *self.result_of(first, count, whole), amax)
        return whole

    def quantize_unit(self, number: int, values: torch.Tensor, amax: torch.Tensor | None = None):
        """Quantize a whole unit in one launch.

        Args:
            values: `[1, N, K]`.
            amax: of its groups, of the shape of its scales, to use instead of its own.
        """
        q, scale = self.result_of_unit(number)
        if self.maxima is not None:
            amax = self.maxima.reshape(-1)[number]
        if amax is not None:
            amax = amax.view(scale.shape)
        if self.staging.is_current():  # a context, even one of nothing, costs as much as a view
            quantize_to(values, self.entry.scheme, q, scale, amax)
        else:
            with self.staging.on_device():
                quantize_to(values, self.entry.scheme, q, scale, amax)

    def result_of_unit(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[1, N, K]` and scales of a unit."""
        if self._results is None:
            self.allocate()
            if len(self.entry.shape) == 2:
                self._results = [(self.q[None], self.scale[None])]
            else:  # views that are made at once cost a fraction of those made one by one
                self._results = list(zip(self.q.split(1), self.scale.split(1), strict=True))
        return self._results[number]

    def result_of(self, first: int, count: int, box: Box) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[count, rows, columns]` and scales of one rectangle of whole groups of neighbouring units."""
        row0, row1, col0, col1 = box
        group_n, group_k = self.group
        if self._layout_of_q is None:
            self._layout_of_q = _layout(self.q)
            self._layout_of_scale = _layout(self.scale) if self.scale.ndim > 1 and not self.edges else None
        start, unit, row, col = self._layout_of_q
        start += first * unit + row0 * row + col0 * col
        q = self.q.as_strided((count, row1 - row0, col1 - col0), (unit, row, col), start)
        if self.edges:
            first_segment, last = self.segments_in(box)
            scales = self.scale.view(-1, self.scale.shape[-1])
            return q, scales[first : first + count, first_segment:last]
        if self._layout_of_scale is None:  # one a unit
            return q, self.scale.reshape(-1)[first : first + count]
        row0, row1, col0, col1 = row0 // group_n, -(-row1 // group_n), col0 // group_k, -(-col1 // group_k)
        start, unit, row, col = self._layout_of_scale
        start += first * unit + row0 * row + col0 * col
        return q, self.scale.as_strided((count, row1 - row0, col1 - col0), (unit, row, col), start)

    def segments_in(self, box):
        """The segments [first, last) that a rectangle of whole ones has."""
        return self.edges.index(box[0]), len(self.edges) - 1 - self.edges[::-1].index(box[1])

    def destination(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of one unit, to write into."""
        self.allocate()
        return (self.q, self.scale) if len(self.entry.shape) == 2 else (self.q[number], self.scale[number])

    def allocate(self):
        """Make the FP8 result, if it is not there yet."""
        if self.q is None:
            entry = self.entry
            scale_shape, dtype = entry.scheme.scale_shape(entry.shape), entry.scheme.scale_dtype
            with outliving():
                q = torch.empty(entry.shape, dtype=entry.fp8_dtype, device=self.device)
                scale = torch.empty(scale_shape, dtype=dtype, device=self.device)
            self.q, self.scale = q, scale  # both or none

    def region(self, t: torch.Tensor, itemsize: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """A view of the tracked storage as (offset, sizes, strides) in elements of the parameter.

        Args:
            t: the view, of any dtype.
            itemsize: bytes of an element of the storage.

        Raises:
            LoadError: the view cuts elements in two.
        """
        offset, sizes, strides, size = t.storage_offset(), tuple(t.shape), t.stride(), t.element_size()
        if size > itemsize:
            factor = size // itemsize
            offset, strides = offset * factor, tuple(s * factor for s in strides)
            sizes, strides = (*sizes, factor), (*strides, 1)
        elif size < itemsize:
            factor = itemsize // size
            dim = next((d for d in range(len(sizes) - 1, -1, -1) if strides[d] == 1), None)
            whole = dim is not None and sizes[dim] % factor == 0 and offset % factor == 0
            if not whole or any(s % factor for d, s in enumerate(strides) if d != dim and sizes[d] > 1):
                raise LoadError(
                    f"`{self.entry.name}` must be written in whole elements, got a {t.dtype} view of shape "
                    f"{tuple(t.shape)} that cuts elements of {itemsize} bytes"
                )
            offset //= factor
            sizes = tuple(s // factor if d == dim else s for d, s in enumerate(sizes))
            strides = tuple(1 if d == dim else s // factor for d, s in enumerate(strides))
        return offset - self.base, sizes, strides


def quantize_to(w, scheme: Scheme, q, scale, amax=None):
    """Quantize into codes and scales that may be on another device than the weight."""
    if q.device == w.device:
        quantize_into(w, scheme, q, scale, amax)
    else:
        made = quantize(w, scheme, dtype=q.dtype, amax=amax)
        for held, new in zip((q, scale), made, strict=True):
            held.copy_(new)


def _layout(t):
    """Where its elements are: offset of the first, strides of units, rows and columns."""
    *unit, row, col = t.stride()
    return t.storage_offset(), unit[0] if unit else 0, row, col


def _unit_shapes(entry, tensor):
    """The matrix that a unit is tracked as, and its logical corner."""
    if entry.scheme:
        return entry.shape[-2:], entry.logical[-2:]
    if not tensor.is_contiguous():  # dense, in another order: tracked as it lies in memory
        return (1, tensor.numel()), None
    if len(entry.shape) < 2:
        return (tensor.numel(), 1), (math.prod(entry.logical), 1)
    return (math.prod(entry.shape[:-1]), entry.shape[-1]), (math.prod(entry.logical[:-1]), entry.logical[-1])
