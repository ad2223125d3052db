"""What no checkpoint holds or says of a model on meta: computed buffers, and what stays in float32."""

from __future__ import annotations

import re

import torch
from torch import nn

from .errors import LoadError


def keep_precision(model: nn.Module):
    """Make float32 of the tensors on meta that a transformers model wants in float32 whatever its dtype is."""
    wanted = getattr(model, "_keep_in_fp32_modules_strict", None)
    for name, t in (*model.named_parameters(), *model.named_buffers()) if wanted else ():
        if t.is_meta and t.dtype in (torch.bfloat16, torch.float16) and any(re.search(w, name) for w in wanted):
            t.data = t.data.float()


def compute_buffers(model, device):
    """Let the model compute its non-persistent buffers (rotary tables) on the device.

    The model's parameters are still on meta, so its own initialisation runs without touching a value. It runs over
    two different fillings: a buffer that comes out the same both times was computed, any other was left alone.
    """
    left = []
    for prefix, module in model.named_modules():
        leaves = [leaf for leaf in module._non_persistent_buffers_set if _is_meta(module._buffers.get(leaf))]
        if not leaves:
            continue
        initialise = getattr(_pretrained_ancestor(model, prefix), "_init_weights", lambda module: None)
        results = []
        for filling in (0, 1):
            for leaf in leaves:
                module._buffers[leaf] = torch.full_like(module._buffers[leaf], filling, device=device)
            with torch.no_grad():
                initialise(module)
            results.append([module._buffers[leaf] for leaf in leaves])
        left += [
            f"{prefix}.{leaf}".lstrip(".") for leaf, a, b in zip(leaves, *results, strict=True) if not torch.equal(a, b)
        ]
    if left:
        raise LoadError(
            f"no checkpoint holds {', '.join(f'`{name}`' for name in left)}, and the model does not say how to compute "
            "them: give the model real ones (build the module that owns them outside of the meta device)"
        )


def _is_meta(buffer):
    return buffer is not None and buffer.is_meta


def _pretrained_ancestor(model, prefix):
    """The innermost module around `prefix` that knows how to initialise its parts."""
    parts = prefix.split(".")
    for size in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:size]))
        if hasattr(module, "_init_weights"):
            return module
    return None
