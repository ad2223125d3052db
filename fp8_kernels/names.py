"""Where a checkpoint's tensor belongs in a model: rules, never lists of models.

A name is tried as it is, with the base model's prefix added or taken away ("model.", "bert."), and, for a
transformers model, under the names that transformers itself gives to old checkpoints. Experts that a checkpoint
holds one by one land in the merged weights of transformers 5.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

_EXPERT = re.compile(r"(?P<experts>(?:.+\.)?experts)\.(?P<index>\d+)\.(?P<part>\w+)\.(?P<leaf>\w+)")
# What checkpoints call the three projections of an expert -> the merged weight, and which half of its rows.
_PARTS = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
_LEAVES = {"weight": "", "bias": "_bias", "weight_scale": "_scale", "weight_scale_inv": "_scale"}
TURNED = "_fp8_turned"  # on a module: names of the weights that `turned_experts` turned
# Values that models compute for themselves, which old checkpoints nevertheless hold.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")


class Destination(NamedTuple):
    """A tensor of the model, or a part of it.

    Attributes:
        name: of the parameter or buffer.
        expert: index along its first dimension; None for all of it.
        half: 0 for the upper half of that expert's rows, 1 for the lower; None for all rows.
        turned: whether the checkpoint holds `[E, in, out]` where the model holds `[E, out, in]`.
    """

    name: str
    expert: int | None = None
    half: int | None = None
    turned: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """That part of the tensor, as a view."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.half is not None:
            num_rows = tensor.shape[0] // 2
            tensor = tensor.narrow(0, self.half * num_rows, num_rows)
        return tensor

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of that part of a tensor of this shape."""
        if self.expert is not None:
            shape = shape[1:]
        return shape if self.half is None else (shape[0] // 2, *shape[1:])


class Names:
    """The names a model answers to; made once a load, before anything is loaded."""

    def __init__(self, model: nn.Module):
        self._model, self._renaming = model, None
        self._loadable = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._computed = set()
        self._num_experts: dict[str, int] = {}  # merged weight -> how many; 0 where no shard is a run of its rows
        for name, _ in model.named_buffers(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            persistent = leaf not in model.get_submodule(owner)._non_persistent_buffers_set
            (self._loadable if persistent else self._computed).add(name)
        self.turned = {
            f"{name}.{leaf}"
            for name, module in model.named_modules(remove_duplicate=False)
            for leaf in getattr(module, TURNED, ())
        }
        self._prefix = getattr(model, "base_model_prefix", "")
        self._ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]

    def find(self, name: str) -> Destination | None:
        """Where the checkpoint's tensor of that name belongs; None if nowhere."""
        for candidate in self._candidates(name):
            if candidate in self._loadable:
                return self.whole(candidate)
            found = self._find_expert(candidate)
            if found:
                return found
        return None

    def whole(self, name: str) -> Destination:
        """All of a tensor of the model."""
        return Destination(name, turned=name in self.turned)

    def may_be_dropped(self, name: str) -> bool:
        """Does the model say that it needs no tensor of that name, or compute it for itself?"""
        if _COMPUTED.search(name) or any(pattern.search(name) for pattern in self._ignored):
            return True
        return any(candidate in self._computed for candidate in self._candidates(name))

    def _candidates(self, name):
        yield from self._spellings(name)
        renamed = self._rename(name)  # costs more than all others, and few names need it
        if renamed != name:
            yield from self._spellings(renamed)

    def _spellings(self, name):
        if name.endswith(".weight_scale_inv"):
            name = name.removesuffix("_inv")
        yield name
        if self._prefix:
            prefix = f"{self._prefix}."
            yield name.removeprefix(prefix) if name.startswith(prefix) else prefix + name

    def _rename(self, name):
        if self._renaming is None:
            self._renaming = _renamings(self._model)
        return self._renaming(name)

    def _find_expert(self, name):
        match = _EXPERT.fullmatch(name)
        if match is None or match["part"] not in _PARTS or match["leaf"] not in _LEAVES:
            return None
        merged, half = _PARTS[match["part"]]
        leaf, experts = _LEAVES[match["leaf"]], match["experts"]
        if half == 1 and f"{experts}.up_proj{leaf}" in self._loadable:  # experts without a gate
            merged, half = "up_proj", None
        target, index = f"{experts}.{merged}{leaf}", int(match["index"])
        if target not in self._loadable:
            return None
        if target not in self._num_experts:
            module = self._model.get_submodule(experts)
            # In other layouts an expert's shard is not a run of rows: better unknown than wrong.
            turned = getattr(module, "is_transposed", False) or target in self.turned
            runs = not turned and getattr(module, "is_concatenated", True)
            self._num_experts[target] = module.get_parameter(merged + leaf).shape[0] if runs else 0
        return Destination(target, index, half) if index < self._num_experts[target] else None


@contextmanager
def turned_experts(model: nn.Module, quantized: set[str]):
    """Let experts that a model holds as `[E, in, out]` be `[E, out, in]`, so that rows are output channels.

    Args:
        model: on meta; as it was, if the body raises.
        quantized: names of the parameters that become FP8; only experts all of whose weights do are turned.
    """
    before = []
    for name, module in model.named_modules():
        weights = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.ndim == 3}
        if getattr(module, "is_transposed", False) and weights and quantized.issuperset(f"{name}.{w}" for w in weights):
            before.append((module, weights))
            for leaf, p in weights.items():
                turned = torch.empty(p.mT.shape, dtype=p.dtype, device=p.device)
                module._parameters[leaf] = nn.Parameter(turned, requires_grad=False)
            module.is_transposed = False
            setattr(module, TURNED, tuple(weights))
    try:
        yield
    except BaseException:
        for module, weights in before:
            module._parameters.update(weights)
            module.is_transposed = True
            delattr(module, TURNED)
        raise


def _renamings(model):
    """What transformers does to the names of old checkpoints of this model, as a function."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # not installed, or older than 5: names are then the model's own
        return lambda name: name
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return lambda name: name
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]

    def rename(name):
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return rename
