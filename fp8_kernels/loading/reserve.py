"""Memory for what a load will make, asked of the driver once."""

from __future__ import annotations

import torch

SMALL_BYTES = 1 << 20  # of a tensor that torch makes in other memory than larger ones
_LEAST_BYTES = 64 << 20  # of which one allocation costs less than many
# With larger tensors, what lies in the piece for a while may leave no room for one that was counted: it would be held,
# and that tensor asked for beside it.
LARGEST_BYTES = 384 << 20


def reserve(device: torch.device, num_bytes: int, largest: int, slack: int) -> bool:
    """Have torch's allocator hold memory for many tensors in one piece, which it cuts when they are made.

    Each would else ask the driver. Where there is no such piece, or it could be held in vain, nothing happens.

    Args:
        device: any; only CUDA's memory is held.
        num_bytes: of all of them.
        largest: bytes of the largest.
        slack: bytes beside them, for what else is made meanwhile.

    Returns:
        Whether the allocator has as much.
    """
    if device.type != "cuda" or num_bytes < _LEAST_BYTES or largest > LARGEST_BYTES:
        return False
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if num_bytes > unused:
        try:
            torch.empty(num_bytes + slack, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return False
    return True
