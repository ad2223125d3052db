"""Fused weights with a scale for each part: the bytes of quantizing the parts alone, however they arrive."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import fp8_kernels as fk
from fp8_kernels.errors import ConflictingShardError, UnmatchedPatternError
from fp8_kernels.loading import LayerwiseLoader, arrivals, make_plan

from .helpers import Model, assert_quantized, load, values

# Parts of very different size, one of them odd, one row alone, two equal ones.
SEGMENTS = [(64, 16, 16), (1, 33), (40, 40), (7,)]


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(SEGMENTS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0]),
    st.sampled_from([0, arrivals.WHOLE_BYTES]),
    st.lists(st.integers(0, 96), max_size=3),
    st.integers(0, 99),
)
def test_any_order_any_split(segments, is_experts, stream, budget, whole_bytes, cuts, seed):
    """Whatever the cuts and the order of the shards, whatever spills, in one launch or several, staged or not: the
    codes and scales of each part as a weight of its own."""
    torch.manual_seed(seed)
    num_rows, experts = sum(segments), (3,) if is_experts else ()
    shape, scheme = (*experts, num_rows, 48), fk.PerTensor(segments=segments)
    w, model = values(*shape), Model(experts=shape)
    edges = sorted({0, num_rows, *(cut for cut in (*cuts, *scheme.edges) if cut <= num_rows)})
    index = [(e, slice(a, b)) for e in range(3) for a, b in zip(edges, edges[1:], strict=False)]
    index = index if is_experts else [rows for e, rows in index if not e]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals, "WHOLE_BYTES", whole_bytes)
        options = {"stream": stream, "staging_budget": budget, "segments": {"experts": segments}}
        with LayerwiseLoader(model, "per_tensor", device="cpu", **options) as loader:
            for i in torch.randperm(len(index)).tolist():
                model.experts.weight.data[index[i]].copy_(w[index[i]])
            model.experts.weight.data[index[0]].copy_(w[index[0]])
    assert_quantized(model, "experts.weight", w, scheme)
    q, scale = model.experts.weight, model.experts.weight_scale
    assert scale.shape == (*experts, len(segments))
    for i, (start, end) in enumerate(zip(scheme.edges, scheme.edges[1:], strict=False)):
        alone_q, alone_scale = fk.quantize(w[..., start:end, :], "per_tensor")
        assert torch.equal(q[..., start:end, :].view(torch.uint8), alone_q.view(torch.uint8))
        assert torch.equal(scale[..., i], alone_scale)
    assert not loader.report.rewrites


def test_a_part_that_arrives_whole_is_not_held():
    """Where the unit is large, each part is quantized as it arrives: the memory of two parts, not of the weight."""
    w, model = values(96, 512), Model(qkv=(96, 512))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals, "WHOLE_BYTES", 0)
        with LayerwiseLoader(model, "per_tensor", device="cpu", segments={"qkv": (32, 32, 32)}) as loader:
            for start in (32, 0, 64):
                model.qkv.weight.data[start : start + 32].copy_(w[start : start + 32])
    assert loader.report.peak_staging_bytes == 2 * 32 * 512 * 2
    assert_quantized(model, "qkv.weight", w, fk.PerTensor((32, 32, 32)))


def test_rewrites_and_duplicates_are_told_apart():
    """A part again, the same: verified; another one, after the end: refused."""
    w, other = values(96, 64), values(3, 5)

    def run(last):
        model = Model(qkv=(96, 64), fc=(3, 5))
        with LayerwiseLoader(model, "per_tensor", device="cpu", segments={"qkv.weight": (64, 16, 16)}) as loader:
            p = model.qkv.weight.data
            p[:64].copy_(w[:64])
            p[64:].copy_(w[64:])
            model.fc.weight.data.copy_(other)
            p[60:70].copy_(last)
        return loader

    assert run(w[60:70]).report.duplicates == ["qkv.weight rows 60:70 of 96, all columns"]
    with pytest.raises(ConflictingShardError, match="qkv.weight rows 60:70"):
        run(w[60:70] * 1.5)


def test_codes_with_a_scale_for_each_part_are_taken_as_they_are():
    """q, k and v of an FP8 checkpoint, each with its own scale, keep codes and scales in the fused weight."""
    w, model, segments = values(96, 64), Model(qkv=(96, 64)), (64, 16, 16)
    with LayerwiseLoader(model, "per_tensor", device="cpu", segments={"qkv": segments}) as loader:
        for start, end in ((80, 96), (0, 64), (64, 80)):
            loader.copy_codes(model.qkv.weight.data[start:end], *fk.quantize(w[start:end], "per_tensor"))
    assert_quantized(model, "qkv.weight", w, fk.PerTensor(segments))


def test_the_model_runs_and_reloads():
    """`Fp8Linear` multiplies by each part's scale; a reload keeps the segments and the memory."""
    segments, scheme = (64, 16, 16), fk.PerTensor((64, 16, 16))
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(32, 96, dtype=torch.bfloat16))
    new = [values(96, 32), values(96, 32)]
    bias, x = values(96), torch.randn(5, 32)

    def copy(w):
        model[0].weight.data.copy_(w)
        model[0].bias.data.copy_(bias)

    with LayerwiseLoader(model, "per_tensor", device="cpu", segments={"0.weight": segments}) as loader:
        copy(new[0])
    fk.make_runnable(model, None, {e.name: e.scheme for e in loader.plan.quantized})
    held = model[0].weight.data_ptr()
    for i, w in enumerate(new):
        if i:
            with LayerwiseLoader(model, reload="transactional"):
                copy(w)
        rounded = fk.dequantize(*fk.quantize(w, scheme), torch.float32, scheme)
        assert torch.equal(model(x), torch.nn.functional.linear(x, rounded, bias.float()))
    assert model[0].weight.data_ptr() == held
    model[0].activation = "dynamic"
    assert model(x).shape == (5, 96)


@pytest.mark.parametrize("segments, scheme, error, message", [
    ({"fc": (3, 4)}, "per_tensor", ValueError, r"`fc.weight`: `segments` must be 6 rows in all, got \(3, 4\)"),
    ({"fc": (3, 3)}, "per_channel", ValueError, "`fc.weight` must be per_tensor to have `segments`, got per_channel"),
    ({"fc": (7, -1)}, "per_tensor", ValueError, "`segments` must be numbers of rows"),
    ({"norm": (3,)}, "per_tensor", ValueError, "`norm.weight` must be per_tensor .*, got high precision"),
    ({"gone": (3,)}, "per_tensor", UnmatchedPatternError, "no tensor is matched by 'gone'"),
])  # fmt: skip
def test_segments_that_do_not_fit_are_refused_by_name(segments, scheme, error, message):
    """Rows that do not add up, other schemes, weights that stay as they are, patterns that match nothing."""
    with pytest.raises(error, match=message):
        make_plan(Model(fc=(6, 36), norm=(3,)), scheme, segments=segments)


def test_a_non_finite_part_is_refused():
    """One Inf in one part names the weight."""
    w, model = values(96, 64), Model(qkv=(96, 64))
    w[70, 3] = float("inf")
    with pytest.raises(fk.NonFiniteWeightError, match="qkv.weight"):
        load(model, lambda p: p["qkv.weight"].data.copy_(w), "per_tensor", segments={"qkv": (64, 16, 16)})


def test_schemes_may_say_it_too():
    """`PerTensor(segments=...)` in `schemes` is the same; experts modules, which have one scheme for both weights,
    refuse it."""
    w, model = values(96, 64), Model(qkv=(96, 64))
    load(model, lambda p: p["qkv.weight"].data.copy_(w), schemes={"qkv": fk.PerTensor((90, 6))})
    assert_quantized(model, "qkv.weight", w, fk.PerTensor((90, 6)))
    with pytest.raises(ValueError, match="experts must have one scheme for all their weights"):
        fk.Fp8Experts(2, 8, 4, torch.nn.functional.silu, fk.PerTensor((4, 4)))
