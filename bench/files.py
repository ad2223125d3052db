"""Files and memory of the host: page cache, plain reads, what a process holds."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SPAN_BYTES = 16 << 20


def weight_files(folder: Path) -> list[Path]:
    """A checkpoint's weights, in order."""
    return sorted(folder.glob("*.safetensors"))


def make_durable(files: list[Path]):
    """Only pages that are on the disk can leave the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def drop_from_page_cache(files: list[Path]) -> int:
    """Make files cold; returns by how many bytes the page cache shrank."""
    before = meminfo()["Cached"]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return before - meminfo()["Cached"]


def read_all(files: list[Path], threads: int) -> float:
    """Seconds of plain parallel reads of everything, in spans of 16 MiB into a buffer a thread."""
    local, spans = threading.local(), []
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    for file, descriptor in zip(files, descriptors, strict=True):
        spans += [(descriptor, at) for at in range(0, file.stat().st_size, SPAN_BYTES)]

    def read(span):
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(SPAN_BYTES)
        os.preadv(span[0], [local.buffer], span[1])

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(read, [spans[0]] * threads))  # buffers are touched
        began = time.perf_counter()
        list(executor.map(read, spans))
        seconds = time.perf_counter() - began
    for descriptor in descriptors:
        os.close(descriptor)
    return seconds


def meminfo() -> dict[str, int]:
    """Bytes, by the names of /proc/meminfo."""
    return _table("/proc/meminfo")


def _table(path):
    pairs = (line.split(":") for line in Path(path).read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, value in pairs if value.strip().endswith("kB")}


class HostMemory:
    """The most that a load takes of the host beside the page cache, while this is open.

    Attributes:
        process: bytes of the process that no file backs, above what it had before.
        machine: bytes by which the machine's available memory shrank: also what a driver pins, which no process owns.
    """

    def __init__(self, every: float = 0.01):
        self._every, self._stop = every, threading.Event()
        self.process = self.machine = 0

    def __enter__(self):
        self._before = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self):
        while not self._stop.wait(self._every):
            self._look()

    def _look(self):
        process, available = self._now()
        self.process = max(self.process, process - self._before[0])
        self.machine = max(self.machine, self._before[1] - available)

    def _now(self):
        return _table("/proc/self/status")["RssAnon"], meminfo()["MemAvailable"]
