"""Running the cases of the conformance kit against a loader."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ops import quantize
from .bits import assert_same_bits
from .case import SECTIONS, Load, LoaderCase, Refused
from .memory import Excess
from .rows import loader_cases
from .session import Session, fingerprint


class NotOffered(Exception):
    """Raised by an adapter for what its loader does not do at all: neither a pass nor a failure."""


class Adapter:
    """Between the kit and a loader. `enter` is all that most need to write; the rest has a meaning to begin with.

    Attributes:
        name: heads its column of the table.
        offers: keys of `fp8_kernels.testing.case.NEEDS` that the loader can do.
        restores: a refused load leaves every tensor of the model as it was; then looked at after each.
        errors: kind of `Refused` -> the class of error that the loader raises for it; any exception if absent.
        device: where results are expected.
    """

    name = "loader"
    offers: frozenset[str] = frozenset()
    restores = False
    errors: Mapping[str, type[BaseException]] = {}
    device = torch.device("cpu")

    def enter(self, session: Session) -> contextlib.AbstractContextManager:
        """The context in which an engine's loaders run; leaving it completes the load. `session.model` is the model,
        `session.case.scheme` the scheme, `session.load.facts` what the loader has to be told."""
        raise NotImplementedError

    def result(self, model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales that the parameter holds: it, and `<name>_scale` beside it."""
        return model.get_parameter(name), model.get_parameter(f"{name}_scale")

    def expected(self, w: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales that these weights have to become; another numeric definition goes here."""
        return quantize(w, scheme)

    def write(self, session: Session, name: str, source: Any, how: Callable):
        """One call of an engine's loader."""
        how(session.params[name], source)

    def worker(self, session: Session) -> contextlib.AbstractContextManager:
        """The context for a further thread that loads."""
        raise NotOffered("threads")

    def staged_bytes(self, session: Session) -> int:
        """The most bytes of high precision that the load, which is over, held at a time."""
        raise NotOffered("staged_bytes")

    def half_loaded(self, model: nn.Module) -> list[str]:
        """The weights that a streaming reload left with new values beside old ones, as far as the loader knows."""
        raise NotOffered("poison")

    def fill_dummy(self, session: Session):
        """Fill the model with generated weights."""
        raise NotOffered("dummy")

    def load_checkpoint(self, model: nn.Module, folder: Path, scheme: str):
        """Load a checkpoint folder into the model."""
        raise NotOffered("checkpoint")


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        status: "pass", "fail" or "not offered".
        detail: why, unless it passed.
    """

    case: LoaderCase
    status: str
    detail: str = ""


def run_case(adapter: Adapter, case: LoaderCase):
    """Run one case.

    Raises:
        AssertionError: what had to hold does not.
        NotOffered: the loader does not do that at all.
        Exception: whatever the loader raised where it had to work.
    """
    missing = sorted(case.needs - frozenset(adapter.offers))
    if missing:
        raise NotOffered(", ".join(missing))
    if case.run is not None:
        case.run(adapter)
        return
    model = case.make_model()
    for load in case.loads:
        _run_load(adapter, Session(adapter, case, load, model))


def run_cases(adapter: Adapter, cases: Iterable[LoaderCase] | None = None) -> list[Outcome]:
    """Run cases, by default every one under `per_channel`; a failure is an outcome here and no exception."""
    outcomes = []
    for case in loader_cases() if cases is None else cases:
        try:
            run_case(adapter, case)
        except NotOffered as reason:
            outcomes.append(Outcome(case, "not offered", f"needs {reason}"))
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            prefix = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            outcomes.append(Outcome(case, "fail", prefix + text))
        else:
            outcomes.append(Outcome(case, "pass"))
    return outcomes


def as_table(results: Mapping[str, Iterable[Outcome]]) -> str:
    """Markdown: a row of the kit in each line, the loaders side by side. A row passes if all its variants do.

    Args:
        results: the loader's name -> its outcomes.
    """
    rows: dict[str, LoaderCase] = {}
    cells: dict[tuple[str, str], list[Outcome]] = {}
    for name, outcomes in results.items():
        for outcome in outcomes:
            rows.setdefault(outcome.case.row, outcome.case)
            cells.setdefault((outcome.case.row, name), []).append(outcome)
    lines, section = [], None
    for row, case in rows.items():
        if case.section != section:
            section = case.section
            lines += ["", f"**{section}. {SECTIONS[section]}**", ""]
            lines += [f"| case | must | {' | '.join(results)} |", "|---|---|" + "---|" * len(results)]
        found = " | ".join(_cell(cells.get((row, name), [])) for name in results)
        lines.append(f"| {row} | {case.must} | {found} |")
    return "\n".join(lines[1:])


def _cell(outcomes):
    failed = [outcome for outcome in outcomes if outcome.status == "fail"]
    passed = [outcome for outcome in outcomes if outcome.status == "pass"]
    if failed:
        return f"fail ({len(failed)} of {len(failed) + len(passed)})" if passed else "fail"
    if passed:
        return "pass" if len(passed) == len(outcomes) else f"pass ({len(passed)} of {len(outcomes)} offered)"
    return "not offered" if outcomes else "not run"


def _run_load(adapter, session):
    load, case = session.load, session.case
    refused = load.refused
    with_values = load.mode != "first"
    look = refused is not None and load.mode != "streaming" and (adapter.restores or refused.restored)
    before = fingerprint(session.model, with_values) if look else None
    measure = load.excess_bytes is not None or load.reserved_bytes is not None
    excess = Excess(adapter.device, session.model) if measure else contextlib.nullcontext()
    try:
        with excess, adapter.enter(session) as session.handle:
            for step in load.steps:
                step(session)
    except NotOffered:
        raise
    except BaseException as error:
        if refused is None or not _is_refusal(adapter, refused, error):
            raise
        unnamed = [name for name in refused.names if name not in str(error)]
        assert not unnamed, f"the error does not name {', '.join(unnamed)}: {error}"
        after = fingerprint(session.model, with_values) if look else None
        assert before == after, "the refused load has changed the model"
    else:
        assert refused is None, f"it was loaded without an error, instead of being refused ({refused.kind})"
        _check_result(adapter, case, load, session)
        if measure:
            _check_excess(load, excess)
    if load.check is not None:
        load.check(session)


def _is_refusal(adapter, refused: Refused, error):
    kind = refused.kind
    if isinstance(kind, type):
        return isinstance(error, kind)
    return isinstance(error, adapter.errors.get(kind, Exception)) and not isinstance(error, AssertionError)


def _check_result(adapter, case, load: Load, session):
    for name, w in load.holds.items():
        q, scale = adapter.result(session.model, name)
        wanted, wanted_scale = adapter.expected(w, case.scheme)
        assert_same_bits(q.detach().cpu(), wanted.cpu(), name)
        assert_same_bits(scale.detach().cpu().reshape(wanted_scale.shape), wanted_scale.cpu(), f"{name}_scale")
    for name, w in load.passes.items():
        owner, _, leaf = name.rpartition(".")
        t = getattr(session.model.get_submodule(owner), leaf)
        assert not t.is_meta, f"{name} was left on the meta device"
        assert_same_bits(t.detach().cpu(), w.cpu(), name)
    if load.retained_bytes is not None:
        seen = session.peak_retained
        assert seen <= load.retained_bytes, (
            f"{seen} bytes of sources were kept after a loader had returned, at most {load.retained_bytes} may be"
        )
    if load.staged_bytes is not None:
        seen = adapter.staged_bytes(session)
        assert seen <= load.staged_bytes, (
            f"{seen} bytes of high precision were held, at most {load.staged_bytes} may be"
        )


def _check_excess(load, excess):
    for what, seen, limit in (
        ("allocated", excess.allocated, load.excess_bytes),
        ("reserved", excess.reserved, load.reserved_bytes),
    ):
        assert limit is None or seen is None or seen <= limit, (
            f"{seen} bytes were {what} beyond what stays, at most {limit} may be"
        )
