"""The definition of every op, in plain PyTorch. Every other backend is proved equal to this, byte for byte.

For the elements `x` of a group (see `schemes`), each converted exactly to fp32:

    amax  = max |x|                          NaN if any NaN, else Inf if any Inf
    scale = max(amax / fp8_max, 2**-126)     IEEE fp32 division
    q     = sat_rne(x / scale)               IEEE fp32 division, one rounding to FP8, ties to even, saturating
    w     ~ q * scale

All weights here are `[E, N, K]`, all scales and amaxes `[E, ceil(N/block_n), ceil(K/block_k)]`. A NaN that
an op makes is the canonical one (fp32 0x7fc00000, bf16 0x7fc0, e8m0 0xff, FP8 code 0x7f), because the sign
and payload that arithmetic gives to a NaN differ between processors.
"""

import torch

from .schemes import WHOLE, grid

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
TINY = 2.0**-126  # the smallest normal fp32


def amax(w: torch.Tensor, block_n: int, block_k: int) -> torch.Tensor:
    """`max |w|` of each group: fp32 `[E, SN, SK]`; 0 for a group without elements."""
    return canonical_nan(_as_groups(w.float().abs(), block_n, block_k).amax(dim=(2, 4)))


def scale_from_amax(amax: torch.Tensor, fp8_dtype, pow2: bool, scale_dtype=torch.float32) -> torch.Tensor:
    """The scale of a group with that amax, as stored: `scale_dtype`, same shape."""
    # By a tensor: on a GPU torch turns division by a number into multiplication by its reciprocal.
    scale = (amax / torch.full_like(amax, FP8_MAX[fp8_dtype])).clamp(min=TINY)
    if pow2:  # the exponent, rounded up; all in integers, so that no log2 can be off by one
        bits = scale.view(torch.int32)
        exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
        scale = torch.where(scale.isfinite(), (exponent.clamp(1, 254) << 23).view(torch.float32), scale)
    if scale_dtype == torch.float8_e8m0fnu:  # has NaN but no Inf
        exponent = torch.where(scale.isfinite(), scale.view(torch.int32) >> 23, 0xFF)
        return exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
    return canonical_nan(scale.to(scale_dtype))


def cast(w: torch.Tensor, scale: torch.Tensor, fp8_dtype, block_n: int, block_k: int) -> torch.Tensor:
    """`sat_rne(w / scale)`: FP8, the shape of `w`."""
    x = w.float() / _per_element(scale, w.shape, block_n, block_k)
    q = x.clamp(-FP8_MAX[fp8_dtype], FP8_MAX[fp8_dtype]).to(fp8_dtype)  # .to() alone overflows to NaN
    return torch.where(x.isnan(), 0x7F, q.view(torch.uint8)).view(fp8_dtype)


def quantize(w, fp8_dtype, block_n, block_k, pow2=False, scale_dtype=torch.float32, amax_in=None):
    """Codes and scales of `w`; with `amax_in` the groups' amaxes are taken from there."""
    group_amax = amax(w, block_n, block_k) if amax_in is None else amax_in
    scale = scale_from_amax(group_amax, fp8_dtype, pow2, scale_dtype)
    return cast(w, scale, fp8_dtype, block_n, block_k), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor, dtype, block_n: int, block_k: int) -> torch.Tensor:
    """`q * scale` in fp32, rounded once to `dtype`."""
    return canonical_nan((q.float() * _per_element(scale, q.shape, block_n, block_k)).to(dtype))


def _as_groups(x, block_n, block_k):
    """`[E, N, K]` -> `[E, SN, rows, SK, columns]`, edges padded with zeros, which no amax sees."""
    num_units, num_rows, num_cols = x.shape
    grid_n, grid_k = grid(num_rows, num_cols, block_n, block_k)
    block_n = max(num_rows, 1) if block_n == WHOLE else block_n
    block_k = max(num_cols, 1) if block_k == WHOLE else block_k
    padded = torch.nn.functional.pad(x, (0, grid_k * block_k - num_cols, 0, grid_n * block_n - num_rows))
    return padded.reshape(num_units, grid_n, block_n, grid_k, block_k)


def _per_element(scale, shape, block_n, block_k):
    """Scales, in fp32, spread over the elements they cover."""
    _, num_rows, num_cols = shape
    scale = scale.float()
    if block_n not in (WHOLE, 1):
        scale = scale.repeat_interleave(block_n, dim=1)[:, :num_rows]
    if block_k not in (WHOLE, 1):
        scale = scale.repeat_interleave(block_k, dim=2)[:, :, :num_cols]
    return scale


def canonical_nan(x):
    return torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
