"""Where shards wait: a high-precision buffer per open unit, and the FP8 tensors they become.

A *unit* is what is quantized at once: a weight `[N, K]`, or one expert of `[E, N, K]`. A pass-through tensor is
tracked as one unit that is never quantized, whose buffer is the tensor itself.
"""

from __future__ import annotations

import contextlib
import math

import torch

from ..errors import LoadError
from ..ops import quantize
from ..reference import FP8_MAX, cast, dequantize, rule
from ..schemes import WHOLE, Scheme
from .coverage import Coverage
from .plan import Entry

COMPARE_ELEMENTS = 1 << 22  # fp32 temporaries of a comparison hold this many elements each


class Staging:
    """Allocates high-precision buffers and knows how many bytes are out, now and at most."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0
        self.peak = 0

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised buffer; give it back with `release`."""
        buffer = torch.empty(shape, dtype=dtype, device=self.device)
        self.bytes += buffer.nbytes
        self.peak = max(self.peak, self.bytes)
        return buffer

    def release(self, buffer: torch.Tensor):
        """Count the buffer as free; its memory goes when the caller's reference does."""
        self.bytes -= buffer.nbytes


class Unit:
    """One unit of a tracked tensor; passed to `on_unit`.

    Attributes:
        name: of the parameter.
        index: of the expert; None for a weight of two dimensions.
        shape: (N, K), padding included.
        scheme: None for pass-through.
        final: quantized (or, for pass-through, fully written).
    """

    def __init__(self, tracked: Tracked, number: int, staging: Staging):
        entry = tracked.entry
        self.tracked = tracked
        self.number = number
        self.index = number if entry.scheme and len(entry.shape) == 3 else None
        self.shape = tracked.unit_shape
        self.coverage = Coverage(self.shape, tracked.unit_logical, staging.device)
        self.buffer: torch.Tensor | None = None
        self.final = False
        self.read_since_write = False
        self._staging = staging
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
        wanted = self.tracked.entry.dtype if self.buffer is None else self.buffer.dtype
        wanted = wanted if dtype is None else torch.promote_types(wanted, dtype)
        return torch.float32 if wanted == torch.float64 else wanted

    def open(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The buffer, wide enough to hold `dtype`."""
        wanted = self.dtype_for(dtype)
        if self.buffer is None:
            self.buffer = self._staging.empty(self.shape, wanted)
        elif self.buffer.dtype != wanted:
            wider = self._staging.empty(self.shape, wanted)
            self._staging.release(self.buffer)
            self.buffer = wider.copy_(self.buffer)
        return self.buffer

    def zero_gaps(self):
        """Give what was not written yet the value 0, so that reading it is at least deterministic."""
        if not self._gaps_are_zero:
            buffer = self.open()
            for row0, row1, col0, col1 in self.coverage.missing():
                buffer[row0:row1, col0:col1].zero_()
            self._zero_padding()
            self._gaps_are_zero = True

    def finalize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize into the destination and let go of the buffer; returns this unit's codes and scales."""
        buffer = self.open()
        self._zero_padding()
        device = self._staging.device
        q, scale = self.tracked.destination(self.number, device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            quantize(buffer, self.scheme, out=(q, scale))
        self._staging.release(buffer)
        self.buffer, self.final = None, True
        self.coverage = None
        return q, scale

    def same_codes(self, values: torch.Tensor, boxes, mask: torch.Tensor | None) -> bool:
        """Are these values, cast with the stored scales, the stored codes?

        Args:
            values: `[N, K]`, of which only the elements in `boxes` count, or those where `mask` is true.
        """
        num_rows, num_cols = self.shape
        block_n, block_k, _, numerics = self.scheme.quantize_args
        q, scale = self.tracked.destination(self.number, self._staging.device)
        used = rule(q.dtype, numerics, block_n, block_k)
        scale = scale[None, None] if scale.ndim == 0 else scale
        logical_rows, logical_cols = self.tracked.unit_logical
        for row0, row1, col0, col1 in [(0, num_rows, 0, num_cols)] if boxes is None else boxes:
            row1, col1 = min(row1, logical_rows), min(col1, logical_cols)
            align = 1 if block_n == WHOLE else block_n
            step = max(COMPARE_ELEMENTS // max(num_cols, 1) // align, 1) * align
            for start in range(row0 // align * align, row1, step):
                end = min(start + step, num_rows)
                groups = slice(None) if block_n == WHOLE else slice(start // align, -(-end // align))
                codes = cast(values[None, start:end], scale[None, groups], q.dtype, block_n, block_k, used)[0]
                differ = codes.view(torch.uint8) != q[start:end].view(torch.uint8)
                differ |= _exceeds(values[None, start:end], scale[None, groups], q.dtype, block_n, block_k)[0]
                first, last = max(row0, start) - start, min(row1, end) - start
                differ = differ[first:last, col0:col1]
                if mask is not None:
                    differ = differ & mask[start + first : start + last, col0:col1]
                if bool(differ.any()):
                    return False
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
        q, scale: the FP8 result, allocated when the first unit is final.
        installed: the model already holds the result.
    """

    def __init__(self, entry: Entry, staging: Staging):
        self.entry = entry
        self.q: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        self.installed = False
        first = entry.tensors[0]
        self.handle = first.detach()
        self.places = list({(id(p.module), p.leaf): p for p in entry.places}.values())
        self.object_at = {place: place.registry[place.leaf] for place in self.places}
        self.base = first.storage_offset()
        self.unit_shape, self.unit_logical = _unit_shapes(entry, first)
        self.unit_numel = math.prod(self.unit_shape)
        self.units = [Unit(self, i, staging) for i in range(entry.num_units if entry.scheme else 1)]
        if not entry.scheme:
            self.units[0].buffer = first

    @property
    def final(self) -> bool:
        """Are all units final?"""
        return all(unit.final for unit in self.units)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The modules that hold it, each once."""
        return list(dict.fromkeys(place.module for place in self.places))

    def destination(self, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of one unit, to write into."""
        self.allocate(device)
        return (self.q, self.scale) if len(self.entry.shape) == 2 else (self.q[number], self.scale[number])

    def allocate(self, device: torch.device):
        """Make the FP8 result, if it is not there yet."""
        if self.q is None:
            entry = self.entry
            self.q = torch.empty(entry.shape, dtype=entry.fp8_dtype, device=device)
            scale_shape = entry.scheme.scale_shape(entry.shape)
            self.scale = torch.empty(scale_shape, dtype=entry.scheme.scale_dtype, device=device)

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


def _unit_shapes(entry, tensor):
    """The matrix that a unit is tracked as, and its logical corner."""
    if entry.scheme:
        return entry.shape[-2:], entry.logical[-2:]
    if not tensor.is_contiguous():  # dense, in another order: tracked as it lies in memory
        return (1, tensor.numel()), None
    if len(entry.shape) < 2:
        return (tensor.numel(), 1), (math.prod(entry.logical), 1)
    return (math.prod(entry.shape[:-1]), entry.shape[-1]), (math.prod(entry.logical[:-1]), entry.logical[-1])
