"""Memory for high-precision data: buffers carved out of a few large allocations.

A load takes and gives back thousands of buffers of a handful of sizes while the FP8 model is allocated between them.
Left to torch's allocator they would split each other's blocks, and reserved memory would grow past the sum of both.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .sources import Sources

if TYPE_CHECKING:
    from .unit import Unit

ALIGNMENT = 512  # bytes; of every buffer's start
SMALLEST_BUDGET = 256 << 20
HOST_SLAB = 16 << 20  # page-locked while the load waits


class Staging:
    """High-precision buffers within a budget of device memory; beyond it the oldest open units wait on the host.

    Args:
        device: where units are quantized.
        largest_unit: high-precision bytes of the largest unit.
        budget: bytes; by default the larger of 256 MiB and two of the largest units. One op's own data is always
            held, whatever the budget.
        sources: copies what arrives.

    Attributes:
        in_use: units that the running op needs: they do not spill.
        spills, spilled_bytes: how often a unit went to the host, and the bytes that did.
    """

    def __init__(
        self,
        device: torch.device,
        largest_unit: int = 0,
        budget: int | None = None,
        sources: Sources | None = None,
    ):
        self.device = device
        self.sources = sources or Sources()
        self.budget = max(SMALLEST_BUDGET, 2 * largest_unit) if budget is None else budget
        self.in_use: Iterable[Unit] = ()
        self.spills = self.spilled_bytes = 0
        self._arena = Arena(device, self.budget, largest_unit)
        self._host = Arena(torch.device("cpu"), first=HOST_SLAB, pin=device.type == "cuda")
        self._is_cuda = device.type == "cuda"
        self._open: dict[Unit, None] = {}  # those with a buffer, oldest first
        self._moved: set[Unit] = set()  # out of another's way, once
        self._stream = None

    @property
    def bytes(self) -> int:
        """Bytes of device buffers that are out."""
        return self._arena.bytes

    @property
    def peak(self) -> int:
        """The most that `bytes` has been."""
        return self._arena.peak

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised buffer; give it back with `release`."""
        buffer = self.spare(shape, dtype)
        if buffer is None:
            self._make_room(shape, dtype)
            buffer = self._arena.take(shape, dtype)
        while buffer is None:
            unit = next((unit for unit in self._open if unit not in self.in_use), None)
            if unit is None:
                return self._arena.take(shape, dtype, beyond_limit=True)
            self._spill(unit)
            buffer = self._arena.take(shape, dtype)
        return buffer

    def spare(self, shape, dtype: torch.dtype) -> torch.Tensor | None:
        """A buffer out of memory that it has already; None where it has no room there."""
        return self._arena.take(shape, dtype, may_grow=False)

    def _spill(self, unit):
        self.spilled_bytes += unit.spill(self._host)
        self.spills += 1

    def _make_room(self, shape, dtype):
        """Empty a slab for such a buffer, where of the units that wait there less was written than it takes.

        With a unit whose file ended in the middle, all that does not fit beside it would else need another slab as
        large. Not for a unit of the same size, and each unit once: those that take turns would go to and fro.
        """
        if self._arena.reserved >= self.budget // 2:
            return
        wanted = _aligned(math.prod(shape) * dtype.itemsize)
        for slab, bytes_out in self._arena.large_enough(wanted):
            units = [u for u in self._open if u not in self.in_use and u not in self._moved and slab.holds(u.buffer)]
            if bytes_out in (0, wanted) or bytes_out != sum(_aligned(unit.buffer.nbytes) for unit in units):
                continue
            if sum(unit.bytes_of(box) for unit in units for box in unit.staged()) < wanted:
                for unit in units:
                    self._spill(unit)
                self._moved.update(units)
                return

    def has_room(self, shape, dtype: torch.dtype) -> bool:
        """Can it give such a buffer out of memory that it has already?"""
        return self._arena.has_room(shape, dtype)

    def release(self, buffer: torch.Tensor):
        """Take a buffer back; it is used again for what is enqueued later."""
        self._arena.give(buffer)

    def opened(self, unit: Unit):
        """The unit has a buffer now, and is the youngest."""
        self._open[unit] = None

    def closed(self, unit: Unit):
        """The unit has no buffer any more."""
        self._open.pop(unit, None)

    def restore(self, unit: Unit, buffer: torch.Tensor):
        """Bring back what of the unit waits on the host."""
        for (row0, row1, col0, col1), waiting in unit.spilled:
            buffer[row0:row1, col0:col1].copy_(waiting, non_blocking=True)
            self._host.give(waiting)
        unit.spilled = None

    def close(self):
        """Give all memory back; nothing can be staged any more."""
        self.sources.close()
        self._arena = self._host = None
        self._open.clear()
        self._moved.clear()

    def follow(self):
        """Let the current stream come after the one that used the buffers before, if that was another."""
        if self._is_cuda:
            handle = torch._C._cuda_getCurrentRawStream(self.device.index)
            if self._stream is None or handle != self._stream.cuda_stream:
                stream = torch.cuda.current_stream(self.device)
                if self._stream is not None:
                    stream.wait_stream(self._stream)
                self._stream = stream

    def is_current(self) -> bool:
        """Is the device the thread's current one?"""
        return not self._is_cuda or torch._C._cuda_getDevice() == self.device.index

    def on_device(self) -> contextlib.AbstractContextManager:
        """Kernels launched inside go to the device, whatever the thread's current one is."""
        return _NOTHING if self.is_current() else torch.cuda.device(self.device)


_NOTHING = contextlib.nullcontext()


def outliving() -> contextlib.AbstractContextManager:
    """Tensors made inside outlive the engine's context, whose inference mode may be on."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


class Arena:
    """Buffers out of slabs that are allocated when they are first needed and kept until the arena goes.

    Each slab is as large as all slabs before it, so an orderly load stays small and few slabs reach any limit.

    Args:
        device: of the memory.
        limit: bytes of all slabs at most; `None` for no limit.
        first: bytes of the first slab, unless a larger buffer is asked for.
        pin: page-locked host memory.

    Attributes:
        bytes, peak: bytes of the buffers that are out, now and at most.
        reserved: bytes of all slabs.
    """

    def __init__(self, device: torch.device, limit: int | None = None, first: int = 1 << 20, pin: bool = False):
        self.device, self.limit, self.first, self.pin = device, limit, first, pin
        self.bytes = self.peak = self.reserved = 0
        self._slabs: list[_Slab] = []
        self._last: torch.Tensor | None = None  # given back last: the next one is often like it
        self._out: dict[int, tuple[_Slab | None, int, int, int]] = {}  # address -> slab, start, end, bytes

    def take(self, shape, dtype: torch.dtype, beyond_limit: bool = False, may_grow: bool = True) -> torch.Tensor | None:
        """An uninitialised contiguous buffer; None if the limit leaves no room.

        Args:
            may_grow: allocate another slab where those that there are have no room.
            beyond_limit: allocate one apart where the limit leaves no room.
        """
        last = self._last
        if last is not None:
            self._last = None
            if last.shape == shape and last.dtype is dtype:
                self._count(self._out[last.data_ptr()][3])
                return last
            self._free(last)
        nbytes = math.prod(shape) * dtype.itemsize
        size = _aligned(nbytes)
        if not nbytes:
            return torch.empty(shape, dtype=dtype, device=self.device)
        for slab in self._slabs:
            start = slab.take(size)
            if start is not None:
                break
        else:
            slab, start = self._grow(size) if may_grow else None, 0
            if slab is None and not beyond_limit:
                return None
        if slab is None:
            buffer = self._allocate(shape, dtype)
        else:
            strides, stride = [], 1
            for extent in reversed(shape):
                strides.append(stride)
                stride *= extent
            buffer = slab.typed(dtype).as_strided(shape, strides[::-1], start // dtype.itemsize)
        self._out[buffer.data_ptr()] = slab, start, start + size, nbytes
        self._count(nbytes)
        return buffer

    def large_enough(self, num_bytes: int) -> list[tuple[_Slab, int]]:
        """The slabs that could hold that many bytes if they were empty, and what is out of each."""
        return [(slab, slab.size - slab.num_free) for slab in self._slabs if slab.size >= num_bytes]

    def has_room(self, shape, dtype: torch.dtype) -> bool:
        """Is there a buffer without a new slab?"""
        last = self._last
        if last is not None and last.shape == shape and last.dtype is dtype:
            return True
        size = math.prod(shape) * dtype.itemsize
        for slab in self._slabs:
            for start, end in slab.free:
                if end - start >= size:
                    return True
        return False

    def give(self, buffer: torch.Tensor):
        """Take a buffer back; what is enqueued on it comes before whatever uses its memory next."""
        address = buffer.data_ptr()
        if not address:  # without elements
            return
        self.bytes -= self._out[address][3]
        if self._last is not None:
            self._free(self._last)
        self._last = buffer

    def _count(self, nbytes):
        self.bytes += nbytes
        if self.bytes > self.peak:
            self.peak = self.bytes

    def _free(self, buffer):
        slab, start, end, _ = self._out.pop(buffer.data_ptr())
        if slab is not None:
            slab.give(start, end)

    def _grow(self, size):
        """A new slab with a buffer of that size taken from its start."""
        room = math.inf if self.limit is None else self.limit - self.reserved
        wanted = max(size, min(max(self.first, self.reserved), room))
        if wanted > room:
            return None
        self.reserved += wanted
        self._slabs.append(_Slab(self._allocate((wanted,), torch.uint8)))
        self._slabs[-1].take(size)
        return self._slabs[-1]

    def _allocate(self, shape, dtype):
        with outliving():
            return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self.pin)


def _aligned(num_bytes):
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class _Slab:
    """One allocation, and the free intervals in it: sorted, disjoint, none touching the next."""

    def __init__(self, memory: torch.Tensor):
        self._memory, self.size = memory, memory.numel()
        self.free: list[tuple[int, int]] = [(0, memory.numel())]
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    @property
    def num_free(self) -> int:
        """Bytes that are not taken."""
        return sum(end - start for start, end in self.free)

    def holds(self, buffer: torch.Tensor) -> bool:
        """Does a buffer lie in it?"""
        return 0 <= buffer.data_ptr() - self._memory.data_ptr() < self.size

    def typed(self, dtype):
        """The slab as elements of that dtype."""
        typed = self._typed.get(dtype)
        if typed is None:
            whole = self._memory.numel() // dtype.itemsize * dtype.itemsize
            typed = self._typed[dtype] = self._memory[:whole].view(dtype)
        return typed

    def take(self, size):
        """Where `size` bytes begin that are taken now; None if no interval holds them."""
        for i, (start, end) in enumerate(self.free):
            if end - start >= size:
                if end - start == size:
                    del self.free[i]
                else:
                    self.free[i] = start + size, end
                return start
        return None

    def give(self, start, end):
        free = self.free
        i = bisect_left(free, (start, end))
        if i < len(free) and free[i][0] == end:
            end = free.pop(i)[1]
        if i and free[i - 1][1] == start:
            i -= 1
            start = free.pop(i)[0]
        free.insert(i, (start, end))
