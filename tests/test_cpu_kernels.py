"""The CPU extension equals the reference to the bit, with every instruction set that this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels import backends
from fp8_kernels.testing import assert_same_bits

pytestmark = pytest.mark.skipif(
    "cpu" not in backends.available_backends("cpu"),
    reason="the CPU extension was not built (`python setup.py build_ext --inplace`, with a C++ compiler)",
)
WEIGHTS = [torch.bfloat16, torch.float16, torch.float32]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
SCHEMES = ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8", fk.PerBlock(3, 5)]
# One element; odd; around 128; experts; nothing; many short rows and one long one, for both ways to share out work.
SHAPES = [(1, 1), (7, 33), (129, 576), (3, 130, 257), (2, 0, 5), (0, 4), (1025, 64), (1, 70_001)]


def weight(shape, dtype):
    """Every magnitude, zeros, a row of them, subnormals; in every second one NaN and Inf."""
    w = torch.randn(shape) * torch.exp2(torch.randint(-30, 15, shape).float())
    if w.numel() > 50:
        w.view(-1)[[7, 9]] = torch.tensor([1e-40, -0.0])
        w[-1] = 0
        if w.shape[-1] % 2:
            w.view(-1)[[3, 11]] = torch.tensor([float("nan"), float("-inf")])
    return w.to(dtype)


def assert_equal_to_reference(w, scheme, fp8):
    has_vllm = scheme != "mxfp8" and "e4m3" in str(fp8)  # what vLLM quantizes to
    for numerics in ("vllm", "exact") if has_vllm else ("exact",):
        q, scale = fk.quantize(w, scheme, dtype=fp8, numerics=numerics, backend="cpu")
        q_reference, scale_reference = fk.quantize(w, scheme, dtype=fp8, numerics=numerics, backend="reference")
        assert_same_bits(scale, scale_reference)
        assert_same_bits(q, q_reference)
    amax = fk.amax(w, scheme, backend="cpu")
    assert_same_bits(amax, fk.amax(w, scheme, backend="reference"))
    assert_same_bits(fk.quantize(w, scheme, dtype=fp8, amax=amax, backend="cpu")[0], q_reference)
    for dtype in WEIGHTS:
        expected = fk.dequantize(q, scale, dtype, scheme, backend="reference")
        assert_same_bits(fk.dequantize(q, scale, dtype, scheme, backend="cpu"), expected)


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bits_are_the_references(scheme, dtype, fp8):
    """Any shape, contiguous or transposed: codes, scales, maxima, and the way back."""
    for shape in SHAPES:
        w = weight(shape, dtype)
        assert_equal_to_reference(w, scheme, fp8)
        assert_equal_to_reference(w.mT, scheme, fp8)


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bits_of_every_16_bit_number(dtype, fp8):
    """Each of the 65,536 patterns over scales from the smallest to Inf, and each code back to each dtype."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, -1)
    for amax in (0.0, 6e-39, 3.7e-3, 1.0, 448.0, 1e30, float("inf"), float("nan")):
        amax = torch.full((1, 1), amax)
        expected = fk.quantize(every, amax=amax, dtype=fp8, backend="reference")
        for found, reference in zip(fk.quantize(every, amax=amax, dtype=fp8, backend="cpu"), expected, strict=True):
            assert_same_bits(found, reference)
    assert_same_bits(fk.amax(every.t(), "per_channel"), fk.amax(every.t(), "per_channel", backend="reference"))
    codes = torch.arange(256).to(torch.uint8).view(fp8).expand(1000, 256)
    scales = torch.exp2(torch.rand(1000, 1) * 250 - 125)
    expected = fk.dequantize(codes, scales, dtype, backend="reference")
    assert_same_bits(fk.dequantize(codes, scales, dtype, backend="cpu"), expected)


def test_bits_with_any_number_of_threads():
    """However rows are shared out, and whether maxima are found in the same pass or before."""
    w = weight((1024, 515), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            for scheme in SCHEMES:
                assert_equal_to_reference(w, scheme, torch.float8_e4m3fn)
    finally:
        torch.set_num_threads(threads)


def test_maxima_accumulate():
    """As shards come: the maximum with what is there, NaN kept."""
    w = weight((40, 33), torch.bfloat16)
    seen = {
        backend: torch.tensor([1e-30, 1e30, float("nan"), 0.0]).repeat(10)[:, None].contiguous()
        for backend in ("cpu", "reference")
    }
    for backend, out in seen.items():
        fk.amax(w, "per_channel", out=out, accumulate=True, backend=backend)
    assert_same_bits(seen["cpu"], seen["reference"])


def test_many_weights_and_a_copy_that_measures():
    """The ops for several weights, and for a shard that is copied, do what the simple ones do."""
    weights = [weight(shape, torch.bfloat16) for shape in SHAPES]
    for w, (q, scale) in zip(weights, fk.quantize_many(weights, "per_block", backend="cpu"), strict=True):
        expected = fk.quantize(w, "per_block", backend="reference")
        assert_same_bits(q, expected[0])
        assert_same_bits(scale, expected[1])
    w = weights[2]
    out, amax = torch.empty_like(w), torch.full((), 1e-3)
    fk.copy_amax(w.mT.contiguous().mT, out, amax, "per_tensor", backend="cpu")
    assert_same_bits(out, w)
    assert_same_bits(amax, fk.amax(w, "per_tensor", backend="reference"))


def test_views_inside_a_buffer_are_all_that_is_written():
    """Offset and strided outputs; what lies around them stays."""
    w = weight((9, 40), torch.float32)
    buffer, scales = torch.full((40, 200), 0x55, dtype=torch.uint8), torch.full((40, 3), -7.0)
    q = buffer.view(torch.float8_e4m3fn)[3:30:3, 5:165:4]
    fk.quantize(w, "per_channel", out=(q, scales[3:30:3, 1:2]), backend="cpu")
    expected = fk.quantize(w, "per_channel", backend="reference")
    assert_same_bits(q.contiguous(), expected[0])
    assert_same_bits(scales[3:30:3, 1:2].contiguous(), expected[1])
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[3:30:3, 5:165:4] = False
    assert (
        (buffer[outside] == 0x55).all() and (scales[:, [0, 2]] == -7).all() and (scales[0::3] == -7).sum() == 14 * 3 - 9
    )


@pytest.mark.parametrize("level", [0, 1])
def test_bits_of_lesser_instruction_sets(level):
    """The same tests on what older processors run, in a process of its own: the choice is made once."""
    env = os.environ | {"FP8_KERNELS_CPU_LEVEL": str(level), "PYTHONPATH": str(Path(__file__).parents[1])}
    tests = [
        f"{__file__}::{test.__name__}" for test in (test_bits_of_every_16_bit_number, test_bits_are_the_references)
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-3000:]
