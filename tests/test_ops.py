"""The public ops on CPU: equal to the reference for every layout, and strict about their arguments.

The same properties on a GPU, for every backend, are in tests/gpu.
"""

from dataclasses import replace

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels import reference
from fp8_kernels.schemes import SCHEMES, as_scheme
from fp8_kernels.testing import bits
from fp8_kernels.torch_kernels import CHUNK_ELEMENTS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP8 = list(reference.FP8_MAX)
# One element; below, at and above a block; a width no block divides; more rows than a chunk holds; experts.
SHAPES = [(1, 1), (7, 13), (128, 128), (129, 576), (1025, 700), (3, 130, 257), (2, 2, 5, 40)]
SCHEME_NAMES = ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8"]
ALL_SCHEMES = [*(SCHEMES[n] for n in SCHEME_NAMES), fk.PerBlock(3, 5), fk.PerChannel(scale_dtype=torch.bfloat16)]


def expected(w, scheme, dtype=torch.float8_e4m3fn, numerics=0):
    """The reference on the whole weight at once, batch dimensions flattened."""
    flat = w.reshape(-1, *w.shape[-2:])
    q, scale = reference.quantize(flat, dtype, *scheme.block, scheme.pow2, scheme.scale_dtype, numerics=numerics)
    return q.reshape(w.shape), scale.reshape(scheme.scale_shape(w.shape))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_equals_the_reference(shape, scheme):
    """Bit for bit, for each input and FP8 dtype, chunked or not."""
    for w_dtype in DTYPES:
        for dtype in FP8:
            w = torch.randn(shape).to(w_dtype)
            q, scale = fk.quantize(w, scheme, dtype=dtype)
            want_q, want_scale = expected(w, scheme, dtype)
            assert q.dtype == dtype and q.shape == w.shape and torch.equal(bits(q), bits(want_q))
            assert scale.dtype == scheme.scale_dtype and torch.equal(bits(scale), bits(want_scale))


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block", "per_group"])
def test_numerics_of_vllm(scheme):
    """By the argument or by the scheme, for small weights and zeros; other bits than the exact ones."""
    w = torch.randn(3, 130, 257) * 1e-8
    w[1] = 0
    want = expected(w, as_scheme(scheme), numerics=1)
    for got in (fk.quantize(w, scheme, numerics="vllm"), fk.quantize(w, replace(as_scheme(scheme), numerics="vllm"))):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))
    exact = fk.quantize(w, scheme)
    assert not all(torch.equal(bits(a), bits(b)) for a, b in zip(got, exact, strict=True))
    got = fk.quantize(w, replace(as_scheme(scheme), numerics="vllm"), numerics="exact")
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_chunks_do_not_change_a_bit(scheme):
    """A weight of several chunks whose rows do not fill the last one."""
    w = torch.randn(CHUNK_ELEMENTS // 300 * 2 + 77, 300)
    q, scale = fk.quantize(w, scheme)
    want_q, want_scale = expected(w, scheme)
    assert torch.equal(bits(q), bits(want_q)) and torch.equal(bits(scale), bits(want_scale))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize(
    "view", [lambda w: w.mT, lambda w: w[..., 1::2, :], lambda w: w[..., 3:-2], lambda w: w[..., ::3]]
)
def test_any_strides_in_and_out(scheme, view):
    """Views give the same bits as their contiguous copies, and `out` may be a view too."""
    w = view(torch.randn(2, 60, 90))
    want_q, want_scale = expected(w, scheme)
    q = view(torch.full((2, 60, 90), 1.0).to(torch.float8_e4m3fn))
    scale = torch.empty(*want_scale.shape, 2, dtype=want_scale.dtype)[..., 0]
    assert fk.quantize(w, scheme, out=(q, scale)) == (q, scale)
    assert torch.equal(bits(q), bits(want_q)) and torch.equal(bits(scale), bits(want_scale))


def test_out_leaves_its_surroundings_alone():
    """Writing an expert's slice touches no other byte."""
    q = torch.full((3, 10, 12), 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.full((3, 10, 1), -1.0)
    fk.quantize(torch.randn(4, 12), "per_channel", out=(q[1, 2:6], scale[1, 2:6]))
    touched = torch.zeros(3, 10, dtype=torch.bool)
    touched[1, 2:6] = True
    assert (bits(q)[~touched] == 0x55).all() and (scale[~touched] == -1).all() and (scale[touched] > 0).all()


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_amax_then_cast_equals_quantize(scheme):
    """The two halves, called alone, give the whole."""
    w = torch.randn(3, 70, 130)
    q, scale = fk.quantize(w, scheme, amax=fk.amax(w, scheme))
    want_q, want_scale = expected(w, scheme)
    assert torch.equal(bits(q), bits(want_q)) and torch.equal(bits(scale), bits(want_scale))


def test_amax_accumulates_over_shards():
    """Shards of one weight, in any order, leave the amax of the whole; NaN stays."""
    w = torch.randn(30, 40)
    out = torch.zeros(())
    for shard in w.split([7, 20, 3])[::-1]:
        fk.amax(shard, "per_tensor", out=out, accumulate=True)
    assert out == w.abs().max()
    fk.amax(torch.tensor([[float("nan")]]), out=out, accumulate=True)
    fk.amax(w, out=out, accumulate=True)
    assert out.isnan()
    assert fk.amax(w, out=out) == w.abs().max()


# Shapes, dtypes and strides of their own, one without elements.
MANY = [((7, 13), torch.bfloat16), ((3, 130, 257), torch.float32), ((0, 5), torch.float16), ((129, 576), torch.float16)]


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("shape", [(64, 40), (3, 64, 40), (2, 2, 64, 40)], ids=str)
def test_segments_are_weights_of_their_own(shape, pow2):
    """Every op on a weight with segments, one of them empty, gives what it gives on each segment alone; without the
    scheme, scales of segments are refused."""
    scale_dtype = torch.float8_e8m0fnu if pow2 else torch.float32
    one = fk.PerTensor(pow2=pow2, scale_dtype=scale_dtype)
    scheme = replace(one, segments=(33, 0, 30, 1))
    w = torch.randn(shape) * torch.logspace(-2, 2, 64).view(-1, 1)
    q, scale = fk.quantize(w, scheme)
    amax = fk.amax(w, scheme)
    high, copied, raised = fk.dequantize(q, scale, torch.float32, scheme), torch.empty_like(w), torch.zeros_like(amax)
    fk.copy_amax(w, copied, raised, scheme)
    assert scale.shape == amax.shape == (*shape[:-2], 4) and torch.equal(copied, w) and torch.equal(raised, amax)
    for i, (start, end) in enumerate([(0, 33), (33, 33), (33, 63), (63, 64)]):
        part = w[..., start:end, :]
        alone_q, alone_scale = fk.quantize(part, one)
        assert torch.equal(bits(q[..., start:end, :]), bits(alone_q)) and torch.equal(
            bits(scale[..., i]), bits(alone_scale)
        )
        assert torch.equal(amax[..., i], fk.amax(part, one))
        assert torch.equal(high[..., start:end, :], fk.dequantize(alone_q, alone_scale, torch.float32, one))
    for again_q, again_scale in (fk.quantize(w, scheme, amax=amax), *fk.quantize_many([w] * (len(shape) < 4), scheme)):
        assert torch.equal(bits(again_q), bits(q)) and torch.equal(bits(again_scale), bits(scale))
    with pytest.raises(ValueError, match="`scheme` must be given"):
        fk.dequantize(q, scale)
    with pytest.raises(ValueError, match=r"`segments` must be 64 rows in all, got \(3,\)"):
        fk.quantize(w, fk.PerTensor((3,)))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_quantize_many_equals_quantize_of_each(scheme):
    """Into new tensors and into given ones, of which the rest is left alone."""
    weights = [torch.randn(shape).to(dtype) for shape, dtype in MANY]
    weights[1] = weights[1].mT
    want = [fk.quantize(w, scheme) for w in weights]
    buffers = [torch.full((*w.shape, 2), 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn) for w in weights]
    out = [(buffer[..., 1], torch.empty_like(scale)) for buffer, (_, scale) in zip(buffers, want, strict=True)]
    for got in (fk.quantize_many(weights, scheme), fk.quantize_many(iter(weights), scheme, out=out)):
        for pair, want_pair in zip(got, want, strict=True):
            for actual, expected_ in zip(pair, want_pair, strict=True):
                assert actual.dtype == expected_.dtype and torch.equal(bits(actual), bits(expected_))
    assert all(a is b for pair, given in zip(got, out, strict=True) for a, b in zip(pair, given, strict=True))
    assert all((bits(buffer)[..., 0] == 0x55).all() for buffer in buffers)
    assert fk.quantize_many([], scheme) == []


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(7, 13), (3, 130, 257), (2, 2, 5, 40), (0, 5)], ids=str)
def test_copy_amax_copies_and_raises_the_amax(shape, scheme):
    """To strided places too; a slot that holds more than the shard keeps it."""
    for dtype in DTYPES:
        w = torch.randn(shape).to(dtype)
        out = torch.empty(*shape, 2, dtype=dtype)[..., 1]
        found = fk.amax(w, scheme)
        slot = torch.where(torch.rand(found.shape) < 0.5, found * 2, found / 2)
        want = slot.maximum(found)
        assert fk.copy_amax(w, out, slot, scheme) is out
        assert torch.equal(bits(out), bits(w)) and torch.equal(slot, want)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 0, 4), (0, 0)], ids=str)
def test_empty_weights(shape, scheme):
    """No elements: right shapes, and a group without elements has amax 0."""
    w = torch.empty(shape)
    q, scale = fk.quantize(w, scheme)
    assert q.shape == w.shape and scale.shape == scheme.scale_shape(shape)
    assert (fk.amax(w, scheme) == 0).all() and (scale.float() == 2.0**-126).all()


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_dequantize_tells_the_scheme_from_the_shapes(scheme):
    """Where the extents divide the shape, no scheme need be named."""
    w = torch.randn(2, 256, 384)
    q, scale = fk.quantize(w, scheme)
    assert torch.equal(fk.dequantize(q, scale, torch.float32), fk.dequantize(q, scale, torch.float32, scheme))


def test_dequantize_asks_for_the_scheme_where_shapes_do_not_tell():
    """5 columns of scales over 576 may be 128 wide, or 116."""
    q, scale = fk.quantize(torch.randn(130, 576), "per_block")
    with pytest.raises(ValueError, match="`scheme` must be given"):
        fk.dequantize(q, scale)
    assert fk.dequantize(q, scale, torch.float16, "per_block").dtype == torch.float16


BAD_CALLS = {
    "not a tensor": (lambda w: fk.quantize([1.0]), TypeError, "`w` must be a tensor, got list"),
    "integer weight": (lambda w: fk.quantize(w.int()), TypeError, "`w` must be one of bfloat16.*got int32"),
    "float64 weight": (lambda w: fk.amax(w.double()), TypeError, "`w` must be one of.*got float64"),
    "one dimension": (lambda w: fk.quantize(w[0]), ValueError, "at least two dimensions"),
    "unknown scheme": (lambda w: fk.quantize(w, "per_row"), ValueError, "per_channel"),
    "fp8 dtype": (lambda w: fk.quantize(w, dtype=torch.int8), TypeError, "`dtype` must be one of float8_e4m3fn"),
    "amax shape": (lambda w: fk.quantize(w, amax=torch.ones(3)), ValueError, r"`amax` must have shape \(4, 1\)"),
    "one output": (lambda w: fk.quantize(w, out=(w,)), TypeError, r"`out` must be a pair of tensors, \(q, scale\)"),
    "no outputs": (lambda w: fk.quantize(w, out=w), TypeError, "`out` must be a pair of tensors.*got Tensor"),
    "q dtype": (lambda w: fk.quantize(w, out=(w, w)), TypeError, r"`out\[0\]` must be one of float8"),
    "scale shape": (
        lambda w: fk.quantize(w, out=(w.to(torch.float8_e4m3fn), torch.ones(4))),
        ValueError,
        r"`out\[1\]` must have shape",
    ),
    "device": (lambda w: fk.amax(w, out=torch.ones((), device="meta")), ValueError, "`out` must be on cpu, got meta"),
    "accumulate": (lambda w: fk.amax(w, accumulate=True), ValueError, "must come with `out`"),
    "many: not a tensor": (
        lambda w: fk.quantize_many([w, 3]),
        TypeError,
        r"`weights\[1\]` must be a tensor, got int",
    ),
    "many: q shape": (
        lambda w: fk.quantize_many([w, w[:2]], out=[fk.quantize(w)] * 2),
        ValueError,
        r"`out\[1\]\[0\]` must have shape \(2, 6\)",
    ),
    "many: length": (
        lambda w: fk.quantize_many([w], out=[]),
        ValueError,
        "must have the length of `weights`, 1, got 0",
    ),
    "many: dimensions": (lambda w: fk.quantize_many([w[None, None]]), ValueError, r"must be \[N, K\] or \[E, N, K\]"),
    "many: device": (
        lambda w: fk.quantize_many([w, w.to("meta")]),
        ValueError,
        r"`weights\[1\]` must be on .*, got meta",
    ),
    "copy: dtype": (
        lambda w: fk.copy_amax(w, w.half(), torch.zeros(())),
        TypeError,
        "`out` must be one of float32, got float16",
    ),
    "copy: slot": (lambda w: fk.copy_amax(w, w, torch.zeros(4)), ValueError, r"`amax` must have shape \(\)"),
    "dequantize: device": (
        lambda w: fk.dequantize(w.to(torch.float8_e4m3fn), torch.ones(4, 1, device="meta")),
        ValueError,
        "`scale` must be on .*, got meta",
    ),
    "dequantize: scale dtype": (
        lambda w: fk.dequantize(w.to(torch.float8_e4m3fn), torch.ones(4, 1).half()),
        TypeError,
        "`scale` must be one of float32, .*got float16",
    ),
    "many segments: shape": (
        lambda w: fk.quantize_many([w, w[:3]], fk.PerTensor((1, 3))),
        ValueError,
        "`segments` must be 3 rows in all",
    ),
    "many segments: length": (
        lambda w: fk.quantize_many([w], fk.PerTensor((1, 3)), out=[]),
        ValueError,
        "must have the length of `weights`, 1, got 0",
    ),
    "unknown numerics": (lambda w: fk.quantize(w, numerics="sglang"), ValueError, "`numerics` must be one of"),
    "vllm numerics of mx": (
        lambda w: fk.quantize(w, "mxfp8", numerics="vllm"),
        ValueError,
        "must come with fp32 scales",
    ),
    "vllm numerics of e5m2": (
        lambda w: fk.quantize(w, dtype=torch.float8_e5m2, numerics="vllm"),
        TypeError,
        "`dtype` must be one that vLLM quantizes to, float8_e4m3, got float8_e5m2",
    ),
    "unknown backend": (lambda w: fk.quantize(w, backend="metal"), ValueError, "`backend` must be one of"),
    "other device's backend": (
        lambda w: fk.quantize(w, backend="triton"),
        RuntimeError,
        "does not serve tensors on cpu",
    ),
    "dequantize weight": (lambda w: fk.dequantize(w, w), TypeError, "`q` must be one of float8"),
}


@pytest.mark.parametrize("call, error, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_named(call, error, message):
    """The message names the argument, the rule and what came instead."""
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6))


def test_quantize_many_writes_nothing_where_one_weight_is_bad():
    """Segments, which are calls of their own, included."""
    w = torch.randn(4, 6)
    for scheme in (fk.PerTensor((1, 3)), "per_channel"):
        q, scale = fk.quantize(torch.zeros_like(w), scheme)
        before = scale.clone()
        with pytest.raises((ValueError, TypeError)):
            fk.quantize_many([w, w[0]], scheme, out=[(q, scale), (q, scale)])
        assert torch.equal(scale, before) and not q.view(torch.uint8).any()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_results_need_no_gradient(backend):
    """A parameter may be given as it is; results are data, on any backend."""
    w = torch.nn.Parameter(torch.randn(4, 6))
    q, scale = fk.quantize(w, backend=backend)
    amax = fk.amax(w, backend=backend)
    high = fk.dequantize(q, torch.nn.Parameter(scale), backend=backend)
    assert not any(t.requires_grad for t in (q, scale, amax, high))


def op_calls():
    """Calls of each registered op."""
    w, q = torch.randn(2, 6, 10), torch.zeros(2, 6, 10, dtype=torch.float8_e4m3fn)
    yield "quantize_out", (w, None, q, torch.empty(2, 6, 1), 1, -1, False, 0)
    yield "quantize_out", (w[0], torch.ones(()), q[0], torch.empty(()), -1, -1, True, 0)
    yield "quantize_out", (w, None, q, torch.empty(2), -1, -1, False, 1)
    yield (
        "quantize_many_out",
        ([w[0], w], [q[0], q.clone()], [torch.empty(6, 1), torch.empty(2, 6, 1)], 1, -1, False, 0),
    )
    yield "copy_amax_out", (w, torch.empty_like(w), torch.zeros(2), -1, -1)
    yield "amax_out", (w, torch.zeros(2, 2, 2), 4, 8, True)
    yield "dequantize_out", (q, torch.ones(2, 6, 1), w, 1, -1)


@pytest.mark.parametrize("name, args", list(op_calls()))
def test_opcheck(name, args, monkeypatch):
    """Schema, fake, autograd registration and AOT dispatch agree with what the op does."""
    allclose = torch.allclose

    def allclose_with_fp8(a, b, **kwargs):  # torch's own has no FP8 kernel, and opcheck compares with it
        return allclose(a.float(), b.float(), **kwargs) if a.dtype in FP8 else allclose(a, b, **kwargs)

    monkeypatch.setattr(torch, "allclose", allclose_with_fp8)
    torch.library.opcheck(getattr(torch.ops.fp8_kernels, name).default, args)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_compiles_without_a_graph_break(scheme):
    """fullgraph=True, and the same bits as eager."""

    def step(w):
        q, scale = fk.quantize(w * 2, scheme)
        ((q2, _),) = fk.quantize_many([w], scheme)
        copied = fk.copy_amax(w, torch.empty_like(w), slot := torch.zeros_like(fk.amax(w, scheme)), scheme)
        return q, scale, fk.dequantize(q, scale, torch.float32, scheme), fk.amax(w, scheme), q2, copied, slot

    w = torch.randn(40, 70)
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()  # each scheme compiles anew, and torch counts that per function
        for got, want in zip(torch.compile(step, fullgraph=True, backend=backend)(w), step(w), strict=True):
            assert torch.equal(bits(got), bits(want))


def test_fakes_work_on_meta_tensors():
    """Planning code can run the ops without data."""
    q, scale = fk.quantize(torch.empty(3, 40, 50, device="meta"), "per_block")
    assert q.is_meta and scale.shape == as_scheme("per_block").scale_shape((3, 40, 50))
