"""The definition of every op, in plain PyTorch. Every other backend is proved equal to this, byte for byte.

For the elements `x` of a group (see `schemes`), each converted exactly to fp32:

    amax  = max |x|                          NaN if any NaN, else Inf if any Inf
    scale = max(amax / fp8_max, 2**-126)     IEEE fp32 division
    q     = sat_rne(x / scale)               IEEE fp32 division, one rounding to FP8, ties to even, saturating
    w     ~ q * scale

All weights here are `[E, N, K]`, all scales and amaxes `[E, ceil(N/block_n), ceil(K/block_k)]`. A NaN that
an op makes is the canonical one (fp32 0x7fc00000, bf16 0x7fc0, e8m0 0xff, FP8 code 0x7f), because the sign
and payload that arithmetic gives to a NaN differ between processors. (The fnuz formats of AMD have one NaN, 0x80.)

`numerics` is an index into `schemes.NUMERICS`: 0 for the above, 1 for vLLM's variations of it, see `Rule`.
"""

from typing import NamedTuple

import torch

from .schemes import WHOLE, grid

FP8_MAX = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2fnuz: 57344.0,
}
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
TINY = 2.0**-126  # the smallest normal fp32


class Rule(NamedTuple):
    """How an amax becomes a scale, and an element its code. The defaults are the definition above."""

    fp8_max: float
    min_amax: float = 0.0
    min_scale: float = TINY
    reciprocal_max: bool = False  # scale = amax * (1 / fp8_max)
    reciprocal: bool = False  # q = sat_rne(x * (1 / scale)); 0 where that reciprocal overflows


def rule(fp8_dtype, numerics: int = 0, block_n: int = 1, block_k: int = WHOLE) -> Rule:
    """The rule for groups of that extent."""
    fp8_max = FP8_MAX[fp8_dtype]
    if numerics == 0:
        return Rule(fp8_max)
    if fp8_dtype == torch.float8_e4m3fnuz:
        fp8_max = 224.0  # the code before the last, which is what vLLM maps an amax to on AMD
    if (block_n, block_k) == (WHOLE, WHOLE):
        return Rule(fp8_max, min_scale=0.0, reciprocal=True)
    if (block_n, block_k) == (1, WHOLE):
        return Rule(fp8_max, min_scale=1 / (fp8_max * 512))
    if block_n == 1:
        return Rule(fp8_max, min_amax=1e-10, min_scale=0.0, reciprocal=True)
    return Rule(fp8_max, min_amax=1e-4, min_scale=0.0, reciprocal_max=True, reciprocal=True)


def amax(w: torch.Tensor, block_n: int, block_k: int) -> torch.Tensor:
    """`max |w|` of each group: fp32 `[E, SN, SK]`; 0 for a group without elements."""
    return canonical_nan(_as_groups(w.float().abs(), block_n, block_k).amax(dim=(2, 4)))


def scale_from_amax(amax: torch.Tensor, rule: Rule, pow2: bool, scale_dtype=torch.float32) -> torch.Tensor:
    """The scale of a group with that amax, as stored: `scale_dtype`, same shape."""
    # By a tensor: on a GPU torch turns division by a number into multiplication by its reciprocal.
    fp8_max = torch.full_like(amax, rule.fp8_max)
    amax = amax.clamp(min=rule.min_amax)
    scale = (amax * (1 / fp8_max) if rule.reciprocal_max else amax / fp8_max).clamp(min=rule.min_scale)
    if pow2:  # the exponent, rounded up; all in integers, so that no log2 can be off by one
        bits = scale.view(torch.int32)
        exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
        scale = torch.where(scale.isfinite(), (exponent.clamp(1, 254) << 23).view(torch.float32), scale)
    if scale_dtype == torch.float8_e8m0fnu:  # has NaN but no Inf
        exponent = torch.where(scale.isfinite(), scale.view(torch.int32) >> 23, 0xFF)
        return exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
    return canonical_nan(scale.to(scale_dtype))


def cast(w: torch.Tensor, scale: torch.Tensor, fp8_dtype, block_n: int, block_k: int, rule: Rule) -> torch.Tensor:
    """`sat_rne(w / scale)`: FP8, the shape of `w`."""
    if rule.reciprocal:
        inv_scale = 1 / scale
        inv_scale = torch.where(inv_scale.isinf(), 0, inv_scale)
        x = w.float() * _per_element(inv_scale, w.shape, block_n, block_k)
    else:
        x = w.float() / _per_element(scale, w.shape, block_n, block_k)
    q = x.clamp(-rule.fp8_max, rule.fp8_max).to(fp8_dtype)  # .to() alone overflows to NaN
    nan = 0x80 if fp8_dtype in FNUZ else 0x7F
    return torch.where(x.isnan(), nan, q.view(torch.uint8)).view(fp8_dtype)


def quantize(w, fp8_dtype, block_n, block_k, pow2=False, scale_dtype=torch.float32, amax_in=None, numerics=0):
    """Codes and scales of `w`; with `amax_in` the groups' amaxes are taken from there."""
    used = rule(fp8_dtype, numerics, block_n, block_k)
    group_amax = amax(w, block_n, block_k) if amax_in is None else amax_in
    scale = scale_from_amax(group_amax, used, pow2, scale_dtype)
    return cast(w, scale, fp8_dtype, block_n, block_k, used), scale


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
