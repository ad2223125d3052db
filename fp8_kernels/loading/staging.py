"""Where shards wait: a high-precision buffer per open unit, and the FP8 tensors they become.

A *unit* is what has scales of its own: a weight `[N, K]`, or one expert of `[E, N, K]`. Where its scheme has several
groups a unit, those that arrived whole are quantized before the unit is complete (*streamed*), and its buffer holds
only what is left. A pass-through tensor is tracked as one unit that is never quantized, whose buffer is the tensor
itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from ..errors import LoadError
from ..ops import WEIGHT_DTYPES, amax, quantize, quantize_into
from ..reference import FP8_MAX, cast, dequantize, rule
from ..schemes import WHOLE, PerTensor, Scheme
from .arena import Arena, Staging
from .coverage import Box, Coverage
from .plan import Entry

COMPARE_ELEMENTS = 1 << 20  # fp32 temporaries of a comparison hold this many elements each


class Shard:
    """Data that has arrived and waits, held open by its thread: one rectangle of neighbouring units.

    Attributes:
        tracked, first, units: which ones.
        box: which rectangle of each.
        buffer: `[count, rows, columns]`.
        room: the rectangle that the buffer has place for: `box`, or the whole of one unit, where what arrives next to
            `box` joins it.
    """

    __slots__ = ("box", "buffer", "first", "room", "tracked", "units")

    def __init__(
        self,
        tracked: Tracked,
        first: int,
        units: Sequence[Unit],
        box: Box,
        buffer: torch.Tensor,
        room: Box | None = None,
    ):
        self.tracked, self.first, self.units, self.box, self.buffer = tracked, first, units, box, buffer
        self.room = room or box

    @property
    def is_whole(self) -> bool:
        """Is it all of one unit?"""
        return len(self.units) == 1 and self.box == self.tracked.unit_box

    @property
    def values(self) -> torch.Tensor:
        """What has arrived, `[count, rows, columns]`."""
        if self.room == self.box:
            return self.buffer
        row0, row1, col0, col1 = self.box
        return self.buffer[:, row0 - self.room[0] : row1 - self.room[0], col0 - self.room[2] : col1 - self.room[2]]

    def with_next(self, box: Box, dtype: torch.dtype) -> Box | None:
        """The rectangle that this and one next to it, of the same unit, are together, if there is room for that."""
        mine = self.box
        if self.room == mine or self.buffer.dtype is not dtype:
            return None
        if mine[1] == box[0] and mine[2:] == box[2:]:
            return mine[0], box[1], mine[2], mine[3]
        if box[1] == mine[0] and mine[2:] == box[2:]:
            return box[0], mine[1], mine[2], mine[3]
        return None


class Unit:
    """One unit of a tracked tensor; passed to `on_unit`.

    Attributes:
        name: of the parameter.
        index: of the expert; None for a weight of two dimensions.
        shape: (N, K), padding included.
        scheme: None for pass-through.
        dtype: what its high-precision values are held in.
        final: quantized (or, for pass-through, fully written).
        coverage: what was written.
        streamed: what of it is quantized already, in whole groups; None if nothing is.
        shards: what of it threads hold open.
        maximum: fp32, of all that was written, where that is known.
        spilled: what waits on the host, as (rectangle, data), instead of in a buffer.
    """

    def __init__(self, tracked: Tracked, number: int, staging: Staging):
        entry = tracked.entry
        self.tracked = tracked
        self.number = number
        self.index = number if entry.scheme and len(entry.shape) == 3 else None
        self.shape = tracked.unit_shape
        self.coverage = Coverage(self.shape, tracked.unit_logical, staging.device)
        self.streamed: Coverage | None = None
        self.shards: list[Shard] = []
        self.buffer: torch.Tensor | None = None
        self.spilled: list[tuple[Box, torch.Tensor]] | None = None
        self.maximum: torch.Tensor | None = None
        self.final = False
        self.read_since_write = False
        self._staging = staging
        self.dtype = entry.dtype
        self._gaps_are_zero = False

    @property
    def name(self) -> str:
        return self.tracked.entry.name

    @property
    def scheme(self) -> Scheme | None:
        return self.tracked.entry.scheme

    def __str__(self):
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    def dtype_for(self, dtype: torch.dtype | None = None) -> torch.dtype:
        """What the unit has to be held in so that `dtype` is not rounded.

        Quantizing rounds once, from what the checkpoint held, so fp32 data for a bf16 parameter waits in fp32.
        """
        if dtype is self.dtype and dtype is not torch.float64:
            return dtype
        wanted = self.dtype if dtype is None else torch.promote_types(self.dtype, dtype)
        return torch.float32 if wanted == torch.float64 else wanted

    def open(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The buffer, wide enough to hold `dtype`; what waited on the host is back in it."""
        wanted, staging = self.dtype_for(dtype), self._staging
        if self.buffer is None:
            self.buffer = staging.empty(self.shape, wanted)
            staging.opened(self)
            if self.spilled is not None:
                staging.restore(self, self.buffer)
        elif self.buffer.dtype != wanted:
            wider = staging.empty(self.shape, wanted).copy_(self.buffer)
            staging.release(self.buffer)
            self.buffer = wider
        self.dtype = wanted
        return self.buffer

    def keep(self, shard: Shard) -> bool:
        """Move a shard that a thread held open into the buffer; returns whether its memory has become the buffer."""
        i, dtype = self.number - shard.first, shard.buffer.dtype
        fits = len(shard.units) == 1 and shard.buffer.shape[1:] == self.shape and dtype == self.dtype_for(dtype)
        if fits and self.buffer is None and self.spilled is None:
            self.buffer, self.dtype = shard.buffer[0], dtype
            self._staging.opened(self)
            return True
        self.stage(shard.box, shard.values[i])
        return False

    def stage(self, box: Box, values: torch.Tensor):
        """Let the values of a rectangle wait in the buffer."""
        row0, row1, col0, col1 = box
        self.open(values.dtype)[row0:row1, col0:col1].copy_(values)

    def add_streamed(self, box: Box):
        """A rectangle of whole groups is quantized."""
        if self.streamed is None:
            self.streamed = Coverage(self.shape)
        self.streamed.add_box(box)

    def spill(self, host: Arena) -> int:
        """Move what was written and is not quantized to the host; returns its bytes."""
        self.spilled, spilled = [], 0
        for box in self.staged():
            row0, row1, col0, col1 = box
            waiting = host.take((row1 - row0, col1 - col0), self.buffer.dtype)
            waiting.copy_(self.buffer[row0:row1, col0:col1], non_blocking=True)
            self.spilled.append((box, waiting))
            spilled += waiting.nbytes
        self._gaps_are_zero = False
        self.close()
        return spilled

    def close(self):
        """Let go of the buffer."""
        if self.buffer is not None:
            self._staging.release(self.buffer)
            self._staging.closed(self)
            self.buffer = None

    def staged(self, box: Box | None = None) -> list[Box]:
        """The rectangles, of those in `box`, that are written but not quantized."""
        written = self.coverage.written(box)
        if self.streamed is None:
            return written
        return [gap for part in written for gap in self.streamed.missing(part)]

    def staged_mask(self) -> torch.Tensor:
        """Bool `[N, K]`: the elements that are written but not quantized. Not to be changed."""
        mask = self.coverage.as_mask()
        if self.streamed is not None:
            mask = mask.clone()
            for row0, row1, col0, col1 in self.streamed.written():
                mask[row0:row1, col0:col1] = False
        return mask

    def zero_gaps(self):
        """Give what was not written yet the value 0, so that reading it is at least deterministic."""
        if not self._gaps_are_zero:
            buffer = self.open()
            for row0, row1, col0, col1 in self.coverage.missing():
                buffer[row0:row1, col0:col1].zero_()
            self._zero_padding()
            self._gaps_are_zero = True

    def finalize(self, amax: torch.Tensor | None = None):
        """Quantize what is not yet, and let go of the buffer.

        Args:
            amax: of the unit's groups, the shape of its scales, to use instead of its own.
        """
        if self.streamed is None:
            self.open()
            self._zero_padding()
            self.tracked.quantize_unit(self.number, self.buffer[None], self.maximum if amax is None else amax)
        elif not self.streamed.complete:
            for row0, row1, col0, col1 in self.streamed.missing():
                values = self.open()[None, row0:row1, col0:col1]
                self.tracked.quantize(self.number, 1, (row0, row1, col0, col1), values)
        self.close()
        self.finished()

    def amax(self) -> torch.Tensor:
        """The maxima of its groups, fp32 of the shape of its scales."""
        if self.maximum is not None:
            return self.maximum
        buffer = self.open()
        self._zero_padding()
        with self._staging.on_device():
            return amax(buffer, self.scheme)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its codes and scales."""
        return self.tracked.destination(self.number)

    def finished(self):
        """Nothing of it waits any more."""
        self.final = True
        self.coverage = self.streamed = self.maximum = None
        self.tracked.finished_unit()

    def same_codes(self, values: torch.Tensor, box: Box, mask: torch.Tensor | None = None) -> bool:
        """Are these values, cast with the stored scales, the stored codes?

        Args:
            values: of the rectangle `box`.
            mask: bool, the shape of the unit: only elements where it is true count.
        """
        row0, row1, col0, col1 = box
        num_rows, num_cols = self.tracked.unit_logical
        row1, col1 = min(row1, num_rows), min(col1, num_cols)
        if row0 >= row1 or col0 >= col1:  # padding alone
            return True
        q, scale = self.result()
        scale = scale.to(values.device)  # from the host, where it is offloaded
        if not self.tracked.edges:
            return self._same_codes(q, scale, values, (row0, row1, col0, col1), mask)
        for i, (start, end) in enumerate(pairwise(self.tracked.edges)):
            inside = max(row0, start), min(row1, end), col0, col1
            if inside[0] < inside[1]:
                part = values[inside[0] - row0 : inside[1] - row0]
                if not self._same_codes(q, scale[i], part, inside, mask):
                    return False
        return True

    def _same_codes(self, q, scale, values, box, mask):
        (row0, row1, col0, col1) = box
        (group_n, group_k), (*block, _, numerics) = self.tracked.group, self.scheme.quantize_args
        used = rule(q.dtype, numerics, *block)
        scale = scale.reshape(1, 1, 1) if scale.ndim == 0 else scale[None]
        first_col = col0 // group_k * group_k
        columns = slice(col0 // group_k, -(-col1 // group_k))
        step = max(COMPARE_ELEMENTS // max(col1 - first_col, 1), 1)
        if group_n < self.shape[0]:
            step = -(-step // group_n) * group_n
        start = row0 if group_n == self.shape[0] else row0 // group_n * group_n
        while start < row1:
            end = min(start + step, row1)
            first = max(start, row0)
            piece = values.new_zeros(1, end - start, col1 - first_col)
            piece[0, first - start :, col0 - first_col :] = values[first - row0 : end - row0, : col1 - col0]
            groups = slice(start // group_n, -(-end // group_n))
            piece_scale = scale[:, groups, columns]
            codes = cast(piece, piece_scale, q.dtype, *block, used).view(torch.uint8)
            more = _exceeds(piece, piece_scale, q.dtype, *block)
            codes, more = (x[0, first - start :, col0 - first_col :] for x in (codes, more))
            differ = (codes != q[first:end, col0:col1].view(torch.uint8).to(codes.device)) | more
            if mask is not None:
                differ &= mask[first:end, col0:col1]
            if bool(differ.any()):
                return False
            start = end
        return True

    def _zero_padding(self):
        num_rows, num_cols = self.tracked.unit_logical
        if self.scheme and (num_rows, num_cols) != self.shape:
            self.buffer[num_rows:].zero_()
            self.buffer[:, num_cols:].zero_()


def _exceeds(values, scale, fp8_dtype, block_n, block_k):
    """Bool, the shape of `values`: is it more than the largest value that this scale was made for?

    The cast saturates, so the code alone does not tell; a part in a million is left to the rounding of the scale.
    """
    largest = torch.full_like(values, FP8_MAX[fp8_dtype], dtype=fp8_dtype)
    return values.float().abs() > dequantize(largest, scale, torch.float32, block_n, block_k) * (1 + 2**-20)


class Tracked:
    """A plan entry during a load: its units, and what they become.

    Attributes:
        places: where it is registered; grows and shrinks when tensors are tied while they load.
        handle: the tensor as it was found, for writes that do not come through an op.
        q, scale: the FP8 result, allocated when the first group is quantized.
        installed: the model already holds the result.
        group: (rows, columns) that share a scale.
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
        """The part of a rectangle of a unit that is made of whole groups; None if there is none."""
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
        with self.staging.on_device():
            quantize_to(values, scheme, *self.result_of(first, count, whole))
        return whole

    def quantize_unit(self, number: int, values: torch.Tensor, amax: torch.Tensor | None = None):
        """Quantize a whole unit in one launch.

        Args:
            values: `[1, N, K]`.
            amax: of its groups, of the shape of its scales, to use instead of its own.
        """
        if self._results is None:
            self._split_results()
        q, scale = self._results[number]
        if amax is not None:
            amax = amax.view(scale.shape)
        if self.staging.is_current():  # a context, even one of nothing, costs as much as a view
            quantize_to(values, self.entry.scheme, q, scale, amax)
        else:
            with self.staging.on_device():
                quantize_to(values, self.entry.scheme, q, scale, amax)

    def _split_results(self):
        """Codes and scales by unit: views that are made at once cost a fraction of those made one by one."""
        self.allocate()
        is_one = len(self.entry.shape) == 2
        q, scale = (self.q[None], self.scale[None]) if is_one else (self.q, self.scale)
        self._results = list(zip(q.split(1), scale.split(1), strict=True))

    def result_of(self, first: int, count: int, box: Box) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[count, rows, columns]` and scales of one rectangle of whole groups of neighbouring units."""
        row0, row1, col0, col1 = box
        group_n, group_k = self.group
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
        if self._layout_of_q is not None:
            return
        if self.q is None:
            entry = self.entry
            with torch.inference_mode(False):  # it outlives the engine's context
                self.q = torch.empty(entry.shape, dtype=entry.fp8_dtype, device=self.device)
                scale_shape = entry.scheme.scale_shape(entry.shape)
                self.scale = torch.empty(scale_shape, dtype=entry.scheme.scale_dtype, device=self.device)
        self._layout_of_q = _layout(self.q)
        self._layout_of_scale = _layout(self.scale) if self.scale.ndim > 1 and not self.edges else None

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
