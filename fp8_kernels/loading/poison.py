"""Marks on modules that a streaming reload left half loaded: they refuse to run until they are reloaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import PoisonedModelError
from .plan import listed

_POISON = "_fp8_poison"  # on a module: names of its half-loaded tensors, and the handle of the hook that says so


def mark(module: torch.nn.Module, names: Iterable[str]):
    """From now on the module refuses to run; names of an earlier mark stay."""
    names = sorted({*cure(module), *names})
    vars(module)[_POISON] = names, module.register_forward_pre_hook(_refuse)


def cure(module: torch.nn.Module) -> list[str]:
    """Take a module's mark off; returns the names that it held."""
    names, handle = vars(module).pop(_POISON, ([], None))
    if handle is not None:
        handle.remove()
    return names


def half_loaded(model: torch.nn.Module) -> list[str]:
    """Names of the tensors that a reload left half loaded."""
    return [name for module in model.modules() if _POISON in vars(module) for name in vars(module)[_POISON][0]]


def check_not_poisoned(model: torch.nn.Module):
    """Raise PoisonedModelError for a model that an earlier reload left half loaded."""
    names = half_loaded(model)
    if names:
        raise PoisonedModelError(f"a reload broke off and left {listed(names)} half loaded; reload them")


def _refuse(module, args):
    names = vars(module)[_POISON][0]
    raise PoisonedModelError(
        f"a reload broke off and left {listed(names)} half loaded; reload the model before it runs"
    )
