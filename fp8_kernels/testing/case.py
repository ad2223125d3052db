"""What a case of the conformance kit is: a model, what an engine does to it, and what must be there afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .session import Session

SECTIONS = {
    "A": "Finished too early",
    "B": "Finished too late, or never",
    "C": "Complete, but wrong",
    "D": "Memory bound broken",
    "E": "Threads, ranks, streams",
    "F": "Reload",
    "G": "Formats",
}
# What a loader may have or lack beyond loading once, in one thread, on one device.
NEEDS = {
    "progress": "the adapter appends to `session.finished` the name of each module whose tensors are final",
    "staged_bytes": "the adapter knows the most high-precision bytes that the load held at a time",
    "logical_shapes": "the loader can be told that a weight is padded",
    "segments": "a fused weight can have a scale for each of its parts",
    "optional": "the loader can be told what a checkpoint may lack",
    "reads_back": "the loader can be told that a weight is read after others were written",
    "budget": "the loader can be told how many bytes of high precision it may hold",
    "threads": "threads other than the one that entered load too: `Adapter.worker`",
    "reload": "a loaded model takes new weights: `Load.mode`",
    "partial": "a reload may bring some weights only; `scope` in the facts names them",
    "scope": "a reload that was told what will arrive refuses the rest",
    "hooks": "the loader calls an engine's own processing: `Load.on_module` and `Load.on_finish`",
    "ranks": "several processes of torch.distributed load together",
    "scale_group": "scales can be those of the unsharded weight",
    "dummy": "the loader can fill a model without a checkpoint: `Adapter.fill_dummy`",
    "checkpoint": "the loader reads checkpoint folders: `Adapter.load_checkpoint`",
    "fp8_source": "the loader takes FP8 data with its scale",
    "poison": "a streaming reload that broke off is known for it: `Adapter.half_loaded`",
    "offload": "a weight's result can be placed on the CPU",
    "cuda": "the load is on a CUDA device",
}


@dataclass(frozen=True)
class Write:
    """One call of an engine's weight loader: `how(parameter, source)`.

    Attributes:
        name: of the parameter, as the model had it when the load began.
        source: what the loader is given; a callable makes it when its turn comes, and nobody else holds it.
        how: what the loader does, mostly to `parameter.data`. By default `parameter.data.copy_(source)`.
    """

    name: str
    source: Any
    how: Callable[[torch.Tensor, Any], Any] = lambda p, source: p.data.copy_(source)

    def __call__(self, session: Session):
        session.write(self.name, self.source, self.how)


@dataclass(frozen=True)
class Do:
    """Anything else that happens while weights load: the engine acts, or the kit looks."""

    what: str
    run: Callable[[Session], Any]

    def __call__(self, session: Session):
        self.run(session)


@dataclass(frozen=True)
class Refused:
    """The load must end in an error.

    Attributes:
        kind: a key of `Adapter.errors`: "incomplete", "conflict", "non_finite", "load" (another refusal) or "any" (also
            by torch); or the class of an error that the engine itself raises and that must come through.
        names: what the message has to name.
        restored: the model must be as it was before, tensor for tensor; for adapters that say so in `restores` this
            is looked at after every refusal.
    """

    kind: str | type[BaseException]
    names: tuple[str, ...] = ()
    restored: bool = False


@dataclass(frozen=True)
class Load:
    """One load, from entering the loader's context to leaving it.

    Attributes:
        steps: what happens inside, in order.
        holds: parameter -> high-precision values whose codes and scales it must hold afterwards, to the bit.
        passes: tensor -> what it must hold afterwards, as it is.
        refused: the load must fail like this instead.
        check: called with the session afterwards, also after an expected refusal; raises AssertionError.
        on_module: the engine's own processing of a module with FP8 weights, when all its tensors are final: called with
            the session and the module, in a layout that nothing has changed yet.
        on_finish: likewise of the model, when every module is.
        facts: what the engine has to tell its loader about this model or checkpoint. Keys: `ignore`, `optional`
            (patterns), `logical_shapes` (pattern -> shape), `segments` (pattern -> rows of each part), `staging_budget`
            (bytes), `reads_back` (parameters that the loader reads after it wrote something else), `scope` (patterns),
            `offload` (patterns), `scale_group` (patterns of weights whose scales span all ranks of torch.distributed).
        mode: "first", or over a loaded model "transactional" (a failure leaves the old weights) or "streaming".
        retained_bytes: at most so many bytes of sources may be alive after any call of a loader.
        staged_bytes: at most so many high-precision bytes may have been held at a time.
        excess_bytes: at most so many bytes may have been allocated on the device beyond what stays.
        reserved_bytes: likewise, of what the CUDA allocator held.
    """

    steps: Sequence[Write | Do]
    holds: Mapping[str, torch.Tensor] = field(default_factory=dict)
    passes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    refused: Refused | None = None
    check: Callable[[Session], None] | None = None
    on_module: Callable[[Session, nn.Module], None] | None = None
    on_finish: Callable[[Session, nn.Module], None] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "first"
    retained_bytes: int | None = None
    staged_bytes: int | None = None
    excess_bytes: int | None = None
    reserved_bytes: int | None = None


@dataclass(frozen=True)
class LoaderCase:
    """One thing that loaders do, and what must come of it.

    Attributes:
        row: the name of what goes wrong; several cases, each a variant, may show the same.
        section: a key of `SECTIONS`.
        must: what must hold, in words.
        make_model: gives an ordinary module; what becomes FP8 is on meta.
        loads: one after the other, of the same model.
        scheme: what one scale covers.
        needs: keys of `NEEDS`; an adapter that lacks one does not offer the case, which is not a pass.
        run: for cases that are no loads of one model in one process: called with the adapter instead.
    """

    row: str
    variant: str
    section: str
    must: str
    make_model: Callable[[], nn.Module] | None
    loads: tuple[Load, ...]
    scheme: str
    needs: frozenset[str]
    run: Callable[[Any], None] | None = None

    @property
    def name(self) -> str:
        return f"{self.row}-{self.variant}" if self.variant else self.row

    def __str__(self):
        return self.name


class Weights(nn.Module):
    """Tensors by name: `fc=(N, K)` becomes the module `fc` with a `weight` of that shape."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, device: str = "meta", **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            child = nn.Module()
            child.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            self.add_module(name, child)


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random weights, rows of very different size, so that every scheme's scales differ."""
    return (torch.randn(shape) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
