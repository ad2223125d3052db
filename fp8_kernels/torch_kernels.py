"""The ops in plain PyTorch for tensors of any device: `reference`, one chunk of rows at a time.

Chunks bound the fp32 temporaries and keep them in the processor's cache. Rows of different chunks meet only
in the amax of a group that spans them, and a maximum does not care about order, so the bits are the
reference's.
"""

import torch

from . import reference
from .schemes import WHOLE

CHUNK_ELEMENTS = 1 << 18


def quantize_out(w, amax, q, scale, block_n, block_k, pow2, numerics):
    """Write codes and scales of `w`; see `ops.quantize`."""
    if amax is None:
        amax = scale.new_empty(scale.shape, dtype=torch.float32)
        amax_out(w, amax, block_n, block_k, accumulate=False)
    scale = _typed(scale)
    rule = reference.rule(q.dtype, numerics, block_n, block_k)
    scale.copy_(reference.scale_from_amax(amax, rule, pow2, scale.dtype))
    for unit, rows, groups in _chunks(w, block_n):
        q[unit, rows].copy_(reference.cast(w[unit, rows], scale[unit, groups], q.dtype, block_n, block_k, rule))


def amax_out(w, amax, block_n, block_k, accumulate):
    """Write, or accumulate, the amax of each group; see `ops.amax`."""
    if not accumulate:
        amax.zero_()
    for unit, rows, groups in _chunks(w, block_n):
        chunk = reference.amax(w[unit, rows], block_n, block_k)
        # maximum() makes NaNs of its own kind
        amax[unit, groups].copy_(reference.canonical_nan(amax[unit, groups].maximum(chunk)))


def quantize_many_out(w, q, scale, *args):
    """Write codes and scales of each weight; see `ops.quantize_many`."""
    for w_, q_, scale_ in zip(w, q, scale, strict=True):
        quantize_out(w_, None, q_, scale_, *args)


def copy_amax_out(w, out, amax, block_n, block_k):
    """Copy `w` and raise the amax of each group to its maximum; see `ops.copy_amax`."""
    out.copy_(w)
    amax_out(w, amax, block_n, block_k, accumulate=True)


def dequantize_out(q, scale, w, block_n, block_k):
    """Write `q * scale`; see `ops.dequantize`."""
    scale = _typed(scale)
    for unit, rows, groups in _chunks(q, block_n):
        w[unit, rows].copy_(reference.dequantize(q[unit, rows], scale[unit, groups], w.dtype, block_n, block_k))


def _typed(scale):
    """Bytes are e8m0 scales."""
    return scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale


def _chunks(w, block_n):
    """(experts, rows, scale rows) slices that cover `w`; no chunk splits the rows of a group but `WHOLE` ones."""
    num_units, num_rows, num_cols = w.shape
    step = max(CHUNK_ELEMENTS // max(num_cols, 1), 1)
    if block_n != WHOLE:
        step = -(-step // block_n) * block_n
    for unit in range(num_units):
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            groups = slice(None) if block_n == WHOLE else slice(start // block_n, -(-(start + step) // block_n))
            yield slice(unit, unit + 1), rows, groups
