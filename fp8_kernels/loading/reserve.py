"""Memory for what a load will make, asked of the driver once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch

_ALIGNMENT = 512  # torch's allocator rounds up to
_SMALL_BYTES = 1 << 20  # it takes tensors up to this from elsewhere
_LEAST_BYTES = 64 << 20  # of which one allocation costs less than many


def reserve(device: torch.device, sizes: Iterable[int]):
    """Have torch's allocator hold memory for tensors of these sizes, in one piece that it cuts when they are made.

    Each would else ask the driver, which takes about as long as to fill it. Where there is no such piece, nothing
    happens.

    Args:
        device: any; only CUDA's memory is held.
        sizes: bytes of each.
    """
    if device.type != "cuda":
        return
    total = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes if size > _SMALL_BYTES)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if total >= _LEAST_BYTES and total > unused:
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(total, dtype=torch.uint8, device=device)
