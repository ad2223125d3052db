"""Data that is FP8 already: taken with its scale as it is, or dequantized on its way into a weight."""

from __future__ import annotations

import torch

from ..errors import LoadError, NonFiniteWeightError
from ..ops import FP8_DTYPES, dequantize
from ..schemes import SCALE_DTYPES, WHOLE, PerBlock, PerTensor, Scheme, as_scheme
from .copy_counter import BelowModes
from .origin import scheme_of
from .writes import Writes

PIECE_BYTES = 8 << 20


def copy_codes(writes: Writes, t, q, scale, scheme: str | Scheme | None):
    """See `LayerwiseLoader.copy_codes`."""
    target = writes.find(t, written=True)
    name = "the weight" if target is None else f"`{target.tracked.entry.name}`"
    if q.dtype not in FP8_DTYPES or q.shape != t.shape:
        raise LoadError(f"codes for {name} must be FP8 of shape {tuple(t.shape)}, got {q.dtype} of {tuple(q.shape)}")
    scale = usable(scale)
    if scale.dtype not in SCALE_DTYPES:
        raise LoadError(f"scales for {name} must be floating-point numbers, got {scale.dtype}")
    if scheme is not None:
        scheme = as_scheme(scheme)
    if scale.numel() == 1:  # it covers all, whatever else it would
        scale, scheme = scale.reshape(()), None
    if scheme is None:
        scheme = stored_scheme(q, scale, name)
    if not _fits(q, scale, scheme):
        raise LoadError(f"scales for {name} must be of shape {scheme.scale_shape(q.shape)}, got {tuple(scale.shape)}")
    if holds_nan(q):
        raise NonFiniteWeightError(f"{name}: its codes hold NaN or Inf")
    with torch.no_grad():
        with BelowModes():  # the codes of a model that is reloaded are nothing that its engine may write
            taken = writes.take_codes(t, q, scale, scheme)
        if not taken:
            _copy_dequantized(t, q, scale, scheme)


def _copy_dequantized(t, q, scale, scheme):
    """`q * scale` in float32, a few rows at a time: four times the bytes of the codes are never there at once."""
    if q.ndim > 2:
        for i in range(len(q)):
            _copy_dequantized(t[i], q[i], scale[i] if scale.ndim else scale, scheme)
        return
    block_n = max(scheme.block[0], 1)
    step = max(PIECE_BYTES // (4 * max(q.shape[1], 1)) // block_n, 1) * block_n
    for start in range(0, len(q), step):
        rows = slice(start, start + step)
        is_of_rows = scale.ndim and scheme.block[0] != WHOLE
        part = scale[start // block_n : -(-(start + step) // block_n)] if is_of_rows else scale
        t[rows].copy_(dequantize(q[rows], part, torch.float32, scheme))


def usable(scale):
    """Scales in float32 where a checkpoint has them in a dtype that no scheme has, as models in float16 do."""
    return scale if scale.dtype in SCALE_DTYPES or not scale.is_floating_point() else scale.float()


def stored_scheme(q, scale, name):
    """What the scales of these codes cover, told from shapes; as 128 x 128 where these are those of such blocks.

    Raises:
        ValueError: they do not tell; with the name of the weight.
    """
    if not scale.ndim:
        return PerTensor(scale_dtype=scale.dtype, pow2=scale.dtype == torch.float8_e8m0fnu)
    blocks = PerBlock(128, 128)
    if scale.dtype == torch.float32 and tuple(scale.shape) == blocks.scale_shape(q.shape):
        return blocks
    try:
        return scheme_of(q, scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _fits(q, scale, scheme):
    return not scale.ndim or tuple(scale.shape) == scheme.scale_shape(q.shape)


def holds_nan(q: torch.Tensor) -> torch.Tensor:
    """Do codes hold NaN or Inf? Bool `[]`. Read from the bits, some at a time, to fit the memory bound."""
    first = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}.get(q.dtype)
    bits = q.view(torch.uint8).reshape(1, -1) if q.ndim < 2 else q.view(torch.uint8)
    found = torch.zeros((), dtype=torch.bool, device=q.device)
    for piece in bits.split(max(PIECE_BYTES * len(bits) // max(bits.numel(), 1), 1)) if bits.numel() else ():
        # The fnuz formats have one NaN, which is negative zero elsewhere.
        found |= (piece == 0x80).any() if first is None else (piece & 0x7F).max() >= first
    return found
