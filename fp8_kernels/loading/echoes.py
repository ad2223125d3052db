"""Copies of weights that were read before they had arrived.

`model.to(...)`, or `p.data = p.data.clone()`, reads a weight and puts the copy in its place. Of what had not arrived,
the copy brings nothing: counted as a write, it would hide a shard that never comes.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .staging import Tracked

COPYING = {"clone", "_to_copy"}  # ops whose result is a copy of their first argument
_LEAST = 64  # copies, before those that are gone are looked for


class Echoes:
    """Knows such copies by their storage, as long as they live."""

    def __init__(self):
        self._known: dict[int, tuple[StorageWeakRef, Tracked]] = {}
        self._sweep_at = _LEAST  # so many; twice what is left then, so that each copy is looked at a few times only

    def __bool__(self):
        return bool(self._known)

    def add(self, copy: torch.Tensor, tracked: Tracked):
        """`copy` holds what could be read of `tracked`."""
        storage = copy.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage), tracked
        if len(self._known) >= self._sweep_at:
            self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
            self._sweep_at = max(_LEAST, 2 * len(self._known))

    def of(self, t: torch.Tensor) -> Tracked | None:
        """What it is a copy of."""
        if t.layout is not torch.strided:
            return None
        reference, tracked = self._known.get(t.untyped_storage()._cdata, (None, None))
        return tracked if reference is not None and not reference.expired() else None

    def in_place(self, t: torch.Tensor) -> Tracked | None:
        """The weight that it is a copy of, if the model now holds the copy."""
        tracked = self.of(t)
        if tracked is not None:
            for place in tracked.places:
                held = place.registry.get(place.leaf)
                if held is not None and held.untyped_storage()._cdata == t.untyped_storage()._cdata:
                    return tracked
        return None
