"""How the bytes of what arrives come to where they wait: the one place that copies a shard."""

from __future__ import annotations

import torch


class Sources:
    """Copies as torch does. What brings bytes from the host in a better way has the same two methods."""

    def bring(self, destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False):
        """`destination.copy_(source)`, in the order of the current stream.

        Memory of the host may be written again as soon as this returns, unless the engine has asked not to wait, and
        then as after its own copy: when the stream has come past. Memory of a device may in the order of the stream.

        Args:
            destination: real, on the load's device or (what is offloaded) the host; any strides.
            source: real, any device, dtype and strides, of a shape that expands to the destination's.
            non_blocking: of `copy_`.
        """
        destination.copy_(source, non_blocking)

    def summary(self) -> tuple[str, int, float] | None:
        """For the report: what was used beside torch, bytes that it brought, seconds since it was needed first."""
        return None

    def close(self):
        """The load has ended: let go of all memory. May be called again."""
