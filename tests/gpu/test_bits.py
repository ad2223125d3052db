"""Every GPU backend gives the reference's bits: schemes, dtypes, sizes, layouts and special values.

`reference` among the backends is the plain PyTorch path on the GPU, which serves as the expectation where a weight
is too large for the CPU.
"""

import functools
import math
import zlib

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels import reference
from fp8_kernels.testing import assert_same_bits

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SCHEMES = {
    "per_tensor": fk.PerTensor(),
    "per_channel": fk.PerChannel(),
    "per_block": fk.PerBlock(128, 128),
    "per_group": fk.PerGroup(128),
    "mxfp8": fk.mxfp8(),
    "per_tensor_pow2": fk.PerTensor(pow2=True),
    "per_channel_bf16": fk.PerChannel(scale_dtype=torch.bfloat16),
    "per_block_pow2": fk.PerBlock(128, 128, pow2=True),
    # Rectangles that no vector width divides, that hold one element, and that reach past the weight.
    "block_3x5": fk.PerBlock(3, 5),
    "block_64x200": fk.PerBlock(64, 200),
    "block_1x1": fk.PerBlock(1, 1),
    "block_300x8000": fk.PerBlock(300, 8000),
    "group_1000": fk.PerGroup(1000),
}
# One element, odd sizes, hidden sizes that 128 does not divide, rows of several widths of thread block, experts,
# and weights without elements.
SHAPES = [(1, 1), (7, 13), (65, 257), (576, 576), (257, 700), (9, 7168), (3, 128, 576), (2, 5, 40000)]
EMPTY = [(0, 5), (5, 0), (0, 0), (0, 4, 8), (2, 0, 8), (2, 4, 0)]


@pytest.fixture(params=["cuda", "triton", "reference"])
def backend(request):
    if request.param not in fk.available_backends("cuda"):
        pytest.skip(f"backend {request.param!r} is not available here")
    return request.param


def expected(w, scheme, dtype=torch.float8_e4m3fn, amax=None):
    """The reference, on the CPU."""
    w = w.cpu()
    flat = w.reshape(math.prod(w.shape[:-2]), *w.shape[-2:])
    shape = scheme.scale_shape(w.shape)
    if amax is not None:
        amax = amax.cpu().reshape(len(flat), *scheme.scale_shape(w.shape[-2:])[:2] or (1, 1))
    q, scale = reference.quantize(flat, dtype, *scheme.block, scheme.pow2, scheme.scale_dtype, amax)
    return q.reshape(w.shape), scale.reshape(shape)


def check_quantize(w, scheme, backend, dtype=torch.float8_e4m3fn, amax=None, out=None, want=None):
    q, scale = fk.quantize(w, scheme, dtype=dtype, amax=amax, out=out, backend=backend)
    want_q, want_scale = want or expected(w, scheme, dtype, amax)
    assert_same_bits(scale.cpu(), want_scale, "scale")
    assert_same_bits(q.cpu(), want_q, "q")
    return q, scale


def weight(shape, dtype):
    """Weights as models have them, with a row of zeros, a tiny row and an outlier where there is room."""
    w = torch.randn(shape) * 0.02
    if shape[-2] > 3 and shape[-1] > 5:
        w[..., 1, :] = 0
        w[..., 2, :] *= 1e-6
        w[..., 3, 5] = 37.0
    return w.to(dtype)


@functools.cache
def case(name, dtype, fp8, shape):
    """A weight with its (amax, q, scale, dequantized), the same for each backend that is compared with it."""
    torch.manual_seed(zlib.crc32(f"{name} {dtype} {fp8} {shape}".encode()))
    scheme, w = SCHEMES[name], weight(shape, dtype)
    flat, grid = w.reshape(-1, *shape[-2:]), scheme.scale_shape(shape)
    amax = reference.amax(flat, *scheme.block)
    q, scale = reference.quantize(flat, fp8, *scheme.block, scheme.pow2, scheme.scale_dtype)
    back = reference.dequantize(q, scale, dtype, *scheme.block)
    return w, amax.reshape(grid), q.reshape(shape), scale.reshape(grid), back.reshape(shape)


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_quantize_amax_and_dequantize_equal_the_reference(name, dtype, fp8, backend):
    """Every scheme, input dtype, FP8 dtype and size; the three ops in one go."""
    for shape in SHAPES:
        scheme = SCHEMES[name]
        w, want_amax, want_q, want_scale, want_back = case(name, dtype, fp8, shape)
        w = w.cuda()
        assert_same_bits(fk.amax(w, scheme, backend=backend).cpu(), want_amax, "amax")
        slot, copied = torch.zeros_like(want_amax).cuda(), torch.empty_like(w)
        assert_same_bits(fk.copy_amax(w, copied, slot, scheme, backend=backend), w, "copy")
        assert_same_bits(slot.cpu(), want_amax, "slot")
        q, scale = check_quantize(w, scheme, backend, fp8, want=(want_q, want_scale))
        assert_same_bits(fk.dequantize(q, scale, dtype, scheme, backend=backend).cpu(), want_back, "w")


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_weights_without_elements(scheme, backend):
    """Scales of groups without elements are the tiny one; nothing else happens."""
    for shape in EMPTY:
        w = torch.empty(shape, device="cuda")
        q, scale = check_quantize(w, scheme, backend)
        assert not fk.amax(w, scheme, backend=backend).any()
        assert fk.dequantize(q, scale, scheme=scheme, backend=backend).shape == shape


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8"])
@pytest.mark.parametrize("shape", [(49152, 576), (1025, 7168), (7, 53248), (3, 70000), (1, 8, 600, 4096)], ids=str)
def test_sizes_of_real_models(shape, scheme, backend):
    """An embedding, odd rows of a wide layer, rows at and past what one thread block holds, a 4-d batch."""
    check_quantize(weight(shape, torch.bfloat16).cuda(), SCHEMES[scheme], backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 65544), (5, 131, 1000), (131, 70, 1024), (3, 4999, 1032), (2, 3, 70000), (1, 9000, 8200)], ids=str
)
def test_groups_larger_than_a_thread_block(shape, dtype, backend):
    """Few and many, of one tile and of more than the chip holds, with a last tile of any size."""
    w = weight(shape, dtype).cuda()
    for scheme in (fk.PerTensor(), fk.PerTensor(pow2=True, scale_dtype=torch.bfloat16)):
        for fp8 in FP8:
            q, scale = fk.quantize(w, scheme, dtype=fp8, backend=backend)
            want_q, want_scale = fk.quantize(w, scheme, dtype=fp8, backend="reference")
            assert_same_bits(scale, want_scale, "scale")
            assert_same_bits(q, want_q, "q")
    assert_same_bits(fk.amax(w, "per_tensor", backend=backend), fk.amax(w, "per_tensor", backend="reference"), "amax")


# In chunks of 8192 elements for each processor: where csrc/quantize_whole.cu begins to hold, then to stream, for 2-byte
# elements (14, 20, 24) and fp32 (7, 10, 12); and two steps of streaming.
HELD = [0, 1, 7, 10, 12, 14, 20, 24, 29]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("held", HELD)
def test_one_scale_at_the_edges_of_what_the_chip_holds(held, dtype, backend):
    """Less and more than whole chunks a processor; the largest element at either end and between, Inf, NaN."""
    all_chunks = 8192 * held * torch.cuda.get_device_properties(0).multi_processor_count
    generator = torch.Generator("cuda").manual_seed(held)
    for more in (-8192, -8, 0, 8, 8192 * 5 + 16):
        if all_chunks + more <= 0:
            continue
        w = torch.randn(1, all_chunks + more, device="cuda", generator=generator).to(dtype)
        for at, value in [(-1, 300.0), (0, 500.0), (0.35, 1000.0), (0.7, float("inf")), (0.9, float("nan"))]:
            w[0, at if at in (0, -1) else int(w.numel() * at)] = value
            for numerics in ("exact", "vllm") if math.isfinite(value) else ("exact",):
                q, scale = fk.quantize(w, "per_tensor", numerics=numerics, backend=backend)
                want_q, want_scale = fk.quantize(w, "per_tensor", numerics=numerics, backend="reference")
                assert_same_bits(scale, want_scale, f"scale of {w.numel()}")
                assert_same_bits(q, want_q, f"q of {w.numel()}")
            assert_same_bits(fk.amax(w, backend=backend), fk.amax(w, backend="reference"), f"amax of {w.numel()}")


# Layouts.

LAYOUTS = {
    "rows apart": lambda n, k: ((n, k + 24), lambda t: t[..., 8 : k + 8]),
    "rows apart, misaligned": lambda n, k: ((n, k + 5), lambda t: t[..., 3 : k + 3]),
    "transposed": lambda n, k: ((k, n), lambda t: t.mT),
    "every third column": lambda n, k: ((n, 3 * k), lambda t: t[..., ::3]),
    "every second row": lambda n, k: ((2 * n, k), lambda t: t[..., 1::2, :]),
    "a slice of experts": lambda n, k: ((2 * n, k), lambda t: t[..., n:, :]),
}


def laid_out(values, layout):
    """A view with that layout that holds the values, and its whole buffer, filled with a sentinel elsewhere."""
    *batch, n, k = values.shape
    shape, take = layout(n, k)
    buffer = torch.empty((*batch, *shape), dtype=values.dtype, device="cuda")
    buffer.view(torch.uint8).fill_(0x55)
    view = take(buffer)
    view.copy_(values)
    return view, buffer


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8", "block_3x5"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_in_and_out(layout, scheme, backend):
    """Views read and written give the bits of contiguous tensors, and nothing beside an output is touched."""
    scheme = SCHEMES[scheme]
    for shape in [(2, 160, 272), (1, 33, 61)]:
        w = weight(shape, torch.bfloat16)
        want_q, want_scale = expected(w, scheme)
        w_view, _ = laid_out(w, layout)
        for out_layout in (layout, LAYOUTS["rows apart"]):
            q, q_buffer = laid_out(torch.zeros(shape, dtype=torch.uint8), out_layout)
            q = q.view(torch.float8_e4m3fn)
            # Scales with gaps, as rows of a larger array have.
            scale_buffer = torch.full((*want_scale.shape, 2), -7.0, device="cuda").to(scheme.scale_dtype)
            scale = scale_buffer[..., 0]
            check_quantize(w_view, scheme, backend, out=(q, scale), want=(want_q, want_scale))
            assert_same_bits(q_buffer, laid_out(want_q.view(torch.uint8), out_layout)[1], "what is around q")
            untouched = torch.full_like(want_scale, -7.0, dtype=torch.float32).to(scheme.scale_dtype)
            assert_same_bits(scale_buffer[..., 1], untouched, "what is around scale")
            amax_buffer = torch.full((*want_scale.shape, 2), -7.0, device="cuda")
            fk.amax(w_view, scheme, out=amax_buffer[..., 1], backend=backend)
            want_amax = reference.amax(w, *scheme.block).reshape(want_scale.shape)
            assert_same_bits(amax_buffer[..., 1].cpu(), want_amax, "amax")
            assert (amax_buffer[..., 0] == -7.0).all()
            back, back_buffer = laid_out(torch.zeros(shape, dtype=torch.bfloat16), out_layout)
            fk.dequantize(q, scale, scheme=scheme, out=back, backend=backend)
            want_back = fk.dequantize(want_q, want_scale, torch.bfloat16, scheme)
            assert_same_bits(back_buffer, laid_out(want_back, out_layout)[1], "w and what is around it")


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "mxfp8"])
def test_views_that_slide_through_memory(scheme, backend):
    """Inputs and outputs at 41 offsets: every alignment, and no store outside of the view."""
    scheme, shape = SCHEMES[scheme], (19, 272)
    w = weight(shape, torch.bfloat16)
    count = w.numel()
    want_q, want_scale = expected(w, scheme)
    for offset in range(41):
        source = torch.full((count + 64,), float("nan"), dtype=torch.bfloat16, device="cuda")
        target = torch.full((count + 64,), 0x55, dtype=torch.uint8, device="cuda")
        w_view = source[offset : offset + count].view(shape).copy_(w)
        for q_offset in {offset, 0}:
            target.fill_(0x55)
            q = target[q_offset : q_offset + count].view(shape).view(torch.float8_e4m3fn)
            scale = torch.empty_like(want_scale, device="cuda")
            check_quantize(w_view, scheme, backend, out=(q, scale), want=(want_q, want_scale))
            assert (target[:q_offset] == 0x55).all() and (target[q_offset + count :] == 0x55).all()


# Values.


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8", "block_3x5"])
def test_special_values(scheme, dtype, fp8, backend):
    """NaN, Inf, -0, subnormals, the largest numbers and groups of zeros, each alone in a group and among others."""
    scheme = SCHEMES[scheme]
    info = torch.finfo(dtype)
    specials = [float("nan"), float("inf"), -float("inf"), -0.0, info.smallest_normal / 4, info.max, info.min, 0.0]
    for value in specials:
        for background in (0.0, 0.02):
            w = torch.randn(2, 140, 280) * background
            w[0, 3, 7] = value
            w[1, 130:, 200:] = value
            w = w.to(dtype)
            check_quantize(w.cuda(), scheme, backend, fp8)
            want = reference.amax(w, *scheme.block).reshape(scheme.scale_shape(w.shape))
            assert_same_bits(fk.amax(w.cuda(), scheme, backend=backend).cpu(), want, "amax")


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_exact_ties_round_to_even(fp8, backend):
    """Midpoints of neighbouring codes, under a scale of one and others, in each scheme's kernel."""
    codes = torch.arange(0x7E if fp8 == torch.float8_e4m3fn else 0x7B, dtype=torch.uint8)
    low, high = codes.view(fp8).float(), (codes + 1).view(fp8).float()
    middle = torch.cat([(low + high) / 2, torch.tensor([reference.FP8_MAX[fp8]])])
    middle = torch.cat([middle, -middle])
    w = middle.repeat(256 // len(middle) + 1)[:256].expand(16, 256).clone()
    w[:, 255] = reference.FP8_MAX[fp8]
    for factor in (1.0, 0.5, 3.0, 2.0**-100):
        for scheme in ("per_tensor", "per_channel", "per_block"):
            check_quantize((w * factor).cuda(), SCHEMES[scheme], backend, fp8)


@pytest.mark.slow
@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_bit_pattern_under_any_amax(dtype, fp8, backend):
    """Random bits as weights and as amaxes given from outside: quotients of every size, and everything not finite."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integers)
    w = torch.randint(limits.min, limits.max, (4, 256, 1024), dtype=integers).view(dtype)
    for scheme in (fk.PerGroup(32), fk.mxfp8(), fk.PerGroup(32, scale_dtype=torch.bfloat16), fk.PerChannel()):
        shape = scheme.scale_shape(w.shape)
        amax = torch.randint(0, 0x7F900000, shape, dtype=torch.int32).view(torch.float32)
        # Half of them near the data, so that rounding decides.
        near = reference.amax(w.nan_to_num(0, 1, 1), *scheme.block) * torch.rand(shape)
        amax = torch.where(torch.rand(shape) < 0.5, amax, near)
        check_quantize(w.cuda(), scheme, backend, fp8, amax.cuda())
        check_quantize(w.cuda(), scheme, backend, fp8)


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8"])
def test_amax_from_outside(scheme, backend):
    """Used as it is: smaller or larger than the data, zero, negative, Inf or NaN; small weights and large."""
    scheme = SCHEMES[scheme]
    for shape in [(2, 130, 272), (2, 600, 272)]:
        w = weight(shape, torch.bfloat16)
        own = reference.amax(w, *scheme.block).reshape(scheme.scale_shape(shape))
        for value in (0.5, 3.0):
            check_quantize(w.cuda(), scheme, backend, amax=(own * value).cuda())
        for value in (0.0, -1.0, 1e-44, 3e38, float("inf"), float("nan")):
            check_quantize(w.cuda(), scheme, backend, amax=torch.full_like(own, value).cuda())


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "per_group"])
def test_amax_accumulates_over_shards(scheme, backend):
    """The maximum over shards is the whole weight's, NaN and Inf included; without `accumulate` old values are gone."""
    scheme = SCHEMES[scheme]
    for shape in [(2, 130, 272), (2, 600, 272)]:
        shards = [weight(shape, torch.bfloat16) * factor for factor in (1, 3, 0.1)]
        shards[1][0, 7, 9], shards[2][1, 3, 4] = float("inf"), float("nan")
        out = torch.full(scheme.scale_shape(shape), float("nan"), device="cuda")
        want = None
        for i, shard in enumerate(shards):
            fk.amax(shard.cuda(), scheme, out=out, accumulate=i > 0, backend=backend)
            part = reference.amax(shard, *scheme.block).reshape(out.shape)
            want = part if want is None else want.maximum(part)
            want[want.isnan()] = float("nan")  # the canonical one
            assert_same_bits(out, want.cuda(), "amax")


# Several thread blocks a group, the last of them full, partial, or with one vector; rows that adjoin or not.
LONG_RUNS = [(2, 4, 4096), (3, 5, 4104), (2, 3, 12280), (1, 70000)]


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
def test_the_cast_of_long_runs_of_any_bits(scheme, dtype, fp8, backend):
    """Random bits under amaxes near the data, of other data, and not finite; between the runs nothing is written."""
    scheme, integers = SCHEMES[scheme], {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integers)
    for *lead, rows, cols in LONG_RUNS:
        for gap in (0, 8):
            w = torch.randint(limits.min, limits.max, (*lead, rows, cols + gap), dtype=integers).view(dtype)[..., :cols]
            sizes = w.nan_to_num(0, 1, 1).float().abs()
            own = sizes.flatten(-2).quantile(0.5, -1) if scheme.block[0] != 1 else sizes.quantile(0.5, -1, keepdim=True)
            wide = torch.full((*lead, rows, cols + gap), 0x55, dtype=torch.uint8, device="cuda")
            q = wide[..., :cols].view(fp8)
            scale = torch.empty(scheme.scale_shape(w.shape), device="cuda")
            on_device = torch.empty(wide.shape, dtype=dtype, device="cuda")[..., :cols].copy_(w)
            for amax in (own, own * 1e-3, own * float("inf"), own * float("nan"), own * 0):
                check_quantize(on_device, scheme, backend, fp8, amax.reshape(scale.shape).cuda(), (q, scale))
            assert (wide[..., cols:] == 0x55).all()


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "mxfp8", "block_3x5"])
def test_dequantize_any_code_and_scale(scheme, dtype, fp8, backend):
    """All 256 codes under scales of every size and sign, zero, Inf and NaN; aligned and not."""
    scheme = SCHEMES[scheme]
    for shape in [(40, 300, 512), (2, 33, 203)]:
        q = torch.randint(0, 256, shape, dtype=torch.uint8).view(fp8)
        scale = torch.randn(scheme.scale_shape(shape)) * torch.rand(scheme.scale_shape(shape)).mul(200).sub(100).exp2()
        scale.view(-1)[:4] = torch.tensor([0.0, float("inf"), float("nan"), 1.0])[: scale.numel()]
        scale = scale.abs().to(scheme.scale_dtype) if scheme.scale_dtype.itemsize == 1 else scale.to(scheme.scale_dtype)
        want = fk.dequantize(q, scale, dtype, scheme, backend="reference")
        assert_same_bits(fk.dequantize(q.cuda(), scale.cuda(), dtype, scheme, backend=backend).cpu(), want)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(backend):
    """Indices past 32 bits, in elements and in strides."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    if backend == "reference":
        pytest.skip("it is the expectation here")
    w = torch.empty(1, 262_147, 8200, dtype=torch.bfloat16, device="cuda")
    for rows in w.split(8192, dim=1):
        rows.normal_(0, 0.02)
    w[0, -1, -1] = 5.0
    for scheme in ("per_tensor", "per_channel", "per_group"):
        q, scale = fk.quantize(w, scheme, backend=backend)
        want_q, want_scale = fk.quantize(w, scheme, backend="reference")
        assert torch.equal(scale, want_scale)
        assert all(
            torch.equal(a, b)
            for a, b in zip(q.view(torch.uint8)[0].split(32768), want_q.view(torch.uint8)[0].split(32768), strict=True)
        )
        assert_same_bits(fk.amax(w, scheme, backend=backend), fk.amax(w, scheme, backend="reference"), "amax")
        del want_q
        far = w.as_strided((1, 2, 72), (0, 2**31 + 24, 1))
        q_far = q.as_strided((1, 2, 72), (0, 2**31 + 24, 1))
        _, scale_far = fk.quantize(far, scheme, out=(q_far, torch.empty_like(fk.amax(far, scheme))), backend=backend)
        want = fk.quantize(far.contiguous().cpu(), scheme)
        assert_same_bits(q_far.contiguous().cpu(), want[0], "q")
        assert_same_bits(scale_far.cpu(), want[1], "scale")
