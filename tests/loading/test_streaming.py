"""What is quantized before its weight is complete: the bits, what stays readable, and what is refused."""

import contextlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fp8_kernels.errors import ConflictingShardError, LoadError
from fp8_kernels.loading import LayerwiseLoader, arrivals, hands, staging

from .helpers import SCHEMES, Model, assert_quantized, load, values

STREAMING = [s for s in SCHEMES if s != "per_tensor"]
# Smaller, equal to, larger than and no multiple of blocks (128) and groups (32).
NUM_ROWS, NUM_COLS = [1, 7, 128, 130, 260, 300], [1, 31, 32, 64, 200, 256]


@st.composite
def _shards(draw):
    """A weight's shape, and rectangles of it in any order that cover it, some of them twice."""
    num_rows, num_cols = draw(st.sampled_from(NUM_ROWS)), draw(st.sampled_from(NUM_COLS))
    num_experts = draw(st.sampled_from([None, 1, 3]))
    step_n, step_k = draw(st.sampled_from([1, 2, 128])), draw(st.sampled_from([1, 32, 128]))
    cuts = []
    for size, step in ((num_rows, step_n), (num_cols, step_k)):
        inner = draw(st.lists(st.integers(0, size // step), max_size=3))
        cuts.append(sorted({0, size, *(i * step for i in inner)}))
    boxes = [
        (e, slice(a, b), slice(c, d))
        for e in ([None] if num_experts is None else range(num_experts))
        for a, b in zip(cuts[0], cuts[0][1:], strict=False)
        for c, d in zip(cuts[1], cuts[1][1:], strict=False)
    ]
    boxes = draw(st.permutations(boxes + draw(st.lists(st.sampled_from(boxes), max_size=3))))
    return (num_rows, num_cols) if num_experts is None else (num_experts, num_rows, num_cols), boxes


@contextlib.contextmanager
def counted_launches():
    """The shapes of what is quantized inside."""
    launches, real = [], staging.quantize_into

    def counted(w, *args):
        launches.append(tuple(w.shape))
        return real(w, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "quantize_into", counted)
        yield launches


@pytest.fixture
def no_whole_units(monkeypatch):
    """Shards of a small unit do not wait for each other."""
    monkeypatch.setattr("fp8_kernels.loading.arrivals.WHOLE_BYTES", 0)


@settings(deadline=None, max_examples=150)
@given(
    _shards(),
    st.sampled_from(SCHEMES),
    st.sampled_from([None, 0, 40_000]),
    st.booleans(),
    st.sampled_from([0, 20_000, arrivals.WHOLE_BYTES]),
    st.sampled_from([0, arrivals.ACCUMULATE_BYTES]),
    st.integers(0, 99),
)
def test_any_order_any_split_any_budget(shards, scheme, budget, stream, whole_bytes, accumulate_bytes, seed):
    """Whatever the order and the cuts of the shards, whatever spills, streamed or not, duplicates included: the
    bytes of quantizing the whole weight at once."""
    shape, boxes = shards
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals, "WHOLE_BYTES", whole_bytes)
        patch.setattr(arrivals, "ACCUMULATE_BYTES", accumulate_bytes)
        _load_and_compare(shape, boxes, scheme, budget, stream, seed)


def _load_and_compare(shape, boxes, scheme, budget, stream, seed):
    model = Model(experts=shape, w13=shape)
    weights = {name: values(*shape) for name in ("experts", "w13")}
    with LayerwiseLoader(model, scheme, device="cpu", stream=stream, staging_budget=budget) as loader:
        for index in boxes:
            index = index if len(shape) == 3 else index[1:]
            for name, w in weights.items():
                view = model.get_parameter(f"{name}.weight").data[index]
                if seed % 3:
                    view.copy_(w[index])
                else:
                    view.t().copy_(w[index].t())
    for name, w in weights.items():
        assert_quantized(model, f"{name}.weight", w, scheme)
    assert not loader.report.rewrites


@pytest.mark.parametrize("scheme", STREAMING)
def test_a_streamed_weight_is_never_held_whole(scheme, no_whole_units):
    """Shards of whole groups need the memory of two shards, not of the weight; leftovers need no more than it."""
    w = values(4096, 256)

    def loading(rows):
        def run(params):
            for start in range(0, 4096, rows):
                params["fc.weight"].data[start : start + rows].copy_(w[start : start + rows])

        return run

    model = Model(fc=(4096, 256))
    loader = load(model, loading(512), scheme)
    assert loader.report.peak_staging_bytes == 2 * 512 * 256 * 2
    assert_quantized(model, "fc.weight", w, scheme)
    model = Model(fc=(4096, 256))
    loader = load(model, loading(200), scheme)
    assert loader.report.peak_staging_bytes <= w.nbytes + 2 * 200 * 256 * 2
    assert_quantized(model, "fc.weight", w, scheme)


@pytest.mark.parametrize("source", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sources_of_other_dtypes_are_not_rounded(scheme, source, no_whole_units):
    """A shard is quantized from what arrived, also where the rest of its group waits in another dtype."""
    w = values(300, 64, dtype=source)
    model = Model(fc=(300, 64))

    def loading(params):
        p = params["fc.weight"].data
        p[100:300].copy_(w[100:300])
        p[0:100].copy_(w[0:100].bfloat16())

    load(model, loading, scheme)
    wanted = torch.cat([w[:100].bfloat16().float(), w[100:].float()])
    assert_quantized(model, "fc.weight", wanted, scheme)


@pytest.mark.parametrize("scheme", STREAMING)
def test_the_latest_shard_can_be_read_and_rewritten(scheme, no_whole_units):
    """`p.copy_(w); p.copy_(f(p))` works shard by shard without an option: a thread's latest shard is held open."""
    w, other = values(256, 64), values(3, 5)
    model = Model(fc=(256, 64), fc2=(3, 5))

    def loading(params):
        for rows in (slice(0, 128), slice(128, 256)):
            shard = params["fc.weight"].data[rows]
            shard.copy_(w[rows])
            assert torch.equal(shard.clone(), w[rows])
            shard.copy_(shard * 2)
        params["fc2.weight"].data.copy_(other)

    loader = load(model, loading, scheme)
    assert_quantized(model, "fc.weight", w * 2, scheme)
    assert len(loader.report.rewrites) == 2


@pytest.mark.parametrize("scheme", STREAMING)
def test_shards_of_a_small_unit_wait_for_each_other(scheme):
    """Neighbours that arrive one after the other, upwards or downwards, are quantized in one launch, and may be read
    until then; a shard that is no neighbour ends it."""
    w = values(256, 64)

    def loading(*starts, read=False):
        def run(params):
            for start in starts:
                params["fc.weight"].data[start : start + 64].copy_(w[start : start + 64])
            if read:
                params["fc.weight"].data.mul_(2)

        return run

    for starts, count in (
        ((0, 64, 128, 192), 1),
        ((192, 128, 64, 0), 1),
        ((64, 0, 128, 192), 1),
        ((0, 128, 64, 192), 4),
    ):
        model = Model(fc=(256, 64))
        with counted_launches() as launches:
            loader = load(model, loading(*starts), scheme)
        assert_quantized(model, "fc.weight", w, scheme)
        if scheme != "per_block":  # where half a block waits for the other half
            assert len(launches) == count
        assert loader.report.peak_staging_bytes <= 2 * w.nbytes
    model = Model(fc=(256, 64))
    load(model, loading(0, 64, 128, 192, read=True), scheme)
    assert_quantized(model, "fc.weight", w * 2, scheme)


@pytest.mark.parametrize("scheme", STREAMING)
def test_reading_what_is_streamed(scheme, no_whole_units):
    """Rows that were quantized while their weight is open cannot be read back; `stream=False`, by name, keeps them."""
    w = values(256, 64)

    def loading(params):
        p = params["fc.weight"].data
        p[:128].copy_(w[:128])
        p[128:].copy_(w[128:])
        p.copy_(p * 2)

    with pytest.raises(LoadError, match=r"fc.weight cannot be read: .* `stream={'fc.weight': False}`"):
        load(Model(fc=(256, 64)), loading, scheme)
    for stream in (False, {"fc.weight": False}, {"*": False}):
        model = Model(fc=(256, 64))
        load(model, loading, scheme, stream=stream)
        assert_quantized(model, "fc.weight", w * 2, scheme)
    with pytest.raises(LoadError, match="cannot be read"):
        load(Model(fc=(256, 64)), loading, scheme, stream={"*": False, "fc.*": True})


@pytest.mark.parametrize("scheme", STREAMING)
def test_rewriting_what_is_streamed(scheme, no_whole_units):
    """While a weight is open, whole groups may arrive again and the last value counts; a part of a group may only
    say what was said before."""
    w, new = values(390, 128), values(128, 128)
    wanted = torch.cat([new, w[128:]])

    def loading(again):
        def run(params):
            p = params["fc.weight"].data
            p[:128].copy_(w[:128])
            p[128:256].copy_(w[128:256])
            again(p)
            p[256:].copy_(w[256:])

        return run

    model = Model(fc=(390, 128))
    loader = load(model, loading(lambda p: p[:128].copy_(new)), scheme)
    assert_quantized(model, "fc.weight", wanted, scheme)
    assert loader.report.rewrites == ["fc.weight rows 0:128 of 390, all columns"]

    def equal(p):
        p[:128].copy_(w[:128])
        p[3:7, 5:20].copy_(w[3:7, 5:20])
        p[100:200].copy_(w[100:200])
        p[::2][:50].copy_(w[::2][:50])
        p[[3, 70]] = w[[3, 70]]
        p.index_copy_(0, torch.tensor([1, 127]), w[[1, 127]])

    model = Model(fc=(390, 128))
    loader = load(model, loading(equal), scheme)
    assert_quantized(model, "fc.weight", w, scheme)
    assert len(loader.report.duplicates) + len(loader.report.rewrites) == 6

    refused = [
        lambda p: p[3, :5].fill_(77.0),
        lambda p: p[::2][:50].copy_(w[::2][:50] * -3),
        lambda p: p.index_copy_(0, torch.tensor([1, 127]), w[[1, 127]] * -3),
        lambda p: p[3:7].add_(1),
        lambda p: p[:, 5].mul_(2),
    ]
    for change in refused:
        with pytest.raises(LoadError, match=r"fc.weight.* cannot be .*`stream={'fc.weight': False}`"):
            load(Model(fc=(390, 128)), loading(change), scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", ["whole", "halves", "transposed", "interleaved", "flat", "slices"])
def test_fused_expert_checkpoints(scheme, layout):
    """Experts in one tensor, `[E, 2I, H]` or transposed, in halves or interleaved, are quantized per expert; those
    that complete together in one launch."""
    experts = values(5, 64, 32)
    model = Model(w13=(5, 64, 32))

    def loading(params):
        p = params["w13.weight"].data
        if layout == "whole":
            p.copy_(experts)
        elif layout == "halves":
            p[:, :32].copy_(experts[:, :32])
            p[:, 32:].copy_(experts[:, 32:])
        elif layout == "transposed":
            p.transpose(1, 2).copy_(experts.transpose(1, 2).contiguous())
        elif layout == "interleaved":
            p[:, 0::2].copy_(experts[:, 0::2])
            p[:, 1::2].copy_(experts[:, 1::2])
        elif layout == "flat":
            p.view(-1).copy_(experts.view(-1))
        elif layout == "slices":
            p[3:].copy_(experts[3:])
            p[:3].copy_(experts[:3])

    with counted_launches() as launches:
        loader = load(model, loading, scheme)
    assert_quantized(model, "w13.weight", experts, scheme)
    assert loader.report.quantized_units == 5
    if layout in ("whole", "transposed", "flat"):
        assert launches == [(5, 64, 32)]
    elif layout == "slices":
        assert launches == [(2, 64, 32), (3, 64, 32)]


def test_experts_of_one_copy_are_bounded(monkeypatch):
    """A layer of experts that arrives in one copy passes in chunks; a composed loader over more than one is refused by
    name, and works with `stream=False`."""
    monkeypatch.setattr("fp8_kernels.loading.streams.CHUNK_BYTES", 3 * 64 * 32 * 2)
    experts = values(8, 64, 32)

    def copying(params):
        params["experts.weight"].data.copy_(experts)

    def composed(params):
        p = params["experts.weight"].data
        p.copy_(experts)
        p.copy_(p * 2)

    for scheme in SCHEMES:
        model = Model(experts=(8, 64, 32))
        loader = load(model, copying, scheme)
        assert loader.report.peak_staging_bytes == 3 * 64 * 32 * 2
        assert_quantized(model, "experts.weight", experts, scheme)
        with pytest.raises(LoadError, match=r"experts.weight.* cannot be read"):
            load(Model(experts=(8, 64, 32)), composed, scheme)
        model = Model(experts=(8, 64, 32))
        load(model, composed, scheme, stream={"experts.*": False})
        assert_quantized(model, "experts.weight", experts * 2, scheme)
    monkeypatch.undo()
    for scheme in SCHEMES:  # one chunk: held open
        model = Model(experts=(8, 64, 32))
        load(model, composed, scheme)
        assert_quantized(model, "experts.weight", experts * 2, scheme)


def test_a_conflict_after_the_end_is_refused():
    """Once the weight is complete and its thread has moved on, another value is a conflict, streamed or not."""
    w, other = values(256, 64), values(3, 5)

    def loading(params):
        params["fc.weight"].data[:128].copy_(w[:128])
        params["fc.weight"].data[128:].copy_(w[128:])
        params["fc2.weight"].data.copy_(other)
        params["fc.weight"].data[:128].copy_(w[:128])
        params["fc.weight"].data[:1].copy_(w[:1] * 2)

    with pytest.raises(ConflictingShardError, match="fc.weight rows 0:1 of 256"):
        load(Model(fc=(256, 64), fc2=(3, 5)), loading)


def test_around_and_part():
    """The rest of a rectangle around an inner one is disjoint and complete, wherever the inner one lies."""
    box = (2, 9, 3, 8)
    for inner in [(2, 9, 3, 8), (4, 6, 5, 7), (2, 4, 3, 8), (8, 9, 7, 8), (4, 6, 3, 8)]:
        seen = torch.zeros(10, 10, dtype=torch.int)
        for a, b, c, d in [inner, *hands.around(inner, box)]:
            seen[a:b, c:d] += 1
        assert (seen[2:9, 3:8] == 1).all() and seen.sum() == 35
    whole = torch.arange(100).view(10, 10)
    assert torch.equal(hands.part(whole[2:9, 3:8], box, (4, 6, 5, 7)), whole[4:6, 5:7])
