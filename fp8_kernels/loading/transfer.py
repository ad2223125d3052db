"""Host to device: spans of files, and tensors of the host, read by many threads and copied while others are read.

How is decided by what the files are and what the machine is, see `Options.for_files`; `engine` does the work.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import CheckpointError, LoadError
from .engine import HOST, MAX_GROUPS, EngineError, NativeEngine, PythonEngine, Run, native
from .report import size_text

RING_BYTES = 40 << 20  # of device memory where spans arrive, while others are used
_ALIGNMENT = 512
# Of bytes in memory already. What lies in a larger ring leaves the processor's cache before it is copied; neighbouring
# slots are copied as one, so that small chunks cost the wire little. Where ten threads read as fast as the wire, more
# do no harm, and where the host is slow they read a twentieth more.
_MAX_THREADS, _CHUNK_BYTES, _NUM_SLOTS = 14, 1 << 20, 48
_PROBES = 16  # places of a file that are looked for in the page cache
_COLD = 0.5  # with less of it in the page cache, a file is read from the disk


@dataclass(frozen=True)
class Span:
    """A run of bytes of a file, at least one, that is moved as a whole."""

    path: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Options:
    """How bytes are moved.

    Attributes:
        num_threads: that read.
        chunk_bytes: that a thread reads at a time, into one slot.
        num_slots: of page-locked memory.
        direct: read past the page cache.
        lock: have the slots page-locked, so far as the system lets.
    """

    num_threads: int
    chunk_bytes: int = 4 << 20
    num_slots: int = 32
    direct: bool = False
    lock: bool = True

    @staticmethod
    def for_files(paths: Iterable[str | os.PathLike]) -> Options:
        """What suits these files, as they are now, on this machine."""
        try:
            sizes = {os.fspath(path): os.path.getsize(path) for path in paths}
            cached = sum(cached_fraction(path) * size for path, size in sizes.items())
        except OSError:  # whoever opens them says so
            return Options.for_memory()
        total = sum(sizes.values())
        if cached >= _COLD * total:
            return Options.for_memory()
        # Through the page cache, so that the next process finds the files there, if they fit.
        direct = total > free_memory() and all(map(_opens_directly, sizes))
        return Options(num_threads=32, num_slots=48, direct=direct)

    @staticmethod
    def for_memory() -> Options:
        """What suits what is in memory already."""
        num_threads = max(min(_num_cores() - 2, _MAX_THREADS), 1)
        if native() is None:  # Python's threads take longer between two chunks
            return Options(num_threads)
        return Options(num_threads, _CHUNK_BYTES, _NUM_SLOTS)


class Transfer:
    """Moves bytes to a device. A context manager; to be used in one thread.

    Whatever is moved arrives in the order in which it was sent, on a stream of its own, for use on the stream that was
    the current one when the context was entered.

        with Transfer(device, Options.for_files(paths)) as transfer:
            for span, memory in transfer.start(spans):
                w = memory.view(0, torch.bfloat16, (num_rows, num_cols))  # until the next span is asked for

    Args:
        device: where to: CUDA, or the CPU, for which this is no faster than reading.
        options: how.
        ring_bytes: of device memory where spans arrive; more where a span is larger than half of it.
    """

    def __init__(self, device: torch.device | str, options: Options, ring_bytes: int = RING_BYTES):
        self.device, self.options, self._ring_bytes = torch.device(device), options, ring_bytes
        self._files: dict[str, int] = {}
        self._engine = self._stream = self._counters = self._closing = None
        self._num_groups = 0
        # What the engine reads from and writes to, until it is done with that: however early whoever sent it lets go.
        self._arriving: list[list[Memory]] = []
        self._sent: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._started, self._seconds = 0.0, None
        self._consumer = None  # the stream that uses what has arrived

    def __enter__(self) -> Transfer:
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._consumer = torch.cuda.current_stream(self.device)
        o, self._started = self.options, time.perf_counter()
        engine = NativeEngine if native() is not None else PythonEngine
        with self._on_device():
            self._engine = engine(o.num_threads, o.chunk_bytes, o.num_slots, o.direct, o.lock, self._stream)
        return self

    def __exit__(self, *exception):
        self.wind_up()
        self._closing.join()
        self._closing = self._engine = None
        self._arriving, self._sent = [], {}
        for fd in self._files.values():
            os.close(fd)
        self._files = {}

    def wind_up(self):
        """Nothing more will be asked for: begin to give all memory back, beside what the caller does next."""
        if self._closing is None:
            self._seconds, self._counters = time.perf_counter() - self._started, self._engine.counters()
            self._closing = threading.Thread(target=self._engine.close)
            self._closing.start()

    def start(self, spans: Sequence[Span], ahead: int = 0) -> Iterator[tuple[Span, Memory]]:
        """Begin to move spans of files, before anything asks for them.

        Args:
            spans: in the order in which they will be used.
            ahead: bytes of the first of them that get memory of their own, so that they are moved however long it takes
                until they are asked for.

        Returns:
            An iterator of each span with its bytes on the device. What is enqueued before the next one is asked for may
            use them.

        Raises:
            CheckpointError: here or on the way: a file cannot be read, or ends too early.
        """
        sizes = [-(-s.num_bytes // _ALIGNMENT) * _ALIGNMENT for s in spans]
        own = []
        while len(own) < min(len(spans), MAX_GROUPS // 2) and (ahead := ahead - sizes[len(own)]) >= 0:
            own.append(Memory(self._allocate(sizes[len(own)])))
        sizes = sizes[len(own) :]
        ring_bytes = min(max(self._ring_bytes, 2 * max(sizes, default=0)), sum(sizes))
        ring = Memory(self._allocate(ring_bytes))
        self._follow()
        first, runs = self._num_groups, []
        places = [(memory.address, -1) for memory in own]
        for place, after in _places(sizes, ring_bytes):
            places.append((ring.address + place, first + len(own) + after if after >= 0 else -1))
        for group, (span, (to, after)) in enumerate(zip(spans, places, strict=True), first):
            fd = self._open(span.path)
            runs.append(Run(fd, span.offset, span.num_bytes, to, group, max(after, group - MAX_GROUPS)))
        self._num_groups += len(spans)
        memories = [ring, *reversed(own)]
        self._arriving.append(memories)
        self._engine.add(runs)
        return self._receive(spans, [to for to, _ in places], first, memories)

    def _receive(self, spans, places, first, memories):
        for group, (span, to) in enumerate(zip(spans, places, strict=True), first):
            try:
                self._engine.wait(group, self._consumer)
            except EngineError as error:
                at = spans[error.group - first] if error.group >= first else span
                where = f"{at.path}, bytes {at.offset} to {at.offset + at.num_bytes}" if error.group >= 0 else at.path
                raise CheckpointError(f"cannot read {where}: {error.what}") from error
            memory = memories.pop() if len(memories) > 1 else memories[0]
            memory.place = to - memory.address
            yield span, memory
            del memory
            self._engine.release(group, self._consumer)
        self._arriving.remove(memories)

    def fetch(self, span: Span, to: torch.Tensor) -> int:
        """Begin to move a span of a file to where it stays.

        Args:
            to: on the device, contiguous, of as many bytes.

        Returns:
            What to `wait` for.

        Raises:
            CheckpointError: the file cannot be opened.
        """
        self._follow()
        return self._send(self._open(span.path), span.offset, to, None)

    def send(self, to: torch.Tensor, source: torch.Tensor) -> int:
        """Begin to copy a tensor of the host.

        Args:
            to: on the device, contiguous. What is enqueued by now may use it before.
            source: on the CPU, contiguous, of as many bytes; must stay as it is until `wait`.

        Returns:
            What to `wait` for.
        """
        if not (to.is_contiguous() and source.is_contiguous() and to.nbytes == source.nbytes):
            raise ValueError("`to` and `source` must be contiguous and of the same number of bytes")
        self._follow()
        return self._send(HOST, source.data_ptr(), to, source)

    def wait(self, sent: int):
        """Wait until what was sent or fetched has been read; what is enqueued from now on finds it where it belongs.

        Raises:
            CheckpointError: it could not be read.
            LoadError: it could not be copied.
        """
        if sent < 0:
            return
        try:
            self._engine.wait(sent, self._consumer)
        except EngineError as error:
            kind = LoadError if error.group < 0 else CheckpointError
            raise kind(f"moving data to {self.device} failed: {error.what}") from error
        self._sent.pop(sent, None)

    @property
    def num_bytes(self) -> int:
        """Bytes that were read so far."""
        return self._done().bytes

    @property
    def seconds(self) -> float:
        """Seconds from entering to the end, or to now."""
        return self._seconds if self._seconds is not None else time.perf_counter() - self._started

    def __str__(self):
        """Which way was used, for a report."""
        o, done = self.options, self._done()
        how = "read directly" if o.direct else "read"
        text = f"{o.num_threads} {'' if native() is not None else 'Python '}threads {how} into {o.num_slots} slots of "
        text += size_text(o.chunk_bytes)
        if done.unpinned_slots:
            text += f", {done.unpinned_slots} of which are not page-locked"
        return text

    def _done(self):
        return self._counters if self._counters is not None else self._engine.counters()

    def _allocate(self, size):
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _send(self, fd, offset, to, source):
        group = self._num_groups
        if not to.nbytes:
            return -1
        self._sent[group] = to, source
        self._engine.add([Run(fd, offset, to.nbytes, to.data_ptr(), group, -1)])
        self._num_groups += 1
        return group

    def _follow(self):
        """Copies from now on come after what has been enqueued: their memory may be in use there."""
        if self._stream is not None:
            self._stream.wait_stream(self._consumer)

    def _open(self, path):
        fd = self._files.get(path)
        if fd is None:
            flags = os.O_RDONLY | (os.O_DIRECT if self.options.direct else 0)
            try:
                fd = self._files[path] = os.open(path, flags)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        return fd

    def _on_device(self):
        return torch.cuda.device(self.device if self._stream is not None else -1)


class Memory:
    """Device memory that holds a span.

    Args:
        memory: uint8, of one dimension.

    Attributes:
        address: of its first byte.
        place: of the span's first byte in it.
    """

    def __init__(self, memory: torch.Tensor):
        self._typed, self.address, self.place = {torch.uint8: memory}, memory.data_ptr(), 0

    def view(self, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """The bytes from `start` on as a contiguous tensor; `start` must be a multiple of its elements' size."""
        typed = self._typed.get(dtype)
        if typed is None:
            ring = self._typed[torch.uint8]
            typed = self._typed[dtype] = ring[: len(ring) // dtype.itemsize * dtype.itemsize].view(dtype)
        strides, stride = [], 1
        for size in reversed(shape):
            strides.append(stride)
            stride *= size
        return typed.as_strided(shape, strides[::-1], (self.place + start) // dtype.itemsize)


def _places(sizes, ring_bytes):
    """(place, after) for each span of that size: where in the ring it arrives, and the last earlier one that was there;
    -1 for none."""
    held, end = deque(), 0  # (place, end, number) of spans, oldest first; where the next one begins
    for i, size in enumerate(sizes):
        if end + size > ring_bytes:
            end = 0
        start, end = end, end + size
        after = max((number for a, b, number in held if a < end and start < b), default=-1)
        while held and held[0][2] <= after:
            held.popleft()
        held.append((start, end, i))
        yield start, after


def cached_fraction(path: str | os.PathLike) -> float:
    """How much of a file is in the page cache, 0 to 1, told from a few places; 1 where the system does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 1.0
    fd = os.open(path, os.O_RDONLY)
    try:
        size, byte, found = os.fstat(fd).st_size, bytearray(1), 0
        for i in range(_PROBES):
            try:
                found += os.preadv(fd, [byte], size * (2 * i + 1) // (2 * _PROBES), os.RWF_NOWAIT) >= 0
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL):
                    return 1.0
                raise
        return found / _PROBES
    finally:
        os.close(fd)


def free_memory() -> float:
    """Bytes of the host that the page cache may still take; infinite where the system does not say."""
    try:
        with open("/proc/meminfo") as info:
            return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def _opens_directly(path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):  # not every system, and not every file system, has it
        return False
    return True


def _num_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
