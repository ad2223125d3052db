"""Loading new weights into a model that is FP8 already: same tensor objects, same memory, same addresses.

While weights arrive, each FP8 parameter looks as it did before its first load: on meta, in the checkpoint's layout
and precision, with the attributes that loaders look for. What the first load has to tell about that is kept on the
module, so it survives an engine that puts other parameter objects, of other layouts, in their places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import PoisonedModelError, UnmatchedPatternError
from ..ops import FP8_DTYPES
from .install import Snapshot, exchange, view_of
from .origin import RECORD, UNCHANGED, Origin, inferred, like, live
from .plan import Entry, Plan, listed, make_plan
from .poison import cure, half_loaded, mark
from .rules import matches
from .staging import Tracked

MODES = ("transactional", "streaming")


@dataclass(eq=False)
class _Weight:
    """One FP8 weight in the scope of a reload: `codes` and `scale` are its live memory in the checkpoint's layout,
    or None where the engine has made another layout of it."""

    places: list[tuple[torch.nn.Module, str]]
    names: list[str]
    origin: Origin
    codes: torch.Tensor | None
    scale: torch.Tensor | None
    dtype: torch.dtype = torch.float8_e4m3fn


class Reload:
    """One reload.

    Args:
        model: holds FP8 parameters with `<leaf>_scale` beside them.
        mode: "transactional" or "streaming".
        scope: patterns of what is loaded; None for everything.
        optional: patterns of what may stay away, and then keeps its values.
        has_hooks: the caller will lay the results out anew (`on_module`, `on_finish`).
        stream: as for `make_plan`.

    Raises:
        ValueError: there is nothing to reload, or a layout that only a hook can make.
        UnmatchedPatternError: a pattern of `scope` matches nothing.
        PoisonedModelError: an earlier reload broke off, and this one does not cover what it left.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mode: str,
        scope: tuple[str, ...] | None,
        optional: tuple[str, ...],
        has_hooks: bool,
        stream: bool | Mapping[str, bool] = True,
    ):
        if mode not in MODES:
            raise ValueError(f"`reload` must be one of {MODES}, got {mode!r}")
        self.model, self.mode = model, mode
        self._scope = scope
        self._optional, self._has_hooks, self._stream = optional, has_hooks, stream
        self._made_by_hooks: set[tuple[int, str]] = set()
        self._weights = self._find()
        self._by_place = {(id(module), leaf): w for w in self._weights.values() for module, leaf in w.places}
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.frozen: list[tuple[str, torch.Tensor]] = []  # what must not be written meanwhile

    @property
    def device(self) -> torch.device:
        """Where the model's FP8 weights are, unless offloaded."""
        tensors = (t for _, t in self._fp8_memory())
        devices = dict.fromkeys(t.device for t in tensors)
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    def present(self) -> Plan:
        """Make the FP8 weights in scope look as before their first load; returns the plan of what has to arrive."""
        self.frozen = [(name, t.detach()) for name, t in self._fp8_memory()]
        for weight in self._in_scope():
            meta = torch.empty(weight.origin.shape, dtype=weight.origin.dtype, device="meta")
            instead: dict[int, torch.nn.Parameter] = {}
            for module, leaf in weight.places:
                held = module._parameters.get(leaf)
                if not hasattr(held, UNCHANGED):  # the engine's own object: it lacks what loaders look for
                    held = instead.setdefault(id(held), like(weight.origin, meta))
                    module._parameters[leaf] = held
                exchange(held, meta)
                module._parameters.pop(f"{leaf}_scale", None)
        plan = make_plan(self.model, optional=self._optional, stream=self._stream)
        entries = [e for e in map(self._own_entry, plan.entries) if e is not None]
        inside = [e for e in entries if self._covers(e.names)]
        self.frozen += [(e.name, t) for e in entries if e not in inside for t in e.tensors]
        plan = Plan(tuple(inside), plan.rebuild)
        self._check_poison(plan)
        return plan

    def stage(self, plan: Plan):
        """Put copies in the place of what passes through, so that the model's own stay what they are."""
        if self.mode != "transactional":
            return
        copies: dict[int, torch.Tensor] = {}
        for t in [t for entry in plan.passed_through for t in entry.tensors]:
            key = t.untyped_storage()._cdata
            if key not in copies:
                live = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
                copies[key] = live.clone()
                self._copies.append((live, copies[key]))
            exchange(t, view_of(copies[key].untyped_storage(), t), t.requires_grad)

    def prepare(self, tracked: Tracked):
        """Let a streamed weight be quantized into its live memory."""
        weight = self._weight_of(tracked.entry)
        if weight is not None and weight.codes is not None:
            tracked.device = weight.codes.device
        if self.mode == "streaming" and weight is not None and weight.codes is not None and weight.scale is not None:
            tracked.q, tracked.scale = weight.codes, weight.scale

    def commit(self, snapshot: Snapshot, tracked_tensors: Iterable[Tracked]):
        """The new values into the live memory, all or none of them."""
        results = []
        for tracked in tracked_tensors:
            weight = self._weight_of(tracked.entry)
            if weight is not None and weight.codes is not None:
                results += [(weight.codes, tracked.q), (weight.scale, tracked.scale)]
        snapshot.commit(self._copies, results)
        for module in self.model.modules():
            cure(module)

    def poison(self, names_by_module: dict[torch.nn.Module, list[str]]):
        """Mark modules whose live tensors hold new values beside old ones."""
        if self.mode == "streaming":
            for module, names in names_by_module.items():
                mark(module, names)

    # What there is.

    def _find(self):
        """Every FP8 weight of the model, by the memory that holds it."""
        weights: dict[tuple, _Weight] = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            record = vars(module).get(RECORD)
            if record is None:
                record = inferred(module)
            else:
                held = {*module._parameters, *module._buffers} - module._non_persistent_buffers_set
                scales = {f"{leaf}_scale" for leaf, origin in record.items() if origin}
                self._made_by_hooks |= {(id(module), leaf) for leaf in held - record.keys() - scales}
            for leaf, origin in record.items():
                if origin is None:
                    continue
                held = module._parameters.get(leaf)
                key = (id(module), leaf) if held is None else (held.untyped_storage()._cdata, held.storage_offset())
                if key in weights:
                    weights[key].names.append(dot + leaf)
                    if (module, leaf) not in weights[key].places:
                        weights[key].places.append((module, leaf))
                    continue
                codes, scale = live(module, leaf, origin)
                weights[key] = _Weight([(module, leaf)], [dot + leaf], origin, codes, scale)
                if held is not None and held.dtype in FP8_DTYPES:
                    weights[key].dtype = held.dtype
        if not weights:
            raise ValueError("`reload` must be given a model that holds FP8 weights, got one without")
        other = [w.names[0] for w in weights.values() if w.codes is None and self._covers(w.names)]
        if other and not self._has_hooks:
            raise ValueError(
                f"{listed(other)} must be in the layout of the checkpoint to be reloaded, got another one: give the "
                "reload the `on_module` or `on_finish` that made it, or leave the weight out of `scope`"
            )
        return weights

    def _in_scope(self):
        return [weight for weight in self._weights.values() if self._covers(weight.names)]

    def _covers(self, names):
        return self._scope is None or any(matches(p, name) for p in self._scope for name in names)

    def _fp8_memory(self):
        for weight in self._weights.values():
            for module, leaf in weight.places:
                for name in (leaf, f"{leaf}_scale"):
                    held = module._parameters.get(name)
                    if held is not None:
                        yield weight.names[0].removesuffix(leaf) + name, held

    def _weight_of(self, entry):
        place = entry.places[0]
        return self._by_place.get((id(place.module), place.leaf))

    def _own_entry(self, entry: Entry) -> Entry | None:
        weight = self._weight_of(entry)
        if weight is not None and entry.on_meta:
            origin = weight.origin
            changes = {"scheme": origin.scheme, "why": "weight", "logical": origin.logical, "fp8_dtype": weight.dtype}
            return replace(entry, **changes)
        if all((id(place.module), place.leaf) in self._made_by_hooks for place in entry.places):
            return None
        return replace(entry, scheme=None, why="as before")

    def _check_poison(self, plan):
        loaded = {name for entry in plan.entries for name in entry.names}
        left = [name for name in half_loaded(self.model) if name not in loaded]
        if left:
            raise PoisonedModelError(
                f"an earlier reload broke off and left {listed(left)} half loaded; the scope of this one must hold them"
            )
        if self._scope is not None:
            unused = [p for p in self._scope if not any(matches(p, name) for name in loaded)]
            if unused:
                raise UnmatchedPatternError(f"no tensor is matched by {', '.join(map(repr, unused))} of `scope`")
