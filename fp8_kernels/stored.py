"""Checkpoints that are FP8 already: what their scales cover, and modules that take them as they are."""

from __future__ import annotations

import torch
from torch import nn

from .checkpoint import Checkpoint
from .checkpoint.formats import FORMATS, module_of
from .errors import CheckpointError, LoadError, UnsupportedLayoutError
from .modules import Fp8Experts, Fp8Linear, can_run
from .names import Names
from .ops import FP8_DTYPES
from .schemes import PerBlock, PerChannel, PerTensor, Scheme

SCALE_SUFFIXES = ("_scale", "_scale_inv")


def stored_schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """What the scales of each FP8 weight of a checkpoint cover, by name."""
    stored = {name: info for name, info in checkpoint.metadata().items() if info.dtype in FP8_DTYPES}
    return {name: _stored_scheme(checkpoint, name, info) for name, info in stored.items()}


def expect_fp8(model, checkpoint, schemes, activation):
    """Put FP8 modules, still on meta, where the checkpoint holds FP8 weights, so that they are taken as they are."""
    names, found = Names(model), {}
    for name, scheme in schemes.items():
        destination, dtype = names.find(name), checkpoint.metadata()[name].dtype
        if destination is None:
            continue  # reported as unexpected when it arrives
        owner = destination.name.rpartition(".")[0]
        if isinstance(scheme, PerTensor) and destination.expert is not None:
            scheme = PerChannel()  # merged experts get their halves' scales row by row
        if found.setdefault(owner, (scheme, dtype)) != (scheme, dtype):
            raise UnsupportedLayoutError(f"`{owner}` must have one scheme for all its experts, `{name}` has {scheme}")
    for owner, (scheme, dtype) in found.items():
        module = model.get_submodule(owner)
        if not can_run(module) or module is model:
            raise UnsupportedLayoutError(f"`{owner}` ({type(module).__name__}) holds FP8 weights that nothing runs")
        parent, _, child = owner.rpartition(".")
        replacement = _empty_fp8(module, owner, scheme, dtype, activation)
        setattr(model.get_submodule(parent), child, replacement.train(module.training))


def check_dtype(name: str, dtype: torch.dtype, into: torch.dtype):
    """Raise LoadError for values that mean nothing alone: integers, or FP8 codes, for a floating-point tensor."""
    if into.is_floating_point and not dtype.is_floating_point:
        raise LoadError(f"`{name}` must be loaded from floating-point data, got {dtype}")
    if into.is_floating_point and into not in FP8_DTYPES and dtype in FP8_DTYPES:
        raise LoadError(f"`{name}` must be loaded from high precision, got {dtype} without its scale")


def wrong_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> LoadError:
    """The error for a tensor of a checkpoint that does not fit its place."""
    return LoadError(f"`{name}` must have shape {tuple(wanted)}, got {tuple(found)}")


def _stored_scheme(checkpoint, name, info):
    """What one stored scale covers."""
    metadata = checkpoint.metadata()
    scales = [name + suffix for suffix in SCALE_SUFFIXES if name + suffix in metadata]
    if len(scales) != 1:
        what = f"scales `{scales[0]}` and `{scales[1]}`" if scales else f"no scale `{name + SCALE_SUFFIXES[0]}`"
        raise CheckpointError(f"{checkpoint.folder}: FP8 weight `{name}` has {what} beside it")
    scale = metadata[scales[0]]
    if scale.shape in ((), (1,), info.shape[:-2]):
        return PerTensor()
    if scale.shape == (*info.shape[:-1], 1):
        return PerChannel()
    config = checkpoint.config.get("quantization_config", {})
    format = FORMATS.get(config.get("quant_method"))
    scheme = format.scheme_of(config, module_of(name)) if format else None
    if scheme is None or scheme.scale_shape(info.shape) != tuple(scale.shape):
        raise UnsupportedLayoutError(
            f"{checkpoint.folder}: config.json does not say what the scales of `{name}` cover "
            f"({list(scale.shape)} for {list(info.shape)})"
        )
    return scheme


def _empty_fp8(module, owner, scheme, dtype, activation):
    options = {"dtype": dtype, "activation": activation, "device": "meta"}
    if isinstance(module, nn.Linear):
        new = Fp8Linear(module.in_features, module.out_features, module.bias is not None, scheme, **options)
        new.bias = module.bias
        return new
    new = Fp8Experts.like(module, scheme, **options)
    if isinstance(scheme, PerBlock) and new.intermediate_dim % scheme.block_n:
        raise UnsupportedLayoutError(
            f"`{owner}`: blocks of {scheme.block_n} rows must not straddle gate and up, got {new.intermediate_dim} rows"
        )
    return new
