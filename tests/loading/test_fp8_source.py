"""Checkpoints that are FP8 already, loaded into a plan that quantizes."""

import pytest
import torch
from torch import nn

import fp8_kernels as fk
from fp8_kernels.errors import ConflictingShardError, LoadError, NonFiniteWeightError
from fp8_kernels.loading import LayerwiseLoader

from .helpers import SCHEMES, Model, assert_quantized, load, values


def _assert_codes(module, q, scale, leaf="weight"):
    held, held_scale = getattr(module, leaf), getattr(module, f"{leaf}_scale")
    assert torch.equal(held.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(held_scale.float(), scale.float().expand(held_scale.shape))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp8_checkpoint_into_quantizing_layer(scheme):
    """With scales for the same groups, codes and scales arrive untouched, also those that quantizing would not give;
    without them the data is refused."""
    model = Model(fc=(256, 384), fc2=(6, 36))
    q, scale = fk.quantize(values(256, 384), scheme)
    q = q.clone()
    q.view(torch.uint8)[q.float().abs() > 200] = 0x30  # no group has its largest code any more
    w = values(6, 36)
    with LayerwiseLoader(model, scheme, device="cpu") as loader:
        loader.copy_codes(model.fc.weight, q, scale, scheme)
        model.fc2.weight.data.copy_(w)
        loader.copy_codes(model.fc.weight, q, scale, scheme)  # a duplicate is verified
    _assert_codes(model.fc, q, scale)
    assert_quantized(model, "fc2.weight", w, scheme)
    assert loader.report.duplicates == ["fc.weight"]
    with pytest.raises(LoadError, match="without its scale"):
        load(Model(fc=(256, 384)), lambda params: params["fc.weight"].data.copy_(q), scheme)


@pytest.mark.parametrize("into", SCHEMES)
@pytest.mark.parametrize("source", SCHEMES)
def test_another_granularity_is_quantized_again(source, into):
    """From the float32 values that codes and scales stand for. One scale for all is also one for each row."""
    model, w = Model(fc=(130, 260)), values(130, 260)
    q, scale = fk.quantize(w, source)
    with LayerwiseLoader(model, into, device="cpu") as loader:
        loader.copy_codes(model.fc.weight, q, scale, source)
    lossless = source == into or (source == "per_tensor" and into != "mxfp8")
    if lossless:
        _assert_codes(model.fc, q, scale)
    else:
        assert_quantized(model, "fc.weight", fk.dequantize(q, scale, torch.float32, source), into)


@pytest.mark.parametrize(
    ("source", "into"),
    [
        (fk.PerBlock(96, 128), fk.PerBlock(128, 128)),  # as many blocks of 130 rows
        (fk.PerGroup(96), fk.PerGroup(128)),  # as many groups of 130 columns
        (fk.PerChannel(), fk.PerChannel(pow2=True)),
        (fk.PerTensor(), fk.PerGroup(32, pow2=True)),
        (fk.PerTensor((30, 100)), fk.PerTensor((100, 30))),
    ],
)
def test_scales_of_the_same_shape_that_are_others(source, into):
    """Scales of as many groups that cover other elements, or are no powers of two where the scheme says so: what they
    stand for is quantized again."""
    model, w = Model(fc=(130, 130)), values(130, 130)
    q, scale = fk.quantize(w, source)
    with LayerwiseLoader(model, into, device="cpu") as loader:
        loader.copy_codes(model.fc.weight, q, scale, source)
    assert_quantized(model, "fc.weight", fk.dequantize(q, scale, torch.float32, source), into)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("into", ["per_channel", "per_block"])
def test_scales_of_any_floating_point_dtype(into, dtype):
    """Models in float16 store their scales so: the same values, in float32, as they are or dequantized, by either way
    in."""
    q, scale = fk.quantize(values(256, 384))
    scale = scale.to(dtype)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(384, 256, bias=False, dtype=torch.bfloat16))
    tensors = [("0.weight", q), ("0.weight_scale", scale)]
    fk.load_checkpoint(model, tensors, into, device="cpu")
    streamed = dict(fk.quantize_weights(tensors, into))
    if into == "per_channel":
        wanted = q, scale.float()
    else:
        wanted = fk.quantize(fk.dequantize(q, scale.float(), torch.float32), into)
    _assert_codes(model[0], *wanted)
    assert torch.equal(streamed["0.weight"].view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.equal(streamed["0.weight_scale"], wanted[1])


def test_powers_of_two_are_taken_as_they_are():
    """By a scheme that stores powers of two."""
    model, scheme = Model(fc=(6, 36)), fk.PerChannel(pow2=True)
    q, scale = fk.quantize(values(6, 36), scheme)
    with LayerwiseLoader(model, scheme, device="cpu") as loader:
        loader.copy_codes(model.fc.weight, q, scale * 4)
    _assert_codes(model.fc, q, scale * 4)


def test_shards_of_a_fused_weight():
    """Halves with a scale of their own: taken where rows or blocks are, quantized together where one scale covers
    both; experts one by one, and what is not quantized in its own dtype."""
    halves = [fk.quantize(values(128, 256), s) for s in ("per_tensor", "per_tensor")]
    exact = torch.cat([fk.dequantize(q, scale, torch.float32) for q, scale in halves])
    for scheme in ("per_channel", "per_block", "per_tensor"):
        model = Model(gate_up=(256, 256), experts=(2, 256, 256), lm_head=(128, 256))
        with LayerwiseLoader(model, scheme, device="cpu", ignore=["lm_head"]) as loader:
            for i, (q, scale) in enumerate(halves):
                loader.copy_codes(model.gate_up.weight.data.narrow(0, i * 128, 128), q, scale)
                for expert in range(2):
                    loader.copy_codes(model.experts.weight.data[expert].narrow(0, i * 128, 128), q, scale.reshape(1))
            loader.copy_codes(model.lm_head.weight, *halves[0])
        assert torch.equal(model.lm_head.weight, exact[:128].bfloat16())
        if scheme == "per_tensor":
            assert_quantized(model, "gate_up.weight", exact, scheme)
            continue
        codes = torch.cat([q.view(torch.uint8) for q, _ in halves])
        for held in (model.gate_up.weight, *model.experts.weight):
            assert torch.equal(held.view(torch.uint8), codes)
        rows = len(model.gate_up.weight_scale) // 2
        assert (model.gate_up.weight_scale[:rows] == halves[0][1]).all()
        assert (model.experts.weight_scale[:, rows:] == halves[1][1]).all()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("into", ["per_channel", "per_block", "per_group"])
def test_one_scale_for_all_that_arrives_twice(into, waits):
    """Codes and scales stay those that arrived, whether or not the weight was finished in between."""
    model = Model(fc=(256, 384), fc2=(6, 36))
    q, scale = fk.quantize(values(256, 384), "per_tensor")
    halves = [(model.fc.weight.data[rows], q[rows]) for rows in (slice(0, 128), slice(128, 256))]
    with LayerwiseLoader(model, into, device="cpu") as loader:
        for part, codes in halves:
            loader.copy_codes(part, codes, scale)
        if not waits:
            model.fc2.weight.data.zero_()
        for part, codes in halves:
            loader.copy_codes(part, codes, scale)
        model.fc2.weight.data.zero_()
    _assert_codes(model.fc, q, scale)
    assert loader.report.duplicates[:2] == [f"fc.weight rows {r} of 256, all columns" for r in ("0:128", "128:256")]
    assert not loader.report.rewrites


@pytest.mark.parametrize("into", SCHEMES)
@pytest.mark.parametrize("source", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 32), (96, 32), (1, 96, 32)])
def test_weights_that_one_scale_covers(source, into, shape):
    """Smaller than a block or a group, or one row: what one scale covers is told, and any other granularity follows."""
    w = torch.randn(shape).bfloat16()
    q, scale = fk.quantize(w, source)
    model = Model(experts=shape) if len(shape) == 3 else Model(fc=shape)
    (name,) = model.state_dict()
    with LayerwiseLoader(model, into, device="cpu") as loader:
        loader.copy_codes(model.get_parameter(name), q, scale, source)
    held = fk.dequantize(model.get_parameter(name), model.get_parameter(f"{name}_scale"), torch.float32, into)
    exact = fk.dequantize(q, scale, torch.float32, source)
    again = fk.dequantize(*fk.quantize(exact, into), torch.float32, into)
    assert torch.equal(held, exact) or torch.equal(held, again)


@pytest.mark.parametrize("mode", ["transactional", "streaming"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reload_with_codes(scheme, mode):
    """They go where those of the first load are, whether that memory serves meanwhile or not."""
    model, w = Model(fc=(128, 384)), values(128, 384)
    load(model, lambda params: params["fc.weight"].data.copy_(w), scheme)
    pointers = [p.data_ptr() for p in model.parameters()]
    q, scale = fk.quantize(w * 3, scheme)
    with LayerwiseLoader(model, device="cpu", reload=mode) as loader:
        for _ in range(2):
            loader.copy_codes(model.fc.weight, q, scale, scheme)
    _assert_codes(model.fc, q, scale)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_what_is_refused():
    """Other shapes, scales that fit nothing, NaN, and another value for what arrived before."""
    q, scale = fk.quantize(values(6, 36), "per_channel")
    nan = q.clone()
    nan.view(torch.uint8)[2, 3] = 0xFF

    def run(codes, scales, *more):
        model = Model(fc=(6, 36), fc2=(6, 36))
        with LayerwiseLoader(model, device="cpu") as loader:
            loader.copy_codes(model.fc.weight, codes, scales)
            model.fc2.weight.data.zero_()
            for again in more:
                loader.copy_codes(model.fc.weight, codes, again)

    for calls, error, message in (
        ([q[:3], scale[:3]], LoadError, r"`fc.weight` must be FP8 of shape \(6, 36\)"),
        ([q.float(), scale], LoadError, "`fc.weight` must be FP8"),
        ([q, scale.int()], LoadError, "scales for `fc.weight` must be floating-point numbers, got torch.int32"),
        ([q, scale.expand(6, 7)], ValueError, "`fc.weight`: `scheme` must be given"),
        ([nan, scale], NonFiniteWeightError, "`fc.weight`"),
        ([q, scale * float("inf")], NonFiniteWeightError, "fc.weight"),
        ([q, scale, scale * 2], ConflictingShardError, "fc.weight"),
    ):
        with pytest.raises(error, match=message):
            run(*calls)
    loader = LayerwiseLoader(Model(fc=(6, 36)), device="cpu")
    with pytest.raises(RuntimeError, match="must be entered"):
        loader.copy_codes(loader.model.fc.weight, q, scale)


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("scale_first", [True, False])
def test_load_checkpoint_pairs_codes_with_scales(scale_first, suffix):
    """An iterable of FP8 weights, scales before or after them: as they are where they fit, also when reloading."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 384, dtype=torch.bfloat16), nn.Linear(384, 6, dtype=torch.bfloat16))
    q, scale = fk.quantize(values(384, 256), "per_block")
    w = values(6, 384)
    pair = [("0.weight", q), (f"0.weight{suffix}", scale)]
    rest = [("0.bias", values(384)), ("1.weight", w), ("1.bias", values(6))]
    tensors = [*(pair[::-1] if scale_first else pair), *rest]
    fk.load_checkpoint(model, iter(tensors), "per_block", device="cpu")
    _assert_codes(model[0], q, scale)
    assert_quantized(model, "1.weight", w, "per_block")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 384, dtype=torch.bfloat16), nn.Linear(384, 6, dtype=torch.bfloat16))
    with pytest.raises(LoadError, match="`0.weight` must be loaded from high precision"):
        fk.load_checkpoint(model, [pair[0], *rest], "per_block", device="cpu")


@pytest.mark.parametrize("scale_first", [True, False])
def test_load_checkpoint_copies_what_waits_for_its_partner(scale_first):
    """An iterable may use one buffer for all that it gives: the first of codes and scale has been read when the second
    is asked for."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 384, bias=False, dtype=torch.bfloat16))
    q, scale = fk.quantize(values(384, 256))
    buffer = torch.empty(q.nbytes, dtype=torch.uint8)

    def tensors():
        pair = [("0.weight", q), ("0.weight_scale", scale)]
        for name, t in pair[::-1] if scale_first else pair:
            yield name, buffer[: t.nbytes].view(t.dtype).view(t.shape).copy_(t)
            buffer.fill_(1)

    fk.load_checkpoint(model, tensors(), device="cpu")
    _assert_codes(model[0], q, scale)


@pytest.mark.parametrize("again", ["0.weight", "0.weight_scale"])
def test_load_checkpoint_compares_what_arrives_twice_before_its_partner(again):
    """The same once more is dropped; another value is refused, where the last one silently won."""
    q, scale = fk.quantize(values(384, 256))
    pair = {"0.weight": q, "0.weight_scale": scale}
    other = {"0.weight": (-q.float()).to(q.dtype), "0.weight_scale": scale * 2}
    partner = next(name for name in pair if name != again)
    for second, error in ((pair[again].clone(), None), (other[again], ConflictingShardError)):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(256, 384, bias=False, dtype=torch.bfloat16))
        tensors = [(again, pair[again]), (again, second), (partner, pair[partner])]
        if error is None:
            fk.load_checkpoint(model, tensors, device="cpu")
            _assert_codes(model[0], q, scale)
        else:
            with pytest.raises(error, match=f"`{again}` arrived twice"):
                fk.load_checkpoint(model, tensors, device="cpu")
            assert model[0].weight.is_meta
