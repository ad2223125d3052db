"""A progress line by bytes, on a terminal and nowhere else."""

from __future__ import annotations

import sys
import time

CLEAR_LINE = "\r\x1b[K"


class ByteProgress:
    """Called with `(done, total, what)`, rewrites one line of stderr at most ten times a second.

    Writes nothing where stderr is not a terminal, so that logs hold results and not progress.
    """

    def __init__(self, label: str, stream=None):
        self.label = label
        self.stream = stream or sys.stderr
        self.visible = self.stream.isatty()
        self._shown_at = 0.0
        self._started_at = time.monotonic()

    def __call__(self, done: int, total: int, what: str = ""):
        now = time.monotonic()
        if not self.visible or (now - self._shown_at < 0.1 and done < total):
            return
        self._shown_at = now
        rate = done / max(now - self._started_at, 1e-9) / 1e9
        size = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
        line = f"{self.label} {done / max(total, 1):4.0%}  {size}  {rate:.2f} GB/s  {what}"
        self.stream.write(CLEAR_LINE + line[:110])
        if done >= total:
            self.stream.write(CLEAR_LINE)
        self.stream.flush()
