"""The Triton kernels, run by Triton's interpreter on CPU tensors, against the reference: every byte.

Not collected with the other tests: TRITON_INTERPRET must be set before Triton is imported, and an interpreted
kernel cannot be compiled any more. `test_triton_kernels.py` runs this file in a process of its own; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py
"""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy: overflow and NaN are meant
]

np = pytest.importorskip("numpy")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from fp8_kernels import reference, triton_kernels  # noqa: E402
from fp8_kernels.schemes import WHOLE, grid  # noqa: E402
from fp8_kernels.testing import assert_same_bits  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALL_FP8 = tuple(reference.FP8_MAX)
FP8 = ALL_FP8[:2]
# The schemes; edges that are partial everywhere; tall groups; a group larger than the weight.
BLOCKS = [(WHOLE, WHOLE), (1, WHOLE), (128, 128), (1, 128), (1, 32), (3, 5), (WHOLE, 4), (2, WHOLE), (1, 1), (64, 999)]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def faithful_interpreter(monkeypatch):
    """Correct the interpreter in two places: a fused multiply-add rounds once, as on every GPU, where it rounds
    the product as well; and bounds of loops become Python ints in a way that numpy 2.4 still allows. Calls
    between our functions skip a preparation of the language that the launch has made, a third of all time."""

    def create_fma(self, x, y, z):
        x, y, z = (np.asarray(v.data, dtype=np.float64) for v in (x, y, z))
        with np.errstate(all="ignore"):
            product = x * y  # exact in float64
            total = product + z
            carried = total - product
            error = (product - (total - carried)) + (z - carried)  # exact (Knuth's TwoSum)
            # Rounded to odd, the sum in float64 rounds to fp32 like the exact one.
            even = total.view(np.int64) & 1 == 0
            inexact = np.isfinite(total) & (error != 0)
            total = np.where(even & inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
            return interpreter.TensorHandle(total.astype(np.float32), tl.float32)

    def patch_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def call(self, *args, **kwargs):
        ours = self.fn.__module__ in (__name__, triton_kernels.__name__)
        return self.rewrite()(*args, **kwargs) if ours else original_call(self, *args, **kwargs)

    original, original_call = interpreter._patch_lang_tensor, interpreter.InterpretedFunction.__call__
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


def check_quantize(
    w, fp8_dtype, block_n, block_k, pow2=False, scale_dtype=torch.float32, amax=None, q=None, numerics=0
):
    arguments = (block_n, block_k, pow2, scale_dtype, amax, numerics)
    wanted_q, wanted_scale = reference.quantize(w, fp8_dtype, *arguments)
    q = torch.empty(w.shape, dtype=fp8_dtype) if q is None else q
    scale = torch.empty_like(wanted_scale)
    triton_kernels.quantize_out(w, amax, q, scale, block_n, block_k, pow2, numerics)
    assert_same_bits(scale, wanted_scale, "scale")
    assert_same_bits(q, wanted_q, "q")


def check_amax(w, block_n, block_k):
    wanted = reference.amax(w, block_n, block_k)
    amax = torch.full_like(wanted, -1.0)
    triton_kernels.amax_out(w, amax, block_n, block_k, False)
    assert_same_bits(amax, wanted, "amax")
    copied, slot = torch.empty_like(w), torch.where(torch.rand(wanted.shape) < 0.5, 0.0, 3.0)
    want_slot = reference.canonical_nan(slot.maximum(wanted))
    triton_kernels.copy_amax_out(w, copied, slot, block_n, block_k)
    assert_same_bits(slot, want_slot, "slot")
    assert_same_bits(copied, w, "copy")


def check_dequantize(q, scale, dtype, block_n, block_k, w=None):
    w = torch.empty(q.shape, dtype=dtype) if w is None else w
    triton_kernels.dequantize_out(q, scale, w, block_n, block_k)
    assert_same_bits(w, reference.dequantize(q, scale, dtype, block_n, block_k), "w")


def weight(*shape, dtype=torch.bfloat16):
    """Values over many binades, so that codes of all exponents occur."""
    return (torch.randn(shape) * torch.logspace(-4, 4, shape[-1] or 1)[: shape[-1]]).to(dtype)


# Every rule of the definition.


@pytest.mark.parametrize("dtype, fp8_dtype", list(zip(DTYPES, (FP8[0], FP8[1], FP8[0]), strict=True)))
@pytest.mark.parametrize("block_n, block_k", BLOCKS)
def test_every_scheme_and_dtype(block_n, block_k, dtype, fp8_dtype):
    """Codes, scales, amaxes and the way back, on sizes that no tile divides."""
    w = weight(2, 5, 150, dtype=dtype)
    check_quantize(w, fp8_dtype, block_n, block_k)
    check_amax(w, block_n, block_k)
    q, scale = reference.quantize(w, fp8_dtype, block_n, block_k)
    check_dequantize(q, scale, dtype, block_n, block_k)


@pytest.mark.parametrize(
    "pow2, scale_dtype", [(True, torch.float32), (True, torch.float8_e8m0fnu), (False, torch.bfloat16)]
)
@pytest.mark.parametrize("block_n, block_k", [(1, 32), (1, WHOLE), (WHOLE, WHOLE), (16, 16)])
def test_every_kind_of_scale(block_n, block_k, pow2, scale_dtype):
    """Powers of two, e8m0 and bf16 scales, and the weights divided by what was stored."""
    w = weight(1, 17, 70) * torch.logspace(-30, 30, 17)[:, None].bfloat16()
    w[0, 3] = 0
    w[0, 5, 7], w[0, 6, 8] = NAN, -INF
    for fp8_dtype in FP8:
        check_quantize(w, fp8_dtype, block_n, block_k, pow2, scale_dtype)
        q, scale = reference.quantize(w, fp8_dtype, block_n, block_k, pow2, scale_dtype)
        check_dequantize(q, scale, torch.bfloat16, block_n, block_k)


# One row each, so that no value hides another: ordinary, zeros, one huge value, every kind of non-finite value
# alone and beside others, subnormals of each dtype, and amaxes near the floor of the scale and at both ends.
SPECIAL = [
    [1.0, -2.0, 0.0, -0.0],
    [0.0, -0.0, 0.0, -0.0],
    [3.0e38, 1.0, -1.0, 1e-38],
    [65504.0, -6e-8, 6e-5, -0.0],
    [NAN, 1.0, -1.0, 0.0],
    [-NAN, INF, -0.0, 1.0],
    [INF, 1.0, -1.0, -0.0],
    [-INF, INF, 3.0e38, -3.0e38],
    [1e-45, -1e-45, 0.0, -0.0],
    [1e-40, -3e-41, 1e-42, -1e-45],
    [5.0e-36, 5.2e-36, -1e-36, 1e-39],
    [2.0**-126 * 448, 2.0**-126 * 17, -(2.0**-126) * 0.9375, 2.0**-149],
]


@pytest.mark.parametrize("fp8_dtype", FP8)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, fp8_dtype):
    """Zeros keep their signs, subnormals are not flushed, NaN and Inf follow IEEE and every NaN is canonical."""
    w = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype).unsqueeze(0)
    for block_n, block_k in [(1, WHOLE), (1, 2), (1, 1), (WHOLE, WHOLE), (4, 1)]:
        for pow2 in (False, True):
            check_quantize(w, fp8_dtype, block_n, block_k, pow2)
        check_amax(w, block_n, block_k)


@pytest.mark.parametrize("fp8_dtype", FP8)
@pytest.mark.parametrize("pow2", [False, True])
def test_amax_from_outside(fp8_dtype, pow2):
    """Any amax may be given: too small a one saturates, and none makes a NaN out of what IEEE divides."""
    amaxes = torch.tensor([0.0, 1e-45, 1e-38, 1e-6, 1.0, 448.0, 3.4e38, INF, NAN, -NAN, 57344.0, 5e-36])
    w = torch.tensor(SPECIAL, dtype=torch.float32).repeat(1, len(amaxes)).unsqueeze(0)
    amax = amaxes.repeat_interleave(4).expand(1, len(SPECIAL), -1)
    check_quantize(w, fp8_dtype, 1, 1, pow2, amax=amax)
    for value in amaxes.tolist():
        check_quantize(w, fp8_dtype, WHOLE, WHOLE, pow2, amax=torch.full((1, 1, 1), value))


@pytest.mark.parametrize("block_n, block_k", BLOCKS)
def test_given_amax_equals_found_amax(block_n, block_k):
    """The cast alone, after the amax alone, is the whole."""
    w = weight(2, 5, 150)
    amax = torch.empty(2, *grid(5, 150, block_n, block_k))
    triton_kernels.amax_out(w, amax, block_n, block_k, False)
    check_quantize(w, torch.float8_e4m3fn, block_n, block_k, amax=amax)


@pytest.mark.parametrize("block_n, block_k", [(WHOLE, WHOLE), (1, WHOLE), (1, 32), (16, 16)])
def test_amax_accumulates_over_shards(block_n, block_k):
    """The maximum over shards is that of their union; a NaN, once seen, stays, and stays canonical."""
    shards = [weight(2, 16, 64) for _ in range(3)]
    shards[1][0, 1, 2] = -NAN
    amax = torch.zeros(2, *grid(16, 64, block_n, block_k))
    for count, shard in enumerate(shards, start=1):
        triton_kernels.amax_out(shard, amax, block_n, block_k, True)
        each = torch.stack([reference.amax(s, block_n, block_k) for s in shards[:count]])
        assert_same_bits(amax, torch.where(each.isnan().any(0), NAN, each.amax(0)), "amax")


def test_dequantize_every_code_by_every_kind_of_scale():
    """All 256 codes times scales that make zeros, subnormals, overflows, Inf and NaN, rounded once."""
    scales = torch.tensor([0.0, 1.0, -1.0, 1e-45, 2.0**-126, 3e-39, 1.1, 0.3, 150.0, 7e35, 3e38, INF, -INF, NAN, -NAN])
    codes = torch.arange(256, dtype=torch.uint8).expand(1, len(scales), 256).contiguous()
    for fp8_dtype in FP8:
        for dtype in DTYPES:
            check_dequantize(codes.view(fp8_dtype), scales[None, :, None], dtype, 1, WHOLE)
            check_dequantize(codes.view(fp8_dtype), scales[None, :, None].bfloat16(), dtype, 1, WHOLE)
    every_e8m0 = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).view(torch.float8_e8m0fnu)
    for dtype in (torch.float32, torch.bfloat16):
        check_dequantize(torch.full((1, 3, 256), 1.5).to(FP8[0]), every_e8m0.expand(1, 3, 256), dtype, 1, 1)


# Sizes: every way of cutting a weight into tiles.

# One element; what tiles divide and what they just miss; SmolLM2's width; a long row; a tall column; many experts.
SHAPES = [(1, 1, 1), (1, 7, 16), (1, 3, 1025), (1, 33, 576), (1, 2, 20001), (1, 20001, 1), (9, 3, 40)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_n, block_k", [(WHOLE, WHOLE), (1, WHOLE), (128, 128), (1, 128)])
def test_shapes(shape, block_n, block_k):
    """One tile or many, one piece of a group or several."""
    if shape[1] > 20000 and block_n == 128:
        shape = (1, 1025, 1)  # as many programs as 128-blocks: fewer show the same
    w = weight(*shape)
    check_quantize(w, torch.float8_e4m3fn, block_n, block_k)
    check_amax(w, block_n, block_k)
    q, scale = reference.quantize(w, torch.float8_e4m3fn, block_n, block_k)
    check_dequantize(q, scale, torch.bfloat16, block_n, block_k)


@pytest.mark.parametrize("block_n, block_k", [(WHOLE, WHOLE), (1, WHOLE), (1, 32), (16, 32)])
@pytest.mark.parametrize("fp8_dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_numerics_of_vllm(block_n, block_k, fp8_dtype):
    """Each rule that it has, with zeros, values below each of its floors, and NaN and Inf."""
    w = weight(2, 40, 96)
    for factor, dtype in [(1, torch.bfloat16), (1e-9, torch.float32), (1e-36, torch.bfloat16), (0, torch.float32)]:
        check_quantize((w.float() * factor).to(dtype), fp8_dtype, block_n, block_k, numerics=1)
    w[0, 3, 7], w[1, 2, 5] = NAN, INF
    check_quantize(w, fp8_dtype, block_n, block_k, numerics=1)


@pytest.mark.parametrize("shape", [(2, 0, 7), (0, 5, 7), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("block_n, block_k", BLOCKS)
def test_no_elements(shape, block_n, block_k):
    """Groups without elements have the scale of zeros; weights without groups are left alone."""
    w = torch.zeros(shape, dtype=torch.bfloat16)
    check_amax(w, block_n, block_k)
    groups = torch.zeros(shape[0], *grid(*shape[1:], block_n, block_k))
    scale = torch.empty_like(groups)
    triton_kernels.quantize_out(w, None, torch.empty(shape, dtype=FP8[0]), scale, block_n, block_k, False, 0)
    assert_same_bits(scale, reference.scale_from_amax(groups, reference.rule(FP8[0]), False), "scale")
    triton_kernels.dequantize_out(torch.empty(shape, dtype=FP8[0]), scale, w, block_n, block_k)


@pytest.mark.parametrize("block_n, block_k", [(WHOLE, WHOLE), (300, 300), (1, WHOLE), (WHOLE, 150)])
@pytest.mark.parametrize("strided", [False, True])
def test_large_groups(block_n, block_k, strided):
    """Groups of more than 2^16 elements are shared by several programs; smaller ones read in several pieces."""
    w = weight(1, 70000 // 257, 2 * 257 if strided else 257)[..., :: 2 if strided else 1]
    if block_n == 1:
        w = weight(1, 2, 70001 * (1 + strided))[..., :: 1 + strided]
    w[0, -1, -1] = 3e4  # the amax, in the very last piece
    check_quantize(w, torch.float8_e4m3fn, block_n, block_k)
    check_amax(w, block_n, block_k)
    accumulated = torch.full((1, *grid(*w.shape[1:], block_n, block_k)), 1e4)
    triton_kernels.amax_out(w, accumulated, block_n, block_k, True)
    assert_same_bits(accumulated, reference.amax(w, block_n, block_k).clamp(min=1e4), "amax")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 80)),
    block=st.tuples(st.sampled_from([WHOLE, 1, 2, 3, 16, 31]), st.sampled_from([WHOLE, 1, 2, 7, 32, 64])),
    dtype=st.sampled_from(DTYPES),
    step=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    offset=st.integers(0, 9),
    transposed=st.booleans(),
)
def test_any_rectangle_of_any_view(shape, block, dtype, step, offset, transposed):
    """Whatever the block, the strides and the alignment."""
    num_units, num_rows, num_cols = shape
    extents = num_rows * step[0], num_cols * step[1]
    buffer = weight(num_units * extents[0] * extents[1] + offset, dtype=dtype)[offset:]
    w = buffer.view(num_units, *(reversed(extents) if transposed else extents))
    w = (w.mT if transposed else w)[:, :: step[0], :: step[1]]
    check_quantize(w, torch.float8_e4m3fn, *block)
    check_amax(w, *block)


# Layouts.


@pytest.mark.parametrize("block_n, block_k", [(WHOLE, WHOLE), (1, WHOLE), (1, 32), (16, 16)])
@pytest.mark.parametrize("offset", [0, 1, 16, 40])
def test_nothing_is_written_beside_the_output(block_n, block_k, offset):
    """Codes and scales go to shifted, strided or transposed views and leave what surrounds them alone."""
    w = weight(2, 9, 45)
    wanted_q, wanted_scale = reference.quantize(w, torch.float8_e4m3fn, block_n, block_k)
    for transposed in (False, True):
        buffer = torch.full((2, 30, 100), 0xA5, dtype=torch.uint8)
        scales = torch.full((2, 30, 100), -7.0)
        q = buffer.mT[:, offset : offset + 45, 3:12].mT if transposed else buffer[:, 3:12, offset : offset + 45]
        scale = scales[:, 5 : 5 + wanted_scale.shape[1], 1 : 1 + 3 * wanted_scale.shape[2] : 3]
        triton_kernels.quantize_out(w, None, q.view(torch.float8_e4m3fn), scale, block_n, block_k, False, 0)
        assert_same_bits(q.view(torch.float8_e4m3fn), wanted_q, "q")
        assert_same_bits(scale, wanted_scale, "scale")
        q.fill_(0xA5)
        scale.fill_(-7.0)
        assert (buffer == 0xA5).all() and (scales == -7.0).all()
        w_buffer = torch.full((2, 30, 100), -7.0, dtype=torch.bfloat16)
        out = w_buffer[:, 3:12, offset : offset + 45]
        check_dequantize(wanted_q, wanted_scale, torch.bfloat16, block_n, block_k, w=out)
        out.fill_(-7.0)
        assert (w_buffer == -7.0).all()


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_offsets_beyond_32_bits(dimension):
    """Strides reach over 2^31 elements along experts, rows or columns. Only the pages touched take memory."""
    far = 2**31 + 8
    strides = [(far, 8, 1), (4, far, 1), (16, 4, far)][dimension]
    shape = [(2, 2, 8), (2, 2, 4), (2, 4, 2)][dimension]
    w = torch.empty(far + 64, dtype=torch.bfloat16).as_strided(shape, strides)
    q = torch.empty(far + 64, dtype=torch.uint8).view(torch.float8_e4m3fn).as_strided(shape, strides)
    w.copy_(weight(*shape))
    for block in [(1, WHOLE), (WHOLE, WHOLE), (2, 2)]:
        check_quantize(w, torch.float8_e4m3fn, *block, q=q)
        scale = reference.quantize(w, torch.float8_e4m3fn, *block)[1]
        check_dequantize(q, scale, torch.float32, *block)


# Numbers, exhaustively.


@triton.jit
def _encode_kernel(x, code, n: tl.constexpr, FP8_MAX: tl.constexpr, FNUZ: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(code + i, triton_kernels._encode(tl.load(x + i), FP8_MAX, FNUZ, False))


@triton.jit
def _divide_kernel(x, scale, out, n: tl.constexpr, SHORT: tl.constexpr, BOUNDED: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, triton_kernels._divide(tl.load(x + i), tl.load(scale + i), SHORT, False, BOUNDED))


@pytest.mark.parametrize("numerics", [0, 1])
@pytest.mark.parametrize("fp8_dtype", ALL_FP8)
def test_integer_encoding_equals_clamp_and_cast(fp8_dtype, numerics):
    """For every bf16, every fp8 value with its neighbours in fp32, every tie, and random fp32 bits."""
    rule = reference.rule(fp8_dtype, numerics)
    if numerics and rule.fp8_max == reference.FP8_MAX[fp8_dtype]:
        return  # the same once more
    every_bf16 = torch.arange(1 << 16, dtype=torch.int32) << 16
    values = torch.arange(256, dtype=torch.uint8).view(fp8_dtype).float()
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, ties, -ties])[:, None].view(torch.int32) + torch.arange(-64, 64, dtype=torch.int32)
    for pattern in (every_bf16, near.flatten()[: 1 << 16], *torch.randint(-(2**31), 2**31, (16, 1 << 16))):
        x = pattern.int()
        x = torch.cat([x, x.new_zeros((1 << 16) - len(x))]).view(torch.float32)
        code = torch.empty(1 << 16, dtype=torch.uint8)
        _encode_kernel[(1,)](x, code, 1 << 16, rule.fp8_max, fp8_dtype in reference.FNUZ)
        wanted = reference.cast(x[None, None], torch.ones(1, 1, 1), fp8_dtype, 1, WHOLE, rule)[0, 0]
        assert_same_bits(code, wanted.view(torch.uint8), "code")


def test_corrected_quotient_is_ieee_division():
    """Every pair of bf16 significands, random fp32 pairs, and scales at both ends of what a scale can be."""
    significands = 1 + torch.arange(128) / 128
    ones = torch.full((1 << 16,), 1.0)
    pairs = [(significands.repeat(128), significands.repeat_interleave(128))]
    for scale_exponent in (0, -126, -125, -100, -61, -60, -59, -30, 30, 100, 115):
        scale = torch.ldexp(ones + torch.rand(1 << 16), torch.tensor(scale_exponent))
        quotient = torch.randn(1 << 16) * torch.exp2(torch.randint(-20, 9, (1 << 16,)).float())
        pairs.append((quotient * scale, scale))
    for x, scale in pairs:
        wanted = x / scale
        for bounded in (False, True):
            out = torch.empty_like(x)
            _divide_kernel[(1,)](x, scale, out, len(x), False, bounded)
            tiny = wanted.abs() < 2.0**-40  # zeros of FP8, of which only the sign matters
            assert_same_bits(torch.where(tiny, torch.copysign(out, wanted), out)[~tiny], wanted[~tiny], "quotient")
            assert torch.equal(out[tiny].signbit(), wanted[tiny].signbit()) and (out[tiny].abs() < 2.0**-39).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_quotients_have_the_codes_of_ieee_division(dtype):
    """Random pairs, and those next to boundaries between codes, over all scales that there are; Inf, NaN and -0 too."""
    n = 1 << 14
    rule = reference.rule(torch.float8_e4m3fn)
    for scale_exponent in (0, -126, -100, -30, 30, 59, 60, 61, 100, 112, 119, None):
        if dtype == torch.float16 and scale_exponent not in (0, None):
            continue  # scales up to 2**7
        scale = torch.ldexp(torch.ones(n) + torch.rand(n), torch.tensor(scale_exponent or 0))
        if scale_exponent is None:
            scale[::2], scale[1::2] = float("inf"), float("nan")
        boundaries = (16 + torch.randint(16, (n,))) / 16.0
        quotient = (
            torch.where(torch.rand(n) < 0.5, boundaries, torch.randn(n)) * torch.randint(-9, 9, (n,)).float().exp2()
        )
        x = (quotient * scale.nan_to_num(1, 1)).to(dtype).float()
        x[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
        out = torch.empty_like(x)
        _divide_kernel[(1,)](x, scale, out, n, True, True)
        ones = torch.ones(1, n, 1)
        codes = [
            reference.cast(t[None, :, None], s[None, :, None], torch.float8_e4m3fn, 1, 1, rule)
            for t, s in ((out, ones[0, :, 0]), (x, scale))
        ]
        assert_same_bits(*codes)
