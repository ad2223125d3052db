"""One load of a case, as it runs: what the engine holds, and what was seen."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import torch

from .bits import bits

if TYPE_CHECKING:
    from .case import Load, LoaderCase
    from .runner import Adapter


class Session:
    """Passed to the adapter, to every step and to `Load.check`.

    Attributes:
        adapter, case, load, model: what is run.
        params: the engine's own `dict(model.named_parameters())` from before the load.
        handle: what the adapter's context gave (a loader object, say).
        finished: names of modules whose tensors are final, in that order; filled by the adapter.
        notes: for the steps of a case, to remember things until a later step or the check.
    """

    def __init__(self, adapter: Adapter, case: LoaderCase, load: Load, model: torch.nn.Module):
        self.adapter, self.case, self.load, self.model = adapter, case, load, model
        self.params = dict(model.named_parameters())
        self.handle: Any = None
        self.finished: list[str] = []
        self.notes: dict[str, Any] = {}
        self.peak_retained = 0
        self._sources: dict[int, weakref.ref] = {}

    def write(self, name: str, source: Any, how: Callable):
        """One call of an engine's loader, through the adapter."""
        source = self.given(source)
        self.adapter.write(self, name, source, how)
        del source
        self.peak_retained = max(self.peak_retained, self.retained_bytes())

    def given(self, source: Any) -> Any:
        """The source itself; one that a callable makes lies in memory whose end is noticed."""
        if not callable(source):
            return source
        made = source()
        # A tensor over an array keeps the array alive, also through views and aliases of its storage.
        memory = numpy.empty(made.nbytes, dtype=numpy.uint8)
        self._sources[id(memory)] = weakref.ref(memory)
        watched = torch.from_numpy(memory).view(made.dtype).view(made.shape)
        return watched.copy_(made)

    def retained_bytes(self) -> int:
        """Bytes of sources that something still refers to."""
        if any(ref() is not None for ref in self._sources.values()):
            gc.collect()
        alive = {key: ref for key, ref in self._sources.items() if ref() is not None}
        self._sources = alive
        return sum(memory.nbytes for ref in alive.values() if (memory := ref()) is not None)

    def in_thread(self, steps):
        """Run steps in another thread of the engine, to the end; raises what they raise."""
        self.in_threads([steps])

    def in_threads(self, parts):
        """Run several lists of steps, each in a thread of its own, at the same time."""
        errors: list[BaseException] = []

        def run(steps):
            try:
                with self.adapter.worker(self):
                    for step in steps:
                        step(self)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(steps,)) for steps in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def fingerprint(model: torch.nn.Module, with_values: bool) -> list[tuple]:
    """Everything about a model's tensors that a failed load must leave as it was.

    Args:
        with_values: also what parameters hold. A first load writes real ones in place and may leave them written;
            what buffers hold always counts.
    """
    found = []
    for kind, tensors in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, t in tensors(remove_duplicate=False):
            what = [name, id(t), type(t), t.device, t.dtype, tuple(t.shape), t.stride(), t.requires_grad]
            if not t.is_meta:
                what.append(t.data_ptr())
                if with_values or kind == "buffer":
                    what.append(bits(t.detach()).cpu().flatten().tolist())
            found.append(tuple(what))
    return found
