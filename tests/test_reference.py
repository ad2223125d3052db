"""reference.py against a float64 oracle and against the rules of its docstring, one by one."""

import pytest
import torch

from fp8_kernels import reference
from fp8_kernels.reference import rule
from fp8_kernels.schemes import SCHEMES, WHOLE
from fp8_kernels.testing import bits

FP8 = tuple(reference.FP8_MAX)
MANTISSA_BITS_AND_MIN_EXPONENT = dict(zip(FP8, [(3, -6), (2, -14), (3, -7), (2, -15)], strict=True))
BLOCKS = [(WHOLE, WHOLE), (1, WHOLE), (128, 128), (1, 128), (1, 32), (3, 5), (WHOLE, 4), (2, WHOLE)]


def all_codes(fp8_dtype):
    """Every finite value of an FP8 format, ascending, in float64."""
    values = torch.arange(256, dtype=torch.uint8).view(fp8_dtype).double()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("fp8_dtype", FP8)
def test_cast_is_the_nearest_code_with_ties_to_even(fp8_dtype):
    """Halfway points go to the code whose last bit is 0; everything else to the nearer neighbour."""
    codes = all_codes(fp8_dtype)
    lower, upper = codes[:-1], codes[1:]
    middle = (lower + upper) / 2
    x = torch.cat([codes, middle, torch.lerp(lower, upper, 0.4999), torch.lerp(lower, upper, 0.5001)])
    got = reference.cast(x.float()[None, None], torch.ones(1, 1, 1), fp8_dtype, 1, WHOLE, rule(fp8_dtype))[0, 0]
    distance = (got.double() - x).abs()
    assert torch.equal(distance, (x[:, None] - codes).abs().amin(1))
    ties = got[len(codes) : len(codes) + len(middle)].view(torch.uint8)
    assert (ties & 1 == 0).all()


@pytest.mark.parametrize("fp8_dtype", FP8)
@pytest.mark.parametrize("block_n, block_k", BLOCKS)
def test_error_is_at_most_half_a_unit_in_the_last_place(fp8_dtype, block_n, block_k):
    """|w - q * scale| <= ulp(q) / 2 * scale, in float64, where scale is not rounded up to a floor."""
    w = torch.randn(2, 37, 150) * torch.logspace(-3, 3, 150)
    q, scale = reference.quantize(w, fp8_dtype, block_n, block_k)
    mantissa_bits, min_exponent = MANTISSA_BITS_AND_MIN_EXPONENT[fp8_dtype]
    exponent = q.double().abs().clamp(min=2.0**min_exponent).log2().floor()
    half_ulp = torch.exp2(exponent - mantissa_bits - 1)
    scale = reference._per_element(scale, w.shape, block_n, block_k).double()
    # The quotient was rounded to fp32 before it was rounded to FP8: one part in 2^24 may be added.
    assert ((w.double() - q.double() * scale).abs() <= half_ulp * scale * (1 + 2**-15)).all()


@pytest.mark.parametrize("block_n, block_k", BLOCKS)
def test_each_group_is_scaled_by_its_own_amax(block_n, block_k):
    """Groups cut out and quantized alone give the same codes and scales, partial edges included."""
    w = torch.randn(2, 29, 133)
    q, scale = reference.quantize(w, torch.float8_e4m3fn, block_n, block_k)
    step_n, step_k = (29 if block_n == WHOLE else block_n), (133 if block_k == WHOLE else block_k)
    for e in range(2):
        for i, n in enumerate(range(0, 29, step_n)):
            for j, k in enumerate(range(0, 133, step_k)):
                group = (slice(e, e + 1), slice(n, n + step_n), slice(k, k + step_k))
                alone, alone_scale = reference.quantize(w[group], torch.float8_e4m3fn, WHOLE, WHOLE)
                assert scale[e, i, j] == w[group].abs().max() / 448 == alone_scale
                assert torch.equal(bits(q[group]), bits(alone))


def test_largest_magnitude_becomes_the_largest_code():
    """amax / scale is at most 448 and rounds to it."""
    w = torch.randn(1, 64, 64)
    q, _ = reference.quantize(w, torch.float8_e4m3fn, 1, WHOLE)
    assert (q.float().abs().amax(-1) == 448).all()


def test_zero_groups_have_a_finite_scale_and_zero_codes():
    """The floor is 2^-126: harmless in a maximum of scales, unlike 1."""
    q, scale = reference.quantize(torch.zeros(1, 2, 3), torch.float8_e4m3fn, 1, WHOLE)
    assert (scale == 2.0**-126).all() and (bits(q) == 0).all()


def test_nan_makes_its_group_nan_and_no_other():
    """No NaN is dropped; every NaN written is the canonical one."""
    w = torch.randn(1, 3, 8)
    w[0, 1, 2] = -torch.tensor(float("nan"))
    q, scale = reference.quantize(w, torch.float8_e4m3fn, 1, WHOLE)
    assert (bits(q[0, 1]) == 0x7F).all() and bits(scale)[0, 1, 0] == 0x7FC00000
    assert q[0, [0, 2]].float().isfinite().all() and scale[0, [0, 2]].isfinite().all()


def test_infinity_makes_the_scale_infinite():
    """IEEE: finite / Inf is 0 and Inf / Inf is NaN."""
    w = torch.tensor([[[1.0, float("-inf"), -2.0]]])
    q, scale = reference.quantize(w, torch.float8_e4m3fn, 1, WHOLE)
    assert scale.item() == float("inf")
    assert bits(q).tolist() == [[[0, 0x7F, 0x80]]]


def test_cast_saturates_at_a_given_amax():
    """Values beyond the given amax, Inf too, become the largest code, never NaN."""
    w = torch.tensor([[[1.0, 500.0, -1e30, float("inf")]]])
    q, _ = reference.quantize(w, torch.float8_e4m3fn, 1, WHOLE, amax_in=torch.full((1, 1, 1), 448.0))
    assert q.float().tolist() == [[[1.0, 448.0, -448.0, 448.0]]]


@pytest.mark.parametrize("fp8_dtype", FP8)
def test_pow2_scales_are_rounded_up(fp8_dtype):
    """The smallest power of two that saturates nothing."""
    amax = torch.cat([torch.rand(1000) * 1e4, torch.tensor([448.0, 896.0, 57344.0, 0.0, 1e-44])])
    scale = reference.scale_from_amax(amax, rule(fp8_dtype), pow2=True)
    exact = amax / reference.FP8_MAX[fp8_dtype]
    assert (scale.log2() == scale.log2().round()).all()
    assert (scale >= exact).all() and (scale / 2 < exact.clamp(min=2.0**-126)).all()


def test_e8m0_scales_are_the_pow2_scales():
    """The same value, stored as its biased exponent; non-finite becomes e8m0's NaN."""
    amax = torch.tensor([0.0, 1.0, 448.0, 449.0, 3e38, float("inf"), float("nan")])
    e8m0 = reference.scale_from_amax(amax, rule(torch.float8_e4m3fn), True, torch.float8_e8m0fnu)
    fp32 = reference.scale_from_amax(amax, rule(torch.float8_e4m3fn), True)
    assert torch.equal(e8m0.float()[:5], fp32[:5]) and bits(e8m0)[5:].tolist() == [0xFF, 0xFF]


def test_bf16_scales_are_rounded_before_they_are_used():
    """So that codes belong to the scale that is stored."""
    w = torch.randn(1, 16, 100)
    q, scale = reference.quantize(w, torch.float8_e4m3fn, 1, WHOLE, scale_dtype=torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    assert torch.equal(
        bits(q), bits(reference.cast(w, scale.float(), torch.float8_e4m3fn, 1, WHOLE, rule(torch.float8_e4m3fn)))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_passes_through_bf16(dtype):
    """fp16 and fp32 weights keep the bits that bf16 would lose."""
    w = torch.randn(1, 64, 64).to(dtype)
    exact, _ = reference.quantize(w.double().float(), torch.float8_e4m3fn, 1, WHOLE)
    assert torch.equal(bits(exact), bits(reference.quantize(w, torch.float8_e4m3fn, 1, WHOLE)[0]))
    rounded, _ = reference.quantize(w.bfloat16(), torch.float8_e4m3fn, 1, WHOLE)
    assert not torch.equal(bits(exact), bits(rounded))


@pytest.mark.parametrize("std, share", [(1.0, 0.020), (0.02, 0.024)])
def test_rounding_to_bf16_first_changes_codes(std, share):
    """Of normally distributed fp32 weights about 2% of the codes, depending on where in its octave the amax lies."""
    w = torch.randn(1, 1024, 1024) * std
    exact, rounded = (reference.quantize(x, torch.float8_e4m3fn, 1, WHOLE)[0] for x in (w, w.bfloat16()))
    changed = (bits(exact) != bits(rounded)).float().mean().item()
    assert changed == pytest.approx(share, abs=0.001)


def test_fnuz_formats_have_neither_a_negative_zero_nor_an_infinity():
    """A NaN, and what arithmetic makes one, is 0x80; small negative values become the one zero."""
    w = torch.tensor([[[0.0, -0.0, -1e-12, 1.0, float("nan")]], [[1.0, -2.0, 0.0, -0.0, float("inf")]]])
    for fp8_dtype in reference.FNUZ:
        q, scale = reference.quantize(w, fp8_dtype, 1, WHOLE, amax_in=torch.tensor([1.0, float("inf")])[:, None, None])
        assert bits(q)[0, 0].tolist()[:4] == [0, 0, 0, 0x7F]
        assert bits(q)[..., 4].tolist() == [[0x80], [0x80]] and bits(q)[1, 0].tolist()[:4] == [0, 0, 0, 0]
        assert scale[0] == 1 / reference.FP8_MAX[fp8_dtype]


# vLLM's rules, by formulas of their own; tests/gpu/test_vllm.py compares with vLLM's kernels.

VLLM_BLOCKS = {"per_tensor": (WHOLE, WHOLE), "per_channel": (1, WHOLE), "per_block": (4, 8), "per_group": (1, 8)}
VLLM_FLOORS = {"per_tensor": 0.0, "per_channel": 2.0**-9, "per_block": 1e-4, "per_group": 1e-10}  # of an amax


def vllm(w, scheme):
    return reference.quantize(w, torch.float8_e4m3fn, *VLLM_BLOCKS[scheme], numerics=1)


@pytest.mark.parametrize("scheme", VLLM_BLOCKS)
def test_vllms_scale_is_the_amax_over_448_with_a_floor(scheme):
    """Above the floor within one rounding of ours, and ours exactly where vLLM divides; below it the floor's own."""
    w = torch.randn(3, 16, 64).bfloat16()
    _, scale = vllm(w, scheme)
    _, exact = reference.quantize(w, torch.float8_e4m3fn, *VLLM_BLOCKS[scheme])
    if scheme == "per_block":
        assert ((scale - exact).abs() <= exact * 2**-23).all() and not torch.equal(scale, exact)
    else:
        assert torch.equal(scale, exact)
    floor = torch.tensor(VLLM_FLOORS[scheme]) / 448
    _, scale = vllm(w.float() * 1e-12, scheme)
    below = torch.full_like(scale, floor) if scheme != "per_tensor" else w.float().abs().amax((1, 2)) * 1e-12 / 448
    assert torch.allclose(scale.flatten(), below.flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", VLLM_BLOCKS)
def test_vllm_divides_or_multiplies(scheme):
    """per_channel has the codes of the division, the other three of the reciprocal, which are others."""
    w = torch.randn(4096, 8, 8).bfloat16()
    q, scale = vllm(w, scheme)
    spread = reference._per_element(scale, w.shape, *VLLM_BLOCKS[scheme])
    quotient = (w.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    product = (w.float() * (1 / spread)).clamp(-448, 448).to(torch.float8_e4m3fn)
    # The scale of a block is rounded twice, so that its elements hardly ever meet a tie, where alone the two differ.
    assert scheme == "per_block" or not torch.equal(bits(quotient), bits(product))
    assert torch.equal(bits(q), bits(quotient if scheme == "per_channel" else product))


def test_groups_whose_reciprocal_overflows_are_zeros():
    """Where vLLM writes its largest code for everything: below an amax of 448 * 2^-128, zero included."""
    w = torch.tensor([0.0, -1.0, 1.0])[None, None] * torch.tensor([0.0, 2.0**-130, 448 * 2.0**-127])[:, None, None]
    q, scale = vllm(w, "per_tensor")
    assert bits(q[:2]).flatten().tolist() == [0, 0x80, 0, 0, 0x80, 0] and scale[0] == 0
    assert q[2].flatten().tolist() == [0, -448, 448]


def test_vllm_leaves_the_last_code_of_amds_format_unused():
    """Its bound there is 224."""
    q, scale = reference.quantize(torch.tensor([[[3.5, -1.0]]]), torch.float8_e4m3fnuz, 1, WHOLE, numerics=1)
    assert scale.item() == 3.5 / 224 and q.tolist() == [[[224.0, -64.0]]]


def test_division_is_not_multiplication_by_the_reciprocal():
    """bf16 weights meet exact ties often, where the reciprocal's rounding error decides differently."""
    w = torch.randn(1, 512, 512).bfloat16()
    q, scale = reference.quantize(w, torch.float8_e4m3fn, 1, WHOLE)
    by_reciprocal = (w.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    changed = (bits(q) != bits(by_reciprocal)).float().mean()
    assert 0 < changed < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dequantize_rounds_once(scheme):
    """q * scale in fp32, then one rounding to the result's dtype."""
    w = torch.randn(2, 65, 130)
    q, scale = reference.quantize(w, torch.float8_e4m3fn, *scheme.block, scheme.pow2, scheme.scale_dtype)
    fp32 = reference.dequantize(q, scale, torch.float32, *scheme.block)
    assert torch.equal(fp32.bfloat16(), reference.dequantize(q, scale, torch.bfloat16, *scheme.block))
    assert ((fp32 - w).abs() <= w.abs() / 16 + reference._per_element(scale, w.shape, *scheme.block) * 2**-9).all()
