"""Small weights that are complete and wait to be quantized together: a launch takes longer than one of them."""

from __future__ import annotations

import torch

from ..ops import quantize_many_into
from .arena import Staging

SMALL_BYTES = 256 << 10  # of a weight up to which it may wait: larger ones take as long to arrive as a launch
WAITING_BYTES, MAX_WAITING = 3 << 20, 48  # of all that wait; as many as one launch takes


class Launches:
    """Quantizes them.

    Args:
        staging: which their buffers are given back to.

    Attributes:
        num_bytes: of those that wait.
    """

    def __init__(self, staging: Staging):
        self._staging, self._room = staging, min(WAITING_BYTES, staging.budget // 16)
        self._scheme, self._dtype = None, None
        self._values: list[torch.Tensor] = []
        self._codes: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []
        self.num_bytes = 0

    def add(self, values: torch.Tensor, scheme, q: torch.Tensor, scale: torch.Tensor) -> bool:
        """Let a weight wait, and its buffer with it. Returns False, and has done nothing, where it should not.

        Args:
            values: `[1, N, K]`, in a buffer of its own.
            scheme: of no segments.
            q, scale: to write into.
        """
        num_bytes = values.nbytes
        if num_bytes > SMALL_BYTES or q.device != values.device:
            return False
        if self._values:
            other = scheme is not self._scheme or q.dtype is not self._dtype
            if other or len(self._values) == MAX_WAITING or self.num_bytes + num_bytes > self._room:
                self.launch()
        if num_bytes > self._room:
            return False
        self._scheme, self._dtype = scheme, q.dtype
        self._values.append(values)
        self._codes.append(q)
        self._scales.append(scale)
        self.num_bytes += num_bytes
        return True

    def launch(self):
        """Quantize all that wait."""
        values = self._values
        if not values:
            return
        codes, scales = self._codes, self._scales
        self._values, self._codes, self._scales, self.num_bytes = [], [], [], 0
        try:
            with self._staging.on_device():
                quantize_many_into(values, self._scheme, codes, scales)
        finally:
            for buffer in values:
                self._staging.release(buffer)
