"""Writing on a thread of its own, while what comes next is read and quantized."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .safetensors_file import SafetensorsWriter

MAX_PENDING = 4  # tasks that wait, whatever they hold
MAX_BYTES = 128 << 20


class Output:
    """Runs tasks one after the other, in the order in which they come. A context manager.

    What a task raises is raised by the next call here, or at the end; none runs after it. Leaving by an exception drops
    what has not begun.

    Args:
        at_once: each task runs when it is put, on the caller's thread: nothing waits, and takes memory.

    Attributes:
        seconds: that tasks took.
    """

    def __init__(self, at_once: bool = False):
        self._at_once, self.seconds = at_once, 0.0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fp8-output")
        self._pending: deque[tuple[Future, int, Callable | None]] = deque()
        self._failed = False

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind, error, traceback):
        try:
            while kind is None and self._pending:
                self._settle()
        finally:
            self._executor.shutdown(cancel_futures=True)
            self._pending.clear()

    def put(self, task: Callable[[], None], num_bytes: int = 0, done: Callable[[], None] | None = None):
        """Have a task run; waits until no more than `MAX_PENDING` tasks, and one or `MAX_BYTES` of them, are left.

        Args:
            num_bytes: that it holds until it has run.
            done: called here, or by a later call, when it has.
        """
        if self._at_once:
            self._run(task)
            if done is not None:
                done()
            return
        self._pending.append((self._executor.submit(self._run, task), num_bytes, done))
        while self._pending and (self._pending[0][0].done() or self._is_too_much()):
            self._settle()

    def _is_too_much(self):
        count = len(self._pending)
        return count > MAX_PENDING or (count > 1 and sum(held for _, held, _ in self._pending) > MAX_BYTES)

    def _run(self, task):
        if self._failed:
            return
        started = time.perf_counter()
        try:
            task()
        except BaseException:
            self._failed = True
            raise
        finally:
            self.seconds += time.perf_counter() - started

    def _settle(self):
        """Wait for the oldest task."""
        future, _, done = self._pending.popleft()
        future.result()
        if done is not None:
            done()


class FileOutput:
    """One safetensors file, written by tasks of an `Output`. A context manager: leaving it by an exception removes it.

    Args:
        writer: of the file.
        output: whose tasks write.
    """

    def __init__(self, writer: SafetensorsWriter, output: Output):
        self._writer, self._output = writer, output

    def __enter__(self) -> FileOutput:
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            self._output.__exit__(kind, error, traceback)  # no task may write any more
            self._writer.abort()
        else:
            self._output.put(self._writer.close)

    def write(self, values: Callable[[], dict], num_bytes: int, done: Callable[[], None] | None = None):
        """Write tensors to their places.

        Args:
            values: called on the output's thread; returns the tensors by name.
            num_bytes, done: see `Output.put`.
        """

        def task():
            for name, tensor in values().items():
                self._writer.write(name, tensor)

        self._output.put(task, num_bytes, done)
