"""Streams that hold FP8 weights already: codes and their scales, in whatever order, as one item."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ..ops import FP8_DTYPES
from .reader import TensorInfo

_WEIGHT, _SUFFIXES = ".weight", ("_scale", "_scale_inv")


def paired(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Each (name, tensor, None), as it comes; FP8 weights as (name, codes, scales), once both have come.

    What has to wait for its partner is copied, since the source may use its memory again. What never finds one comes
    last, as it is.
    """
    codes, scales = {}, {}
    for name, tensor in weights:
        base = _weight_of(name)
        if base is not None and base in codes:
            yield base, codes.pop(base), tensor
        elif base is not None:
            scales[base] = name, tensor.clone()
        elif tensor.dtype in FP8_DTYPES and name in scales:
            yield name, tensor, scales.pop(name)[1]
        elif tensor.dtype in FP8_DTYPES and name.endswith(_WEIGHT):
            codes[name] = tensor.clone()
        else:
            yield name, tensor, None
        del tensor
    for name, tensor in codes.items():
        yield name, tensor, None
    for name, tensor in scales.values():
        yield name, tensor, None


def as_high_precision(
    tensors: Mapping[str, TensorInfo | torch.Tensor],
) -> dict[str, TensorInfo | torch.Tensor]:
    """The tensors as if every FP8 weight that has scales were float32, without the scales; values do not count."""
    found = dict(tensors)
    for name in tensors:
        base = _weight_of(name)
        if base in tensors and tensors[base].dtype in FP8_DTYPES:
            del found[name]
            found[base] = torch.empty(tuple(tensors[base].shape), dtype=torch.float32, device="meta")
    return found


def _weight_of(name):
    """The weight whose scales have that name; None for every other tensor."""
    base = next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), None)
    return base if base is not None and base.endswith(_WEIGHT) else None
