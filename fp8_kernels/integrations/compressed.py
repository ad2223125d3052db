"""A transformers model that runs in FP8, as a "compressed-tensors" checkpoint."""

from __future__ import annotations

import math

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..checkpoint.formats import as_format
from ..checkpoint.plan import PlannedTensor
from ..checkpoint.quantize import config_of
from ..errors import UnsupportedLayoutError
from ..loading.plan import listed
from ..modules import Fp8Module
from ..ops import FP8_DTYPES
from ..schemes import PerTensor, Scheme

_SCALE = "_scale"
_WAY_OUT = "keep the original checkpoint, which loads to the same model"


def compressed_state(model: torch.nn.Module, conversions: list) -> tuple[dict[str, torch.Tensor], dict]:
    """What a checkpoint of the model holds, and its `quantization_config`.

    Args:
        model: whose FP8 weights are in `Fp8Linear` and `Fp8Experts`.
        conversions: what transformers did to the names and tensors of the checkpoint it was loaded from; done
            backwards, so that experts are one by one and names are the original ones.

    Raises:
        UnsupportedLayoutError: readers of the format would not load one of the weights, or would leave it out.
    """
    fmt = as_format("compressed-tensors")
    state, schemes = model.state_dict(), set()
    for prefix, module in model.named_modules():
        for name in module.fp8_names() if isinstance(module, Fp8Module) else ():
            full_name = f"{prefix}.{name}" if prefix else name
            schemes.add(module.scheme)
            scale = state[full_name + _SCALE].float()
            state[full_name + _SCALE] = _for_parts(scale, name) if isinstance(module.scheme, PerTensor) else scale
    _refuse_parts(state, conversions)
    state = remove_tied_weights_from_state_dict(state, model)
    kept_conversions = getattr(model, "_weight_conversions", None)
    model._weight_conversions = [*conversions, *_of_scales(conversions)]
    try:
        state = revert_weight_conversion(model, state)
    finally:
        model._weight_conversions = kept_conversions
    items = {}
    for name, tensor in list(state.items()):
        if name.endswith(_SCALE) and state.get(name.removesuffix(_SCALE), tensor).dtype in FP8_DTYPES:
            continue
        scheme = None
        if tensor.dtype in FP8_DTYPES:
            if tensor.ndim == 3:
                raise UnsupportedLayoutError(
                    f"`{name}` must be one expert to be saved, got all {len(tensor)}: checkpoints of this model hold "
                    f"them in one tensor, and readers of {fmt.name!r} would leave its scales out and say nothing; "
                    f"{_WAY_OUT}"
                )
            scheme, state[name + _SCALE] = _scheme_of(name, tensor, state.get(name + _SCALE), schemes, fmt)
            fmt.check(name, tuple(tensor.shape), scheme, tensor.dtype)
        items[name] = PlannedTensor(name, tuple(tensor.shape), tensor.dtype, scheme, "")
    return state, config_of(items, fmt)


def stacks_experts(converter: WeightConverter) -> bool:
    """Does it only stack experts, and gate above up?"""
    kinds = [type(operation) for operation in converter.operations]
    return kinds in ([MergeModulelist], [MergeModulelist, Concatenate])


def _refuse_parts(state, conversions):
    """No reader could take FP8 weights apart again that the checkpoint would hold as one, with scales for all."""
    for converter in conversions:
        if isinstance(converter, WeightConverter) and not stacks_experts(converter):
            back = converter.reverse_transform()
            parts = [n for n, t in state.items() if t.dtype in FP8_DTYPES and back.rename_source_key(n)[1] is not None]
            if parts:
                raise UnsupportedLayoutError(
                    f"{listed(parts)} must be weights of their own in the checkpoint to be saved, but checkpoints of "
                    f"this model hold them in another form; {_WAY_OUT}"
                )


def _for_parts(scale, name):
    """One scale a weight, `[1]`, or one an expert, `[E, 1]`; `[E, 2]` where gate and up will be parts."""
    if not scale.ndim:
        return scale.reshape(1)
    return scale[:, None].repeat(1, 2 if name == "gate_up_proj" else 1)


def _of_scales(conversions):
    """The converters once more, for the scales of what they convert."""
    found = []
    for converter in conversions:
        if isinstance(converter, WeightConverter):
            sources, targets = (
                [pattern + _SCALE for pattern in patterns]
                for patterns in (converter._original_source_patterns, converter._original_target_patterns)
            )
            scales = WeightConverter(sources, targets, converter.operations)
            scales.scope_prefix, scales.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
            found.append(scales)
    return found


def _scheme_of(name, tensor, scale, schemes: set[Scheme], fmt) -> tuple[Scheme, torch.Tensor]:
    """Which of the model's schemes a weight's scales are of, and these in the format's shape.

    transformers 5.17 drops dimensions of 1 where it takes experts apart, so the number of scales has to tell.
    """
    shapes = {scheme: fmt.scale_shape(tuple(tensor.shape), scheme) for scheme in schemes}
    if scale is not None:
        exact = [scheme for scheme, shape in shapes.items() if tuple(scale.shape) == shape]
        alike = [scheme for scheme, shape in shapes.items() if scale.numel() == math.prod(shape)]
        if exact or alike:
            scheme = (exact or alike)[0]
            return scheme, scale.reshape(shapes[scheme])
    raise UnsupportedLayoutError(
        f"`{name}` {list(tensor.shape)} must have scales of its own to be saved, got "
        f"{None if scale is None else list(scale.shape)}: this checkpoint's layout divides weights elsewhere"
    )
