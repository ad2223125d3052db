"""How the ops behave as GPU work: launches, memory, streams, graphs, compilation, determinism."""

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.testing import assert_same_bits
from tests.test_ops import BAD_CALLS

pytestmark = pytest.mark.gpu

SCHEMES = ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8"]
SHAPES = [(64, 256), (1024, 2048), (8, 512, 1024)]  # fits one thread block; does not; experts that do not


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if request.param not in fk.available_backends("cuda"):
        pytest.skip(f"backend {request.param!r} is not available here")
    return request.param


def weight(shape):
    return (torch.randn(shape) * 0.02).bfloat16().cuda()


def empty_outputs(w, scheme):
    scheme = fk.schemes.as_scheme(scheme)
    q = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device="cuda")
    return q, torch.empty(scheme.scale_shape(w.shape), dtype=scheme.scale_dtype, device="cuda")


def check(out, w, scheme):
    for actual, want, what in zip(out, fk.quantize(w.cpu(), scheme), ("q", "scale"), strict=True):
        assert_same_bits(actual.cpu(), want, what)


def launches(call):
    """Names of the kernels (and sets and copies) that a call runs on the GPU."""
    call()  # compiles and loads what there is to compile and load
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launches(shape, scheme, backend):
    """One launch, experts batched; Triton takes two for a scale over a whole weight."""
    w = weight(shape)
    out = empty_outputs(w, scheme)
    amax = fk.amax(w, scheme)
    names = launches(lambda: fk.quantize(w, scheme, out=out, backend=backend))
    assert len(names) <= (2 if scheme == "per_tensor" and backend == "triton" else 1), names
    names = launches(lambda: fk.quantize(w, scheme, out=out, amax=amax, backend=backend))
    assert len(names) == 1, names
    names = launches(lambda: fk.amax(w, scheme, out=amax, backend=backend))
    assert len(names) <= (2 if scheme == "per_tensor" and backend == "triton" else 1), names
    copied = torch.empty_like(w)
    names = launches(lambda: fk.copy_amax(w, copied, amax, scheme, backend=backend))
    assert len(names) == 1, names
    names = launches(lambda: fk.dequantize(*out, scheme=scheme, out=w, backend=backend))
    assert len(names) == 1, names


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_many_gives_the_bits_of_each(scheme, backend):
    """Weights of many shapes and dtypes, aligned and not, small and large, in one call."""
    shapes = [(64, 256), (7, 13), (3, 130, 257), (1, 8192), (0, 64), (512, 2048), (8, 512, 1024), (33, 7168)]
    weights = [weight(shape) for shape in shapes]
    weights += [weights[3].float(), weights[5].half(), weights[5][:, ::2], weights[6].mT, weights[0][:, 3:]]
    for out in (None, [empty_outputs(w, scheme) for w in weights]):
        for pair, w in zip(fk.quantize_many(weights, scheme, out=out, backend=backend), weights, strict=True):
            check(pair, w, scheme)


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_group", "mxfp8"])
def test_quantize_many_is_one_launch_for_aligned_weights(scheme):
    """CUDA: sizes may differ, from one group to more than the chip holds."""
    if "cuda" not in fk.available_backends("cuda"):
        pytest.skip("the CUDA extension is not available here")
    weights = [weight(shape) for shape in [(64, 256), (1024, 2048), (8, 512, 1024), (9000, 4096), (1, 128)] * 4]
    out = [empty_outputs(w, scheme) for w in weights]
    names = launches(lambda: fk.quantize_many(weights, scheme, out=out, backend="cuda"))
    assert len(names) == 1, names
    for (q, scale), w in zip(out, weights, strict=True):
        for actual, want in zip((q, scale), fk.quantize(w, scheme, backend="reference"), strict=True):
            assert_same_bits(actual, want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_allocates_nothing_but_a_few_kilobytes(scheme, backend):
    """No temporary grows with the weight."""
    w = weight((16, 1024, 2048))
    out = empty_outputs(w, scheme)
    fk.quantize(w, scheme, out=out, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fk.quantize(w, scheme, out=out, backend=backend)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 64 * 1024


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_captured_graph_quantizes_new_data(shape, scheme, backend):
    """Capture once, replay on other weights: same bits as a call."""
    w = weight(shape)
    out = empty_outputs(w, scheme)
    amax = torch.empty(fk.schemes.as_scheme(scheme).scale_shape(shape), device="cuda")
    for _ in range(2):  # Triton compiles outside of the capture
        fk.quantize(w, scheme, out=out, backend=backend)
        fk.amax(w, scheme, out=amax, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fk.quantize(w, scheme, out=out, backend=backend)
        fk.amax(w, scheme, out=amax, backend=backend)
    for factor in (1, 100):
        w.copy_(weight(shape) * factor)
        graph.replay()
        check(out, w, scheme)
        assert_same_bits(amax.cpu(), fk.amax(w.cpu(), scheme), "amax")


# What a launch shares between its thread blocks is in memory from torch's allocator, of any content.
POISONS = [0, -1, 0x3C003C00, 0x7FC00000, 0x55555555]
# One group a thread block's registers cannot hold, several a processor's memory holds, some and one larger than the
# chip; and rows apart, which take another path.
LARGE = [(1, 70000), (40, 300, 1024), (3, 9000, 4104), (9000, 8200)]


@pytest.mark.parametrize("apart", [False, True], ids=["adjoining", "rows apart"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_replays_over_poisoned_memory(shape, apart, backend):
    """Whatever the workspace holds, a graph's own leftovers included, replays give the bits of the reference."""
    *lead, n, k = shape
    w = torch.empty(*lead, n, k + 8 * apart, dtype=torch.bfloat16, device="cuda")[..., :k]
    out, amax = empty_outputs(w, "per_tensor"), torch.empty(lead, device="cuda")
    poison = torch.zeros(1, dtype=torch.int32, device="cuda")

    def call():
        torch.empty(1 << 18, dtype=torch.int32, device="cuda").copy_(poison.expand(1 << 18))
        fk.quantize(w, "per_tensor", out=out, backend=backend)
        torch.empty(1 << 18, dtype=torch.int32, device="cuda").copy_(poison.expand(1 << 18))
        fk.amax(w, "per_tensor", out=amax, backend=backend)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for value in POISONS:
        w.normal_(std=0.02)
        poison.fill_(value)
        graph.replay()
        want = fk.quantize(w, "per_tensor", backend="reference")
        for actual, expected in zip((*out, amax), (*want, fk.amax(w, backend="reference")), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("apart", [False, True], ids=["adjoining", "rows apart"])
def test_streams_at_once(apart, backend):
    """Calls on several streams, whose blocks compete for the processors, end and give the bits of calls one by one."""
    shapes = [(40, 300, 1024), (4096, 2048), (3, 9000, 1024), (1, 70000), (9000, 4104)]
    weights = [torch.randn(*s[:-1], s[-1] + 8 * apart, device="cuda").bfloat16()[..., : s[-1]] for s in shapes]
    want = [fk.quantize(w, "per_tensor", backend="reference") for w in weights]
    streams = [torch.cuda.Stream() for _ in weights]
    torch.cuda.synchronize()
    outs = [[] for _ in weights]
    for _ in range(20):
        for w, stream, out in zip(weights, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(fk.quantize(w, "per_tensor", backend=backend))
    torch.cuda.synchronize()
    for out, expected in zip(outs, want, strict=True):
        for pair in out:
            for actual, wanted in zip(pair, expected, strict=True):
                assert_same_bits(actual, wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_runs_on_the_current_stream(scheme, backend):
    """Work queued before it on a side stream is done before it reads."""
    new, w = weight((512, 2048)), weight((512, 2048))
    out = empty_outputs(w, scheme)
    fk.quantize(w, scheme, out=out, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        w.copy_(new)
        fk.quantize(w, scheme, out=out, backend=backend)
    side.synchronize()
    check(out, new, scheme)


def test_repeated_calls_give_the_same_bits(backend):
    """No atomics in floating point, no races: twenty runs over one large weight."""
    w = weight((4096, 4096))
    for scheme in SCHEMES:
        first = fk.quantize(w, scheme, backend=backend)
        for _ in range(20):
            for actual, want in zip(fk.quantize(w, scheme, backend=backend), first, strict=True):
                assert_same_bits(actual, want)


@pytest.mark.slow
def test_compiles_as_one_graph():
    """torch.compile(fullgraph=True), the ops among others, equal to eager."""

    def f(w, scheme):
        q, scale = fk.quantize(w * 2, scheme)
        return q, scale, fk.amax(w, scheme), fk.dequantize(q, scale, scheme=scheme) + 1

    w = weight((3, 130, 576))
    for scheme in SCHEMES:
        compiled = torch.compile(f, fullgraph=True)
        for actual, want in zip(compiled(w, scheme), f(w, scheme), strict=True):
            assert_same_bits(actual, want)


def test_opcheck():
    """Schemas, fakes and autograd registration are consistent on CUDA tensors."""
    w = weight((2, 33, 576))
    q, scale = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device="cuda"), torch.empty(2, 33, 1, device="cuda")
    fk.quantize(w, "per_channel", out=(q, scale))
    ops = torch.ops.fp8_kernels
    names = ("test_faketensor", "test_autograd_registration")
    # test_schema computes with every argument, and FP8 tensors cannot.
    torch.library.opcheck(ops.amax_out.default, (w, scale.clone(), 1, -1, False), test_utils=("test_schema", *names))
    torch.library.opcheck(ops.dequantize_out.default, (q, scale, torch.empty_like(w), 1, -1), test_utils=names)
    for amax in (None, scale.clone()):
        torch.library.opcheck(ops.quantize_out.default, (w, amax, q, scale, 1, -1, False, 0), test_utils=names)


def test_the_ops_refuse_what_they_would_read_or_write_out_of_bounds():
    """A direct call of the CUDA op with a wrong shape, dtype or device raises and writes nothing."""
    if "cuda" not in fk.available_backends("cuda"):
        pytest.skip("the CUDA extension is not available here")
    op = torch.ops.fp8_kernels.quantize_out
    w, q, scale = (
        weight((1, 4, 8)),
        torch.zeros(1, 4, 8, dtype=torch.float8_e4m3fn, device="cuda"),
        torch.zeros(1, 4, 1),
    )
    good = scale.cuda()
    for arguments, message in [
        ((w, None, q, scale, 1, -1, False, 0), "`scale` must be on the CUDA device"),
        ((w, None, q[:, :3], good, 1, -1, False, 0), r"`q` must have shape \[1, 4, 8\]"),
        ((w, None, q, good[:, :2], 1, -1, False, 0), r"`scale` must have shape \[1, 4, 1\]"),
        ((w, good.half(), q, good, 1, -1, False, 0), "`amax` must be float32"),
        ((w.int(), None, q, good, 1, -1, False, 0), "`w` must be float32, float16 or bfloat16"),
        ((w, None, w, good, 1, -1, False, 0), "`q` must be float8_e4m3fn or float8_e5m2"),
        ((w, None, q, good.half(), 1, -1, False, 0), "`scale` must be float32, bfloat16 or float8_e8m0fnu"),
        ((w, None, q, good, 0, -1, False, 0), "block sizes must be positive or -1, got 0 and -1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    assert not q.view(torch.uint8).any() and not good.any()


@pytest.mark.parametrize("name", sorted(set(BAD_CALLS) - {"device", "other device's backend"}))
def test_bad_arguments_are_named(name):
    """The CUDA op is called without the checks of Python, and what it refuses is said as they say it."""
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6, device="cuda"))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4)], ids=str)
def test_bad_outputs_of_empty_weights_are_refused_too(shape):
    """Where there is nothing to do, there is still something to check."""
    w = torch.empty(shape, device="cuda")
    q, scale = fk.quantize(w, "per_block")
    for out in [(q[..., None], scale), (q, scale[..., None]), (q, scale.half()), (q.cpu(), scale), (q, None)]:
        with pytest.raises((TypeError, ValueError), match="`out"):
            fk.quantize(w, "per_block", out=out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device(backend):
    """Whatever the current device is."""
    w = weight((256, 2048)).to("cuda:1")
    with torch.cuda.device(0):
        for scheme in SCHEMES:
            check(fk.quantize(w, scheme, backend=backend), w, scheme)
            assert torch.cuda.current_device() == 0
