"""Moving bytes of files and of host memory to a device: the C++ threads of csrc/cpu/reader.cpp, or Python's.

Both engines take *runs* of bytes in the order in which they are needed, read them into a ring of page-locked slots, a
chunk in each and several at a time, and enqueue the copy of each chunk on one stream. Runs that belong together are a
*group*, which arrives as a whole, and whose memory is given back as a whole.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import threading
import time
from array import array
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from .. import _ext

MAX_GROUPS = 512  # that may be between being copied and being released
HOST = -1  # in the place of a file: host memory
ENDS_EARLY = "the file ends before its header says"
_PAGE = 4096


class Run(NamedTuple):
    """A run of bytes.

    Attributes:
        fd, offset: of a file; `HOST` and an address for host memory.
        bytes: at least one.
        to: address on the device.
        group: that it is part of; groups are added whole, and count from 0.
        after: copies of its group come after the release of that group; -1 for none.
    """

    fd: int
    offset: int
    bytes: int
    to: int
    group: int
    after: int


class Counters(ctypes.Structure):
    """What an engine has done: bytes read, nanoseconds of all threads together, page-locked bytes, and slots that the
    system refused to lock."""

    _names = ("bytes", "read_ns", "slot_wait_ns", "pin_ns", "release_wait_ns", "pinned_bytes", "unpinned_slots")
    _fields_ = [(name, ctypes.c_int64) for name in _names]


class _Options(ctypes.Structure):
    _names = ("num_threads", "chunk_bytes", "max_groups", "direct", "on_device", "stream")
    _fields_ = [(name, ctypes.c_int64) for name in _names]


class EngineError(Exception):
    """What stopped an engine.

    Attributes:
        what: in the words of the system.
        group: whose bytes could not be read; -1 if it was not that.
    """

    def __init__(self, what: str, group: int = -1):
        super().__init__(what)
        self.what, self.group = what, group


@cache
def native() -> ctypes.CDLL | None:
    """The C++ functions, or None where the extension was not built."""
    path = _ext.path("cpu")
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, *arguments in (
        ("fp8_ring_create", pointer, number, number, ctypes.c_int, ctypes.c_int),
        ("fp8_ring_destroy", None, pointer),
        ("fp8_transfer_create", pointer, pointer, number, ctypes.POINTER(_Options)),
        ("fp8_transfer_add", ctypes.c_int, pointer, pointer, number),
        ("fp8_transfer_wait", ctypes.c_int, pointer, number, ctypes.c_int, pointer),
        ("fp8_transfer_release", ctypes.c_int, pointer, number, pointer),
        ("fp8_transfer_error", number, pointer, ctypes.c_char_p, number),
        ("fp8_transfer_counters", None, pointer, ctypes.POINTER(Counters)),
        ("fp8_transfer_destroy", None, pointer),
        ("fp8_read_rows", number, number, number, number, number, number, pointer, number),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class NativeEngine:
    """The C++ threads.

    Args:
        num_threads: that read.
        chunk_bytes, num_slots: of the ring.
        direct: files are open with O_DIRECT.
        lock: page-lock the ring, so far as the system lets.
        stream: of the copies; None to copy to host memory.
    """

    def __init__(self, num_threads: int, chunk_bytes: int, num_slots: int, direct: bool, lock: bool, stream):
        self._library = native()
        self._transfer = None
        self._ring = self._library.fp8_ring_create(chunk_bytes, num_slots, direct, lock)
        if not self._ring:
            raise EngineError(f"{chunk_bytes * num_slots} bytes of host memory cannot be had")
        handle = 0 if stream is None else stream.cuda_stream
        options = _Options(num_threads, chunk_bytes, MAX_GROUPS, direct, stream is not None, handle)
        self._transfer = self._library.fp8_transfer_create(self._ring, num_slots, ctypes.byref(options))
        if not self._transfer:
            self.close()
            raise EngineError("no memory or no threads")

    def add(self, runs: Sequence[Run]):
        """Have these moved, after all that were added before."""
        numbers = array("q", itertools.chain.from_iterable(runs))
        if not self._library.fp8_transfer_add(self._transfer, numbers.buffer_info()[0], len(runs)):
            raise EngineError("out of memory")

    def wait(self, group: int, stream=None):
        """Wait until the copies of a group are enqueued; `stream` then comes after them."""
        handle = 0 if stream is None else stream.cuda_stream
        if not self._library.fp8_transfer_wait(self._transfer, group, stream is not None, handle):
            self._raise()

    def release(self, group: int, stream=None):
        """What is enqueued on `stream` by now is the last that uses where groups up to this one were copied to."""
        if not self._library.fp8_transfer_release(self._transfer, group, 0 if stream is None else stream.cuda_stream):
            self._raise()

    def counters(self) -> Counters:
        """What was done so far."""
        found = Counters()
        self._library.fp8_transfer_counters(self._transfer, ctypes.byref(found))
        return found

    def close(self):
        """Stop, wait for what is under way, and give all memory back."""
        if self._transfer:
            self._library.fp8_transfer_destroy(self._transfer)
        if self._ring:
            self._library.fp8_ring_destroy(self._ring)
        self._transfer = self._ring = None

    def _raise(self):
        text = ctypes.create_string_buffer(300)
        group = self._library.fp8_transfer_error(self._transfer, text, len(text))
        raise EngineError(text.value.decode(errors="replace") or "the transfer was stopped", group)


class PythonEngine:
    """The same with Python's threads, which wait for the interpreter between two reads, where nothing was compiled."""

    def __init__(self, num_threads: int, chunk_bytes: int, num_slots: int, direct: bool, lock: bool, stream):
        self._direct, self._stream, self._num_slots, self._chunk_bytes = direct, stream, num_slots, chunk_bytes
        self._slots, self._copied = [], [None] * num_slots
        self._counters, self._changed = Counters(), threading.Condition()
        for _ in range(num_slots):
            memory = self._allocate(chunk_bytes + 2 * _PAGE, lock)
            lead = -memory.data_ptr() % _PAGE
            self._slots.append(memory[lead : lead + chunk_bytes + _PAGE])
        self._chunks: list[Run] = []
        self._read: dict[int, int] = {}  # chunk -> where it begins in its slot
        self._events: dict[int, tuple] = {}  # group -> (copied, released)
        self._next = self._issued = self._groups_issued = self._released = 0
        self._stopped, self._error = False, None
        targets = [self._copy_chunks, *[self._read_chunks] * num_threads]
        self._threads = [threading.Thread(target=self._run, args=(target,), daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def add(self, runs: Sequence[Run]):
        with self._changed:
            for run in runs:
                for start in range(0, run.bytes, self._chunk_bytes):
                    size = min(self._chunk_bytes, run.bytes - start)
                    self._chunks.append(run._replace(offset=run.offset + start, bytes=size, to=run.to + start))
            self._changed.notify_all()

    def wait(self, group: int, stream=None):
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._groups_issued > group)
            if self._groups_issued <= group:
                raise self._error or EngineError("the transfer was stopped")
            copied = self._events.get(group)
        if stream is not None and copied is not None:
            stream.wait_event(copied)

    def release(self, group: int, stream=None):
        with self._changed:
            if stream is not None:
                self._events[~group] = stream.record_event()
            self._released = group + 1
            self._changed.notify_all()

    def counters(self) -> Counters:
        return self._counters

    def close(self):
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for event in self._copied:
            if event is not None:
                event.synchronize()
        self._slots = []

    def _allocate(self, size, lock):
        if self._stream is not None and lock:
            try:
                memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the system refuses to lock as much
                pass
            else:
                self._counters.pinned_bytes += size
                return memory
        self._counters.unpinned_slots += self._stream is not None
        return torch.empty(size, dtype=torch.uint8)

    def _run(self, work):
        try:
            work()
        except BaseException as error:
            with self._changed:
                if self._error is None:
                    self._error = error if isinstance(error, EngineError) else EngineError(str(error))
                self._stopped = True
                self._changed.notify_all()

    def _read_chunks(self):
        while True:
            with self._changed:
                i, self._next = self._next, self._next + 1
                self._changed.wait_for(
                    lambda i=i: self._stopped or (i < len(self._chunks) and self._issued > i - self._num_slots)
                )
                if self._stopped:
                    return
                chunk = self._chunks[i]
            slot, copied = self._slots[i % self._num_slots], self._copied[i % self._num_slots]
            if copied is not None:
                copied.synchronize()
            started = time.perf_counter_ns()
            if chunk.fd == HOST:
                ctypes.memmove(slot.data_ptr(), chunk.offset, chunk.bytes)
                lead = 0
            else:
                try:
                    lead = read_run(chunk.fd, chunk.offset, chunk.bytes, memoryview(slot.numpy()), self._direct)
                except EngineError as error:
                    raise EngineError(error.what, chunk.group) from None
            with self._changed:
                self._counters.read_ns += time.perf_counter_ns() - started
                self._counters.bytes += chunk.bytes
                self._read[i] = lead
                self._changed.notify_all()

    def _copy_chunks(self):
        i, group = 0, -1
        while self._may_copy(lambda i=i: i in self._read):
            chunk, lead = self._chunks[i], self._read.pop(i)
            slot = i % self._num_slots
            if chunk.group != group:
                group = chunk.group
                if not self._may_copy(lambda after=chunk.after: self._released > after):
                    return
                released = self._events.pop(~chunk.after, None)
                if released is not None:
                    self._stream.wait_event(released)
            source = self._slots[slot][lead : lead + chunk.bytes]
            if self._stream is None:
                ctypes.memmove(chunk.to, source.data_ptr(), chunk.bytes)
            else:
                with torch.cuda.stream(self._stream):
                    _device_bytes(chunk.to, chunk.bytes, self._stream.device).copy_(source, non_blocking=True)
                self._copied[slot] = self._stream.record_event()
            i += 1
            with self._changed:
                self._issued = i
                if i == len(self._chunks) or self._chunks[i].group != group:
                    self._events[group], self._groups_issued = self._copied[slot], group + 1
                self._changed.notify_all()

    def _may_copy(self, ready):
        """Wait for that; False where all is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or ready())
            return not self._stopped


def read_run(fd: int, offset: int, num_bytes: int, to: memoryview, direct: bool = False) -> int:
    """Read a run of a file; returns where it begins in `to`.

    Args:
        to: of at least `num_bytes` bytes; with `direct` aligned to pages and a page larger, as whole ones are read.

    Raises:
        EngineError: the file ends before, or cannot be read.
    """
    lead = offset % _PAGE if direct else 0
    needed = lead + num_bytes
    wanted = -(-needed // _PAGE) * _PAGE if direct else needed
    done = 0
    while done < needed:
        try:
            got = os.preadv(fd, [to[done:wanted]], offset - lead + done)
        except OSError as error:
            raise EngineError(os.strerror(error.errno or errno.EIO)) from error
        done += got
        if done >= needed:
            break
        if direct:
            done -= done % _PAGE  # where the next read may begin
        if got == 0 or (direct and got < _PAGE):
            raise EngineError(ENDS_EARLY)
    return lead


def read_rows(fd: int, offset: int, stride: int, row_bytes: int, num_rows: int, to: torch.Tensor, num_threads: int = 1):
    """Read rows that begin `stride` bytes apart in a file, one below the other, and nothing between them.

    Args:
        to: contiguous CPU tensor of `row_bytes * num_rows` bytes.

    Raises:
        EngineError: the file ends before, or cannot be read.
    """
    if not row_bytes or not num_rows:
        return
    library = native()
    if library is not None:
        result = library.fp8_read_rows(fd, offset, stride, row_bytes, num_rows, to.data_ptr(), num_threads)
        if result:
            raise EngineError(ENDS_EARLY if result == -1 else os.strerror(-1 - result))
        return
    view = memoryview(to.reshape(-1).view(torch.uint8).numpy())
    if stride == row_bytes:
        row_bytes, num_rows = row_bytes * num_rows, 1
    for row in range(num_rows):
        read_run(fd, offset + row * stride, row_bytes, view[row * row_bytes : (row + 1) * row_bytes])


class _DeviceBytes:
    def __init__(self, address, num_bytes):
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _device_bytes(address, num_bytes, device):
    """That memory as a tensor."""
    return torch.as_tensor(_DeviceBytes(address, num_bytes), device=device)
