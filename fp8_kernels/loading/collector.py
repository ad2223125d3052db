"""Python's cyclic garbage collector, while a load makes thousands of objects that stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from .install import uninterrupted


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No collection inside: a model of 30,000 weights makes a million objects at once, none of them garbage, and the
    collections that this sets off go over all of the process each time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            uninterrupted(gc.enable)
