"""How rows are written down: a generator that yields a `Draft` for each variant."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..case import Load, LoaderCase, Weights


@dataclass(frozen=True)
class Row:
    """A name, what must hold, and the generator of its drafts."""

    name: str
    section: str
    must: str
    drafts: Callable[[str], Iterator[Draft]]


@dataclass
class Draft:
    """A variant of a row. `model` is shapes for `Weights`, or makes a module. `load` is one load, or several."""

    variant: str
    model: Mapping[str, tuple[int, ...]] | Callable[[], nn.Module] | None
    load: Load | Sequence[Load] = ()
    needs: set[str] = field(default_factory=set)
    run: Callable[[Any], None] | None = None


ROWS: dict[str, Row] = {}


def row(section: str, must: str):
    """Register a row; the function's name is the row's, and it is called with the scheme."""

    def register(drafts):
        name = drafts.__name__
        assert name not in ROWS, f"two rows are called {name}"
        ROWS[name] = Row(name, section, must, drafts)
        return drafts

    return register


def build(row: Row, scheme: str) -> list[LoaderCase]:
    """The cases of a row; their values come from the row's name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(row.name.encode()))
        return [_case(row, draft, scheme) for draft in row.drafts(scheme)]


def build_one(shapes: Mapping[str, tuple[int, ...]], load: Load | Sequence[Load], scheme: str) -> LoaderCase:
    """A case outside of the rows: what one rank of a case runs."""
    return _case(Row("", "", "", iter), Draft("", shapes, load), scheme)


def _case(row, draft, scheme):
    loads = (draft.load,) if isinstance(draft.load, Load) else tuple(draft.load)
    model = functools.partial(Weights, **draft.model) if isinstance(draft.model, Mapping) else draft.model
    needs = set(draft.needs)
    for load in loads:
        needs |= {"optional", "logical_shapes", "segments", "offload", "scale_group"} & load.facts.keys()
        needs |= {"partial"} if "scope" in load.facts else set()
        needs |= {"budget"} if "staging_budget" in load.facts else set()
        needs |= {"reload"} if load.mode != "first" else set()
        needs |= {"hooks"} if load.on_module or load.on_finish else set()
        needs |= {"staged_bytes"} if load.staged_bytes is not None else set()
    return LoaderCase(row.name, draft.variant, row.section, row.must, model, loads, scheme, frozenset(needs), draft.run)
