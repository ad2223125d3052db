"""Tensors of the host that an engine's loop hands over one by one, moved as fast as whole files are.

A tensor that `safe_open` or `torch.load(mmap=True)` gives lies in a private mapping of its file. Its bytes are then
read from the file, not through the mapping, which would cost a page fault for each few of them; by several threads; and
ahead of the loop, since loops walk files in order. Large tensors in other memory are copied to page-locked memory by
several threads. The C++ in csrc/cpu/ahead.cpp does the work; everything that it does not take is left to torch.

What is read ahead is used only for the very bytes of the file that a tensor lies on, while its mapping is alive, its
file has the size and the time that it had, and no page of the tensor was written to. So a wrong guess costs time, never
values.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import re
import stat
import time
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import LoadError
from .engine import native
from .sources import Sources

SLOT_BYTES, NUM_SLOTS = 4 << 20, 32  # of page-locked memory, used as it is needed
MAX_THREADS = 10  # more read no faster
SMALLEST_BYTES = 1 << 20  # of a tensor in other memory, to be copied by several threads
MAX_MAPPINGS = 4  # files that are known at a time
LOOKED_UP = 0.02  # part of the time that may go into looking up again what is mapped at addresses known to be no file's
_ENDS_EARLY, _DRIVER = -1, -1000


class Counters(ctypes.Structure):
    """What was asked for and read, in bytes and nanoseconds (of all threads); times waited for a read; how often the
    reading began anew, and left a copy to torch; page-locked bytes."""

    _names = ("asked_bytes", "read_bytes", "read_ns", "wait_ns", "declined", "restarts", "pinned_bytes")
    _fields_ = [(name, ctypes.c_int64) for name in _names]


@cache
def library() -> ctypes.CDLL | None:
    """The C++ functions, or None where the extension was not built."""
    found = native()
    if found is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, *arguments in (
        ("fp8_ahead_create", pointer, number, number, number, ctypes.c_int),
        ("fp8_ahead_destroy", None, pointer),
        ("fp8_ahead_forget", None, pointer),
        ("fp8_ahead_counters", None, pointer, ctypes.POINTER(Counters)),
        ("fp8_ahead_memory", number, pointer, pointer, number, number, number, number, pointer),
        ("fp8_ahead_file", number, pointer, ctypes.c_int, *[number] * 7, pointer),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


# The handle of a stream, a tenth of the time that torch.cuda.current_stream() takes.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@dataclass
class Mapping:
    """A private mapping of a file.

    Attributes:
        start, end: addresses.
        offset: in the file, of `start`.
        fd: of the file, shared by the mappings of it.
        file: which one, its bytes, and when it was written to last, in nanoseconds.
        path: for messages.
        keeps: memory of the mapping: while it is held, no other can take the mapping's place.
    """

    start: int
    end: int
    offset: int
    fd: int
    file: tuple[tuple[int, int], int, int]
    path: str
    keeps: torch.UntypedStorage


class Prefetch(Sources):
    """Moves what comes from the host, see above.

    Args:
        device: of what it is moved to; the CPU for tests.
        num_threads: that read; by default as many as there are cores to spare, `MAX_THREADS` at most.
    """

    def __init__(self, device: torch.device, num_threads: int | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._device, self._num_threads = device, num_threads or max(min(cores - 2, MAX_THREADS), 1)
        self._library = library()
        self._readers: dict[str, int | None] = {}  # "file", "memory" -> the C++ object, once it is needed
        self._mappings: list[Mapping] = []  # the latest last
        self._elsewhere: list[
            tuple[int, int]
        ] = []  # addresses, in order, at which no file was when they were looked up
        self._low = self._high = 0  # those of them that the last look was at
        self._look_again, self._pagemap, self._started = 0.0, None, 0.0

    def bring(self, destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False):
        num_bytes = source.nbytes
        if num_bytes < SMALLEST_BYTES:
            address = source.data_ptr()
            known = self._low <= address and address + num_bytes <= self._high
            if known and time.perf_counter() < self._look_again:  # as most small ones are: no file's
                destination.copy_(source, non_blocking)
                return
        if not self._moves(destination, source, non_blocking):
            super().bring(destination, source, non_blocking)

    def close(self):
        for reader in self._readers.values():
            if reader:
                self._library.fp8_ahead_destroy(reader)
        for fd in {mapping.fd for mapping in self._mappings}:
            os.close(fd)
        if self._pagemap is not None:
            os.close(self._pagemap)
        self._readers, self._mappings, self._elsewhere, self._pagemap = {}, [], [], None

    def summary(self) -> tuple[str, int, float] | None:
        counters = self.counters()
        if not counters:
            return None
        how = {"file": "read ahead of the loop", "memory": "through page-locked memory"}
        text = f"{' and '.join(how[kind] for kind in counters)}, {self._num_threads} threads"
        return text, sum(each.asked_bytes for each in counters.values()), time.perf_counter() - self._started

    def counters(self) -> dict[str, Counters]:
        """What each kind of reader that was needed has done."""
        found = {}
        for kind, reader in self._readers.items():
            if reader:
                self._library.fp8_ahead_counters(reader, ctypes.byref(counters := Counters()))
                found[kind] = counters
        return found

    def _moves(self, destination, source, non_blocking):
        """Move it, if that is better than torch's way; returns whether it was."""
        if (
            self._library is None
            or not source.is_cpu
            or destination.device.type != self._device.type
            or source.dtype is not destination.dtype
            or source.shape != destination.shape
            or not destination.is_contiguous()
            or source.is_conj() != destination.is_conj()
        ):
            return False
        num_bytes, mapping = source.nbytes, None
        if not num_bytes:
            return False
        stream = _current_stream(destination.device.index) if destination.is_cuda else 0
        if source.is_contiguous():
            row_bytes, pitch, num_rows = num_bytes, num_bytes, 1
            mapping = self._mapping(source)
        elif source.ndim == 2 and source.stride(1) == 1 and source.stride(0) > source.shape[1]:  # columns of a weight
            size = source.element_size()
            row_bytes, pitch, num_rows = source.shape[1] * size, source.stride(0) * size, source.shape[0]
        else:
            return False
        if mapping is not None:
            result = self._from_file(mapping, source, destination, stream)
        elif num_bytes >= SMALLEST_BYTES:
            # Page-locked memory needs no copy of the host's, and an engine that asked not to wait for it knows when it
            # may write there again.
            if non_blocking and source.is_pinned():
                return False
            reader = self._reader("memory")
            result = reader and self._library.fp8_ahead_memory(
                reader, source.data_ptr(), row_bytes, pitch, num_rows, destination.data_ptr(), stream
            )
        else:
            return False
        if result and result < 0:
            raise self._error(result, mapping)
        return bool(result)

    def _from_file(self, mapping, source, destination, stream):
        reader, address = self._reader("file"), source.data_ptr()
        return reader and self._library.fp8_ahead_file(
            reader,
            self._pagemap,
            address,
            source.nbytes,
            mapping.fd,
            mapping.offset + address - mapping.start,
            *mapping.file[1:],
            destination.data_ptr(),
            stream,
        )

    def _reader(self, kind):
        if not self._readers:
            self._started = time.perf_counter()
        if kind not in self._readers:
            self._readers[kind] = self._library.fp8_ahead_create(
                SLOT_BYTES, NUM_SLOTS, self._num_threads, self._device.type == "cuda"
            )
        return self._readers[kind]

    def _error(self, result, mapping):
        if result <= _DRIVER:
            return RuntimeError(f"the CUDA driver refused a copy from the host: error {_DRIVER - result}")
        what = "it ends before its header says" if result == _ENDS_EARLY else os.strerror(-1 - result)
        return LoadError(f"cannot read {mapping.path}: {what}")

    # Where a tensor of the host lies.

    def _mapping(self, source: torch.Tensor) -> Mapping | None:
        """The private mapping of a file that a contiguous tensor is in."""
        start = source.data_ptr()
        end = start + source.nbytes
        for mapping in reversed(self._mappings):
            if mapping.start <= start and end <= mapping.end:
                return mapping
        at = bisect.bisect_right(self._elsewhere, (start, 1 << 64)) - 1
        if at >= 0 and end <= self._elsewhere[at][1]:
            self._low, self._high = self._elsewhere[at]
            if time.perf_counter() < self._look_again:
                return None
        self._low = self._high = 0
        began, found, mapped = time.perf_counter(), None, _mapped()
        at = bisect.bisect_right(mapped, (start, 1 << 64)) - 1
        if at >= 0:
            first, last, file = mapped[at]
            if file is not None and end <= last:
                found = self._known(first, last, *_described(*file), source.untyped_storage())
                if found is None:
                    mapped[at] = first, last, None
        self._elsewhere = [(first, last) for first, last, file in mapped if file is None]
        now = time.perf_counter()
        self._look_again = now + (now - began) / LOOKED_UP
        return found

    def _known(self, start, end, offset, device, inode, path, keeps):
        if self._pagemap is None:
            try:
                self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
        fd = _open(start, end, device, inode, path)
        if fd is None:
            return None
        status = os.fstat(fd)
        file = (status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns
        same = next((mapping.fd for mapping in self._mappings if mapping.file == file), None)
        if same is not None:  # what is read ahead of it goes on
            os.close(fd)
            fd = same
        mapping = Mapping(start, end, offset, fd, file, path, keeps)
        self._mappings.append(mapping)
        if len(self._mappings) > MAX_MAPPINGS:
            oldest = self._mappings.pop(0)
            if all(other.fd != oldest.fd for other in self._mappings):
                if self._readers.get("file"):
                    self._library.fp8_ahead_forget(self._readers["file"])  # the number of the file may be given anew
                os.close(oldest.fd)
        return mapping


# First and last address, access, offset, device, inode, path.
_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) +(\S+) +([0-9a-f]+) +(\S+) +(\d+) *(.*)$", re.MULTILINE)


def _mapped() -> list[tuple[int, int, list[bytes] | None]]:
    """(first, last address, what `_described` takes of a file that is mapped privately there, or None)."""
    try:
        with open("/proc/self/maps", "rb") as file:
            lines = _LINE.findall(file.read())
    except OSError:  # no such thing on this system
        return []
    return [
        (int(first, 16), int(last, 16), file if access[-1:] == b"p" and file[-1][:1] == b"/" else None)
        for first, last, access, *file in lines
    ]


def _described(offset, device, inode, path):
    """(offset, device, inode, path) of a mapped file, which few of the many are asked for."""
    major, minor = (int(each, 16) for each in device.split(b":"))
    return int(offset, 16), os.makedev(major, minor), int(inode), os.fsdecode(path)


def _open(start, end, device, inode, path):
    """The mapped file, which need not be the one that has its name now; None where it cannot be had."""
    for name in (f"/proc/self/map_files/{start:x}-{end:x}", path):
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        status = os.fstat(fd)
        same = name != path or (status.st_dev, status.st_ino) == (device, inode)
        if same and stat.S_ISREG(status.st_mode):
            return fd
        os.close(fd)
    return None
