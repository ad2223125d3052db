"""The ops as Triton kernels: the backend of GPUs for which the CUDA extension was not built.

Every program works on one tile `[R, G, C]`: R rows by G neighbouring groups by C columns of each. Groups of
one row (`SHARED=False`) have an own scale for each of the R rows; in taller groups (`SHARED=True`) the R rows
share one. A group that does not fit in a tile is cut into `pieces`, `pieces_k` of them side by side, which
`split` programs share. With that, rows, groups, blocks and whole weights are the same three kernels.

The bits are the reference's (see `reference`), and nothing depends on the order in which programs run.
Wherever the hardware's or the compiler's own conversion is not exact, or not the same everywhere, the
conversion is integer arithmetic here. FP8 tensors are passed as uint8, so that devices whose Triton backend
has no FP8 type run too. Tile sizes follow from the shapes by rule: an autotuner would make the first load of
each shape slow, and measure during it.

In the order of reading, and in one file because all three kernels need all of it: numbers, places, kernels,
launchers.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .reference import FNUZ, rule
from .schemes import WHOLE, grid

_INF = tl.constexpr(float("inf"))
_NAN_BITS = tl.constexpr(0x7FC00000)

_CVT_ASM = """{{
.reg .b16 lo, hi;
cvt.rn.satfinite.{0}x2.f32 lo, $2, $1;
cvt.rn.satfinite.{0}x2.f32 hi, $4, $3;
mov.b32 $0, {{lo, hi}};
}}"""
_CVT_E4M3 = tl.constexpr(_CVT_ASM.format("e4m3"))
_CVT_E5M2 = tl.constexpr(_CVT_ASM.format("e5m2"))


# Numbers.


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _abs_bits(x):
    """Bits of |x|. As integers they order like the values, with Inf and then NaN on top."""
    if x.dtype == tl.float32:
        bits = _bits(x) & 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True) & 0x7FFF
    return bits


@triton.jit
def _widen(x):
    """bf16, fp16 or fp32 as fp32, exact (which the interpreter's own conversion of a subnormal bf16 is not)."""
    if x.dtype == tl.bfloat16:
        value = _float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def _from_abs_bits(bits, dtype: tl.constexpr):
    """The fp32 value of what `_abs_bits` returned for that dtype, a NaN made canonical."""
    return _round(_widen(bits.to(dtype, bitcast=True)), tl.float32)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """fp32 rounded to `dtype`, ties to even, NaN canonical."""
    bits = _bits(x)
    if dtype == tl.bfloat16:  # the interpreter's own conversion truncates
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, rounded, _NAN_BITS >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        rounded = x.to(tl.float16).to(tl.int16, bitcast=True)
        y = tl.where(x == x, rounded, 0x7E00).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        y = _float(tl.where(x == x, bits, _NAN_BITS))
    return y


@triton.jit
def _scale_from_amax(
    amax, dtype: tl.constexpr, FP8_MAX: tl.constexpr, MIN_AMAX: tl.constexpr, MIN_SCALE: tl.constexpr,
    RECIPROCAL_MAX: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """`reference.scale_from_amax`: (as stored in `dtype`, uint8 being e8m0; the same in fp32)."""
    amax = tl.where(amax < MIN_AMAX, MIN_AMAX, amax)  # false for NaN, which stays
    if RECIPROCAL_MAX:
        scale = amax * tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), FP8_MAX)
    else:
        scale = tl.div_rn(amax, FP8_MAX)
    scale = tl.where(scale < MIN_SCALE, MIN_SCALE, scale)
    if POW2:  # the carry out of the mantissa rounds the exponent up, and leaves Inf as it is
        scale = tl.where(scale == scale, _float((_bits(scale) + 0x7FFFFF) & 0x7F800000), scale)
    if dtype == tl.uint8:  # e8m0 has NaN but no Inf
        scale = _float(tl.where(scale < _INF, _bits(scale), _NAN_BITS))
        stored = (_bits(scale) >> 23).to(tl.uint8)
    else:
        stored = _round(scale, dtype)
        scale = _widen(stored)
    return stored, scale


@triton.jit
def _load_scale(pointers, mask):
    """Stored scales as fp32."""
    scale = tl.load(pointers, mask=mask, other=0)
    if scale.dtype == tl.uint8:  # code 0 is 2**-127, a subnormal fp32; 255 is NaN
        code = scale.to(tl.int32)
        bits = tl.where(code == 0, 0x400000, tl.where(code == 255, _NAN_BITS, code << 23))
        scale = _float(bits)
    return _widen(scale)


@triton.jit
def _divide(x, scale, SHORT: tl.constexpr, RECIPROCAL: tl.constexpr, BOUNDED: tl.constexpr):
    """`x / scale` to the FP8 code that IEEE division would give, for the scales that `_scale_from_amax` makes; where
    RECIPROCAL, `x * (1 / scale)` instead, with 0 for a reciprocal that overflows.

    SHORT: x were bf16 or fp16, at most 11 significant bits. `1 / scale` is `high + low`; `high` has 13 bits, so that
    its product with x is exact, and one fused step rounds once (proven by tests/test_cuda_build.py). `low` is above
    zero for powers of two as well, so that Inf stays Inf and a zero keeps its sign. Neither part may underflow, so
    large scales are lowered first.

    Else a quotient by the rounded reciprocal, corrected by its exact remainder, is the correctly rounded one,
    which takes a third of the instructions of a division. The remainder is exact unless it falls under the
    smallest subnormal, so small scales are lifted first (by a power of two, which changes no quotient); the
    quotients that are still too small for it lie below 2**-40, where FP8 has only zero. With -x and
    -1 / scale a quotient of zero keeps its sign (Triton's unary minus is a subtraction from 0, which would not
    do). An infinite scale, whose product with a zero quotient would be NaN, takes part only by its reciprocal.
    BOUNDED says that no |x| exceeds the amax of its group, so that no quotient overflows; else an infinite one
    has no remainder and is the answer.
    """
    if RECIPROCAL:
        inv_scale = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        quotient = x * tl.where(inv_scale == _INF, 0.0, inv_scale)
    elif SHORT:
        lower = tl.where(scale > 2.0**60, 2.0**-64, 1.0)
        scale = scale * lower
        inv_scale = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        high = _float((_bits(inv_scale) - 1) & -2048)
        low = tl.fma(high * -1.0, scale, 1.0) * inv_scale
        high = tl.where(scale == _INF, 0.0, high)
        low = tl.where(scale == _INF, 0.0, low)
        quotient = tl.fma(x, tl.broadcast_to(low, x.shape), x * high) * lower
    else:
        lift = tl.where(scale < 2.0**-60, 2.0**64, 1.0)
        scale = scale * lift
        neg_inv_scale = tl.broadcast_to(tl.div_rn(-1.0, scale), x.shape)
        scale = tl.broadcast_to(tl.where(scale == _INF, 0.0, scale), x.shape)
        neg_x = x * (lift * -1.0)
        first = neg_x * neg_inv_scale
        remainder = tl.fma(first, scale, neg_x)
        quotient = tl.fma(remainder, neg_inv_scale, first)
        if not BOUNDED:
            quotient = tl.where(tl.abs(first) < 2.0**100, quotient, first)
    return quotient


@triton.jit
def _encode(x, FP8_MAX: tl.constexpr, FNUZ: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 -> FP8 code: one rounding, ties to even, saturating at FP8_MAX; NaN is 0x7f. FNUZ formats have an exponent
    bias larger by one, and 0x80 is their NaN instead of -0."""
    E5M2: tl.constexpr = FP8_MAX > 448
    if NATIVE:
        code = tl.inline_asm_elementwise(
            _CVT_E5M2 if E5M2 else _CVT_E4M3, "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        SHIFT: tl.constexpr = 21 if E5M2 else 20  # mantissa bits that FP8 lacks
        MIN_EXPONENT: tl.constexpr = (-14 if E5M2 else -6) - (1 if FNUZ else 0)  # of a normal FP8 number
        # The bits of FP8_MAX, one of four.
        MAX_BITS: tl.constexpr = (
            0x47600000 if E5M2 else 0x43E00000 if FP8_MAX == 448 else 0x43700000 if FP8_MAX == 240 else 0x43600000
        )
        bits = _bits(x)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, MAX_BITS)
        normal = (magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)) >> SHIFT
        normal -= (127 + MIN_EXPONENT - 1) << (23 - SHIFT)
        # Added to the power of two whose last bit is the smallest subnormal, a value rounds to a multiple of it.
        MAGIC_BITS: tl.constexpr = (127 + MIN_EXPONENT + SHIFT) << 23
        subnormal = _bits(_float(magnitude) + _float(tl.full(x.shape, MAGIC_BITS, tl.int32))) - MAGIC_BITS
        code = tl.where(magnitude < ((127 + MIN_EXPONENT) << 23), subnormal, normal)
        sign = (bits >> 24) & 0x80
        code |= tl.where(code == 0, 0, sign) if FNUZ else sign
        code = tl.where(x == x, code, 0x80 if FNUZ else 0x7F).to(tl.uint8)
    return code


@triton.jit
def _decode(code, E5M2: tl.constexpr, FNUZ: tl.constexpr):
    """FP8 code -> fp32, exact."""
    code = code.to(tl.int32)
    if FNUZ:  # as e4m3 below, with biases of their own and one NaN
        magnitude = _float((code & 0x7F) << (21 if E5M2 else 20)) * (2.0**111 if E5M2 else 2.0**119)
        value = _float(tl.where(code == 0x80, _NAN_BITS, _bits(magnitude) | ((code & 0x80) << 24)))
    elif E5M2:  # the upper half of an fp16
        value = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # the fields of an fp32 whose exponent is too small by the difference of the biases
        magnitude = _float((code & 0x7F) << 20) * 2.0**120
        value = _float(tl.where((code & 0x7F) == 0x7F, _NAN_BITS, _bits(magnitude) | ((code & 0x80) << 24)))
    return value


# Places.


@triton.jit
def _program(split, tiles_n, tiles_k, R: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr):
    """What this program works on: (expert, first group row, first group column, first piece), in 64 bits.

    Counted from the end: a cast that follows the pass over the amax then starts on what that pass read last
    and the cache still holds.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = program // split
    group_n = (tile // tiles_k % tiles_n).to(tl.int64) * (1 if SHARED else R)
    group_k = (tile % tiles_k).to(tl.int64) * G
    unit = (tile // tiles_k // tiles_n).to(tl.int64)
    return unit, group_n, group_k, program % split


@triton.jit
def _groups(group_n, group_k, grid_n, grid_k, R: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr):
    """Group rows `[R or 1, 1, 1]` and columns `[1, G, 1]` of a tile, and which of them exist."""
    group_n = group_n + tl.arange(0, 1 if SHARED else R)[:, None, None]
    group_k = group_k + tl.arange(0, G)[None, :, None]
    return group_n, group_k, (group_n < grid_n) & (group_k < grid_k)


@triton.jit
def _elements(
    group_n, group_k, piece, dims, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """Rows `[R, 1, 1]` and columns `[1, G, C]` of a piece of a tile, and which lie in the weight and the group."""
    num_rows, num_cols, block_n, block_k, pieces_k = dims
    r = (piece // pieces_k).to(tl.int64) * R + tl.arange(0, R)[:, None, None]
    c = (piece % pieces_k).to(tl.int64) * C + tl.arange(0, C)[None, None, :]
    g = group_k + tl.arange(0, G)[None, :, None]
    if SHARED:
        row = group_n * block_n + r
        mask = (row < num_rows) & (r < block_n)
    else:
        row = group_n + r
        mask = row < num_rows
    col = g * block_k + c
    return row, col, mask & (c < block_k) & (col < num_cols)


@triton.jit
def _group_max(bits, SHARED: tl.constexpr):
    """Maxima of the groups of a tile: `[R, G, C]` -> `[R or 1, G, 1]`; not by `tl.max`, which widens 16 bits."""
    bits = tl.reduce(bits, 2, tl.standard._elementwise_max, keep_dims=True)
    if SHARED:
        bits = tl.reduce(bits, 0, tl.standard._elementwise_max, keep_dims=True)
    return bits


# Kernels. Sizes that only bound loops and masks are not specialized, so that new shapes rarely compile anew;
# `num_cols`, `block_k` and the strides of the elements are, because vector access needs to know them aligned. What a
# program's number is divided by is where it is 1, since a division would be the first thing that every program waits
# for.

_PLAIN = ["num_rows", "grid_n", "grid_k", "block_n", "pieces"]
_DIVISORS = ["tiles_n", "tiles_k", "pieces_k", "split"]
_SCALE_STRIDES = ["s_stride_e", "s_stride_n", "s_stride_k"]
_AMAX_STRIDES = ["a_stride_e", "a_stride_n", "a_stride_k"]


@triton.jit(do_not_specialize=_PLAIN + _AMAX_STRIDES, do_not_specialize_on_alignment=_DIVISORS)
def _amax_kernel(
    w, amax,
    num_rows, num_cols, grid_n, grid_k, block_n, block_k, tiles_n, tiles_k, pieces, pieces_k, split,
    w_stride_e, w_stride_n, w_stride_k, a_stride_e, a_stride_n, a_stride_k,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Amax of each group, or with `split` > 1 of every `split`-th piece of it: `amax` is `[E, SN, SK * split]`."""
    unit, group_n, group_k, first = _program(split, tiles_n, tiles_k, R, G, SHARED)
    dims = (num_rows, num_cols, block_n, block_k, pieces_k)
    w += unit * w_stride_e
    bits = _abs_bits(tl.zeros((R, G, C), w.dtype.element_ty))
    for piece in range(first, pieces, split):
        row, col, mask = _elements(group_n, group_k, piece, dims, R, G, C, SHARED)
        bits = tl.maximum(bits, _abs_bits(tl.load(w + row * w_stride_n + col * w_stride_k, mask=mask, other=0.0)))
    value = _from_abs_bits(_group_max(bits, SHARED), w.dtype.element_ty)
    row, col, mask = _groups(group_n, group_k, grid_n, grid_k, R, G, SHARED)
    pointers = amax + unit * a_stride_e + row * a_stride_n + (col * split + first) * a_stride_k
    if ACCUMULATE:
        value = _from_abs_bits(tl.maximum(_bits(value), _abs_bits(tl.load(pointers, mask=mask, other=0.0))), tl.float32)
    tl.store(pointers, value, mask=mask)


@triton.jit(do_not_specialize=_PLAIN + _AMAX_STRIDES, do_not_specialize_on_alignment=_DIVISORS)
def _copy_amax_kernel(
    w, out, amax,
    num_rows, num_cols, grid_n, grid_k, block_n, block_k, tiles_n, tiles_k, pieces, pieces_k, split,
    w_stride_e, w_stride_n, w_stride_k, o_stride_e, o_stride_n, o_stride_k, a_stride_e, a_stride_n, a_stride_k,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Copy a piece, and raise the amaxes, here int32: an atomic maximum of bit patterns, the same in any order."""
    unit, group_n, group_k, piece = _program(split, tiles_n, tiles_k, R, G, SHARED)
    dims = (num_rows, num_cols, block_n, block_k, pieces_k)
    row, col, mask = _elements(group_n, group_k, piece, dims, R, G, C, SHARED)
    x = tl.load(w + unit * w_stride_e + row * w_stride_n + col * w_stride_k, mask=mask, other=0.0)
    tl.store(out + unit * o_stride_e + row * o_stride_n + col * o_stride_k, x, mask=mask)
    value = _bits(_from_abs_bits(_group_max(_abs_bits(x), SHARED), w.dtype.element_ty))
    row, col, mask = _groups(group_n, group_k, grid_n, grid_k, R, G, SHARED)
    tl.atomic_max(amax + unit * a_stride_e + row * a_stride_n + col * a_stride_k, value, mask=mask, sem="relaxed")


@triton.jit(
    do_not_specialize=_PLAIN + _AMAX_STRIDES + _SCALE_STRIDES + ["num_partials"],
    do_not_specialize_on_alignment=_DIVISORS,
)
def _quantize_kernel(
    w, amax, q, scale,
    num_rows, num_cols, grid_n, grid_k, block_n, block_k, tiles_n, tiles_k, pieces, pieces_k, split,
    w_stride_e, w_stride_n, w_stride_k, a_stride_e, a_stride_n, a_stride_k,
    q_stride_e, q_stride_n, q_stride_k, s_stride_e, s_stride_n, s_stride_k, num_partials,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr,
    PARTIALS: tl.constexpr, LOOP: tl.constexpr, BOUNDED: tl.constexpr,
    FP8_MAX: tl.constexpr, MIN_AMAX: tl.constexpr, MIN_SCALE: tl.constexpr, RECIPROCAL_MAX: tl.constexpr,
    RECIPROCAL: tl.constexpr, FNUZ: tl.constexpr, POW2: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Codes and scales. The amaxes are found here where PARTIALS is 0, else the maximum of `num_partials` of `amax`."""
    SHORT: tl.constexpr = w.dtype.element_ty != tl.float32
    unit, group_n, group_k, first = _program(split, tiles_n, tiles_k, R, G, SHARED)
    dims = (num_rows, num_cols, block_n, block_k, pieces_k)
    w += unit * w_stride_e
    q += unit * q_stride_e
    row, col, mask = _elements(group_n, group_k, first, dims, R, G, C, SHARED)
    x = tl.load(w + row * w_stride_n + col * w_stride_k, mask=mask, other=0.0)

    g_row, g_col, g_mask = _groups(group_n, group_k, grid_n, grid_k, R, G, SHARED)
    if PARTIALS > 0:
        p = tl.arange(0, PARTIALS)[None, None, :]
        pointers = amax + unit * a_stride_e + g_row * a_stride_n + (g_col * num_partials + p) * a_stride_k
        group_amax = tl.load(pointers, mask=g_mask & (p < num_partials), other=0.0)
        if PARTIALS > 1:
            group_amax = _float(tl.max(_bits(group_amax), axis=2, keep_dims=True))
    else:
        bits = _abs_bits(x)
        if LOOP:
            for piece in range(1, pieces):
                row_i, col_i, mask_i = _elements(group_n, group_k, piece, dims, R, G, C, SHARED)
                x_i = tl.load(w + row_i * w_stride_n + col_i * w_stride_k, mask=mask_i, other=0.0)
                bits = tl.maximum(bits, _abs_bits(x_i))
        group_amax = _from_abs_bits(_group_max(bits, SHARED), w.dtype.element_ty)

    stored, group_scale = _scale_from_amax(
        group_amax, scale.dtype.element_ty, FP8_MAX, MIN_AMAX, MIN_SCALE, RECIPROCAL_MAX, POW2
    )
    if first == 0:
        tl.store(scale + unit * s_stride_e + g_row * s_stride_n + g_col * s_stride_k, stored, mask=g_mask)

    code = _encode(_divide(_widen(x), group_scale, SHORT, RECIPROCAL, BOUNDED), FP8_MAX, FNUZ, NATIVE)
    tl.store(q + row * q_stride_n + col * q_stride_k, code, mask=mask)
    if LOOP:  # a second read of the group, small enough for the L2 cache to serve it
        for piece in range(1, pieces):
            row_i, col_i, mask_i = _elements(group_n, group_k, piece, dims, R, G, C, SHARED)
            x_i = tl.load(w + row_i * w_stride_n + col_i * w_stride_k, mask=mask_i, other=0.0)
            code_i = _encode(_divide(_widen(x_i), group_scale, SHORT, RECIPROCAL, BOUNDED), FP8_MAX, FNUZ, NATIVE)
            tl.store(q + row_i * q_stride_n + col_i * q_stride_k, code_i, mask=mask_i)


@triton.jit(do_not_specialize=_PLAIN + _SCALE_STRIDES, do_not_specialize_on_alignment=_DIVISORS)
def _dequantize_kernel(
    q, scale, w,
    num_rows, num_cols, grid_n, grid_k, block_n, block_k, tiles_n, tiles_k, pieces, pieces_k, split,
    q_stride_e, q_stride_n, q_stride_k, s_stride_e, s_stride_n, s_stride_k, w_stride_e, w_stride_n, w_stride_k,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr,
    E5M2: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """`q * scale`, rounded to the dtype of `w`."""
    unit, group_n, group_k, piece = _program(split, tiles_n, tiles_k, R, G, SHARED)
    dims = (num_rows, num_cols, block_n, block_k, pieces_k)
    row, col, mask = _elements(group_n, group_k, piece, dims, R, G, C, SHARED)
    g_row, g_col, g_mask = _groups(group_n, group_k, grid_n, grid_k, R, G, SHARED)
    code = tl.load(q + unit * q_stride_e + row * q_stride_n + col * q_stride_k, mask=mask, other=0)
    group_scale = _load_scale(scale + unit * s_stride_e + g_row * s_stride_n + g_col * s_stride_k, g_mask)
    value = _round(_decode(code, E5M2, FNUZ) * group_scale, w.dtype.element_ty)
    tl.store(w + unit * w_stride_e + row * w_stride_n + col * w_stride_k, value, mask=mask)


# Launchers.

_LARGEST_ROW = 8192  # elements of a group of one row that one program holds, and so reads once
_LARGEST_BLOCK = 16384  # of another: 128 x 128
_LARGE_GROUP = 1 << 16  # elements; from here on a second launch costs less than one program working alone
_FULL_GPU = 2048  # programs that keep the largest GPU busy to the end
_MAX_PARTIALS = 512  # 2 KB that each program of the cast reads beside its tile


class _Work(NamedTuple):
    """What a program should have to do, in elements; a thread takes at most 128 of them."""

    tile: int
    per_warp: int


_QUANTIZE = _Work(4096, 1024)
_AMAX = _Work(8192, 1024)
_DEQUANTIZE = _Work(4096, 2048)


class _Tiling(NamedTuple):
    """How programs cover a weight."""

    sizes: tuple[int, ...]  # num_rows ... pieces_k, as every kernel takes them
    shape: dict[str, int | bool]  # R, G, C, SHARED, num_warps
    num_tiles: int  # an expert
    pieces: int  # a tile


@lru_cache(maxsize=4096)
def _tiling(num_rows, num_cols, block_n, block_k, in_one, k_contiguous, work):
    """Tiles for a weight whose groups have that extent.

    Args:
        in_one: the programs find the amax, so that one of them should hold the whole of a group.
        k_contiguous: neighbours along K are neighbours in memory.
        work: what a program has to do; more where it holds a large group.
    """
    grid_n, grid_k = grid(num_rows, num_cols, block_n, block_k)
    block_n = max(num_rows if block_n == WHOLE else min(block_n, num_rows), 1)
    block_k = max(num_cols if block_k == WHOLE else min(block_k, num_cols), 1)
    shared = block_n > 1
    rows, cols = triton.next_power_of_2(block_n), triton.next_power_of_2(block_k)
    held = in_one and rows * cols <= (_LARGEST_BLOCK if shared else _LARGEST_ROW)
    # Groups of one row that are found in pieces take one row a program: as many programs as there are rows.
    height = block_n if shared else num_rows if held or not in_one else 1
    if not held:  # long runs along K, or square tiles where memory runs the other way
        cols = _extent(block_k, max(work.tile // triton.next_power_of_2(height), 1024 if k_contiguous else 64), 64)
        rows = _extent(block_n, max(work.tile // cols, 1), 64)
    pieces_k = -(-block_k // cols)
    pieces = -(-block_n // rows) * pieces_k
    groups = _extent(grid_k, max(work.tile // (rows * cols), 1)) if pieces == 1 else 1
    if not shared:
        rows = _extent(height, max(work.tile // (groups * cols), 1))
    rows = max(rows, 4 // (groups * cols))  # `_encode` converts four codes at a time
    tiles_n, tiles_k = grid_n if shared else -(-grid_n // rows), -(-grid_k // groups)
    elements = rows * groups * cols
    # Few warps for a large block: with more, too few blocks fit on a processor.
    num_warps = 4 if elements > _LARGEST_ROW else max(elements // work.per_warp, 1)
    return _Tiling(
        (num_rows, num_cols, grid_n, grid_k, block_n, block_k, tiles_n, tiles_k, pieces, pieces_k),
        {"R": rows, "G": groups, "C": cols, "SHARED": shared, "num_warps": num_warps},
        tiles_n * tiles_k,
        pieces,
    )


def _extent(size, limit, smallest=1):
    """The largest power of two, not above `limit`, that covers `size` with little padding.

    What it may save is an eighth of a tile, and is not worth an extent below `smallest`.
    """
    extent = min(triton.next_power_of_2(max(size, 1)), limit)
    halves = [extent] + [extent >> i for i in (1, 2, 3) if extent >> i >= smallest]
    padded = [-(-size // half) * half for half in halves]
    return next(half for half, total in zip(halves, padded, strict=True) if total <= 1.07 * min(padded))


def _programs_a_group(tiling, num_groups):
    """How many programs share a group when they find its amax."""
    block_n, block_k = tiling.sizes[4:6]
    if block_n * block_k <= _LARGE_GROUP or num_groups >= _FULL_GPU:
        return 1
    return min(tiling.pieces, _MAX_PARTIALS, -(-_FULL_GPU // num_groups))


def _extents(w, block_n, block_k, *others):
    """(rows, columns) of the weights: whole ones that are dense in memory count as one long row."""
    num_rows, num_cols = w.shape[1:]
    if block_n == block_k == WHOLE and all(t.stride(1) == num_cols and t.stride(2) == 1 for t in (w, *others)):
        return 1, num_rows * num_cols
    return num_rows, num_cols


def _launch(kernel, num_programs, w, *args, **constants):
    """Launch on the device of `w` and its current stream."""
    with torch.cuda.device_of(w):
        kernel[(num_programs,)](*args, **constants)


@lru_cache
def _converts_fp8(device):
    """Whether the device has the FP8 conversions of `_encode`."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_out(w, amax, q, scale, block_n, block_k, pow2, numerics):
    """Write codes and scales of `w`; see `ops.quantize`.

    One launch; two, the first for the amax, where that is not given and the groups are too large for one
    program each.
    """
    if scale.numel() == 0:
        return
    extents = *_extents(w, block_n, block_k, q), block_n, block_k
    bounded = amax is None
    num_partials = 1
    if amax is None:
        tiling = _tiling(*extents, True, w.stride(2) == 1, _AMAX)
        num_partials = _programs_a_group(tiling, scale.numel())
        if num_partials > 1:
            _, grid_n, grid_k = scale.shape
            amax = torch.empty((len(w), grid_n, grid_k * num_partials), dtype=torch.float32, device=w.device)
            _launch_amax(w, amax, tiling, num_partials, accumulate=False)
    tiling = _tiling(*extents, amax is None, w.stride(2) == 1, _QUANTIZE)
    split = 1 if amax is None else tiling.pieces
    codes = q.view(torch.uint8)
    stored = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    used = rule(q.dtype, numerics, block_n, block_k)
    found = w if amax is None else amax  # a tensor must stand in the place of one that is not read
    _launch(
        _quantize_kernel, len(w) * tiling.num_tiles * split, w,
        w, found, codes, stored, *tiling.sizes, split,
        *w.stride(), *found.stride(), *q.stride(), *scale.stride(), num_partials,
        PARTIALS=0 if amax is None else triton.next_power_of_2(num_partials),
        LOOP=amax is None and tiling.pieces > 1, BOUNDED=bounded,
        FP8_MAX=used.fp8_max, MIN_AMAX=used.min_amax, MIN_SCALE=used.min_scale, RECIPROCAL_MAX=used.reciprocal_max,
        RECIPROCAL=used.reciprocal, FNUZ=q.dtype in FNUZ, POW2=pow2,
        NATIVE=q.dtype not in FNUZ and _converts_fp8(w.device), **tiling.shape,
    )  # fmt: skip


def amax_out(w, amax, block_n, block_k, accumulate):
    """Write, or accumulate, the amax of each group; see `ops.amax`.

    One launch; a second one where several programs share a group.
    """
    if amax.numel() == 0:
        return
    tiling = _tiling(*_extents(w, block_n, block_k), block_n, block_k, True, w.stride(2) == 1, _AMAX)
    num_partials = _programs_a_group(tiling, amax.numel())
    if num_partials > 1:
        _, grid_n, grid_k = amax.shape
        partials = torch.empty((len(w), grid_n, grid_k * num_partials), dtype=torch.float32, device=w.device)
        _launch_amax(w, partials, tiling, num_partials, accumulate=False)
        amax_out(partials, amax, 1, num_partials, accumulate)
    else:
        _launch_amax(w, amax, tiling, 1, accumulate)


def quantize_many_out(w, q, scale, *args):
    """Write codes and scales of each weight, one after the other; see `ops.quantize_many`."""
    for w_, q_, scale_ in zip(w, q, scale, strict=True):
        quantize_out(w_, None, q_, scale_, *args)


def copy_amax_out(w, out, amax, block_n, block_k):
    """Copy `w` and raise the amax of each group to its maximum, in one launch; see `ops.copy_amax`."""
    if w.numel() == 0:
        return
    tiling = _tiling(*_extents(w, block_n, block_k, out), block_n, block_k, False, w.stride(2) == 1, _AMAX)
    _launch(
        _copy_amax_kernel, len(w) * tiling.num_tiles * tiling.pieces, w,
        w, out, amax.view(torch.int32), *tiling.sizes, tiling.pieces,
        *w.stride(), *out.stride(), *amax.stride(), **tiling.shape,
    )  # fmt: skip


def _launch_amax(w, amax, tiling, split, accumulate):
    """Amaxes of every `split`-th piece of the groups: `amax` is `[E, SN, SK * split]`."""
    _launch(
        _amax_kernel, len(w) * tiling.num_tiles * split, w,
        w, amax, *tiling.sizes, split, *w.stride(), *amax.stride(), ACCUMULATE=accumulate, **tiling.shape,
    )  # fmt: skip


def dequantize_out(q, scale, w, block_n, block_k):
    """Write `q * scale`; see `ops.dequantize`."""
    if q.numel() == 0:
        return
    tiling = _tiling(*_extents(q, block_n, block_k, w), block_n, block_k, False, q.stride(2) == 1, _DEQUANTIZE)
    codes = q.view(torch.uint8)
    stored = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    _launch(
        _dequantize_kernel, len(q) * tiling.num_tiles * tiling.pieces, q,
        codes, stored, w, *tiling.sizes, tiling.pieces, *q.stride(), *scale.stride(), *w.stride(),
        E5M2=q.dtype in (torch.float8_e5m2, torch.float8_e5m2fnuz), FNUZ=q.dtype in FNUZ, **tiling.shape,
    )  # fmt: skip
