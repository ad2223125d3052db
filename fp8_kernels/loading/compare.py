"""Is what arrives a second time what is stored: in codes, since the high-precision values are gone."""

from __future__ import annotations

import torch

from ..reference import FP8_MAX, cast, dequantize, rule
from ..schemes import Scheme
from .coverage import Box

COMPARE_ELEMENTS = 1 << 20  # fp32 temporaries of a comparison hold this many elements each


def same_codes(
    scheme: Scheme,
    group: tuple[int, int],
    q: torch.Tensor,
    scale: torch.Tensor,
    values: torch.Tensor,
    box: Box,
    mask: torch.Tensor | None = None,
) -> bool:
    """Are the values of a rectangle, cast with the stored scales, the stored codes?

    Args:
        group: (rows, columns) that share a scale.
        q, scale: of the unit, `scale` on the device of the values.
        values: of the rectangle `box`.
        mask: bool, the shape of the unit: only elements where it is true count.
    """
    row0, row1, col0, col1 = box
    (group_n, group_k), (*block, _, numerics) = group, scheme.quantize_args
    used = rule(q.dtype, numerics, *block)
    scale = scale.reshape(1, 1, 1) if scale.ndim == 0 else scale[None]
    first_col = col0 // group_k * group_k
    columns = slice(col0 // group_k, -(-col1 // group_k))
    step = max(COMPARE_ELEMENTS // max(col1 - first_col, 1), 1)
    if group_n < q.shape[0]:
        step = -(-step // group_n) * group_n
    start = row0 if group_n == q.shape[0] else row0 // group_n * group_n
    while start < row1:
        end = min(start + step, row1)
        first = max(start, row0)
        piece = values.new_zeros(1, end - start, col1 - first_col)
        piece[0, first - start :, col0 - first_col :] = values[first - row0 : end - row0, : col1 - col0]
        groups = slice(start // group_n, -(-end // group_n))
        piece_scale = scale[:, groups, columns]
        codes = cast(piece, piece_scale, q.dtype, *block, used).view(torch.uint8)
        more = _exceeds(piece, piece_scale, q.dtype, *block)
        codes, more = (x[0, first - start :, col0 - first_col :] for x in (codes, more))
        differ = (codes != q[first:end, col0:col1].view(torch.uint8).to(codes.device)) | more
        if mask is not None:
            differ &= mask[first:end, col0:col1]
        if bool(differ.any()):
            return False
        start = end
    return True


def _exceeds(values, scale, fp8_dtype, block_n, block_k):
    """Bool, the shape of `values`: is it more than the largest value that this scale was made for?

    The cast saturates, so the code alone does not tell; a part in a million is left to the rounding of the scale.
    """
    largest = torch.full_like(values, FP8_MAX[fp8_dtype], dtype=fp8_dtype)
    return values.float().abs() > dequantize(largest, scale, torch.float32, block_n, block_k) * (1 + 2**-20)


def are_equal(held: torch.Tensor, new: torch.Tensor) -> bool:
    """Are these codes, or scales, the same? `new` may be on another device."""
    held, new = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (held, new))
    return torch.equal(held, new.to(held.device))


def are_powers_of_two(scale: torch.Tensor) -> bool:
    """Are all of these scales, as a power-of-two scheme stores them?"""
    return scale.dtype == torch.float8_e8m0fnu or not bool((scale.float().view(torch.int32) & 0x7FFFFF).any())
