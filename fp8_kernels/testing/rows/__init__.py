"""The rows of the conformance kit, a section or a part of one a file; importing them registers them."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import SECTIONS, LoaderCase
from . import concurrent, formats, memory, reload, too_early, too_late, unseen, wrong  # noqa: F401
from .registry import ROWS, build


def loader_cases(scheme: str = "per_channel", rows: tuple[str, ...] | None = None) -> Iterator[LoaderCase]:
    """Every case of the kit, or of the named rows; made anew, with the same values, in every call.

    Args:
        scheme: what one scale covers, in every case where it matters.
        rows: by default all, section by section.

    Raises:
        KeyError: no row has that name.
    """
    names = sorted(ROWS, key=lambda name: list(SECTIONS).index(ROWS[name].section)) if rows is None else rows
    for name in names:
        yield from build(ROWS[name], scheme)
