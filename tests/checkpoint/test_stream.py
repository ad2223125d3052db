"""The stream an engine reads equals the folder it would have read, to the bit, without holding the checkpoint."""

import random

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint

from . import tiny

CHOICES = [("per_channel", "compressed-tensors"), ("per_tensor", "compressed-tensors"), ("per_block", "fp8")]


def equal_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert (found[name].dtype, found[name].shape) == (t.dtype, t.shape), name
        assert torch.equal(found[name].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("scheme,format", CHOICES)
@pytest.mark.parametrize("names_known", [True, False])
def test_stream_equals_the_folder(scheme, format, names_known, tmp_path):
    """Whatever the order of the tensors: same names, shapes, codes and scales, and the same config."""
    state = tiny.tensors()
    folder = tiny.write_sharded(tmp_path / "in", state)
    quantize_checkpoint(folder, tmp_path / "out", scheme, format)
    items = list(state.items())
    random.shuffle(items)
    stream = fk.quantize_weights(iter(items), scheme, format, names=state if names_known else None)
    equal_bits(dict(stream), dict(open_checkpoint(tmp_path / "out").tensors()))
    expected = open_checkpoint(tmp_path / "out").config["quantization_config"]
    assert fk.quantization_config(folder, scheme, format) == expected
    assert fk.quantization_config({n: t.to("meta") for n, t in items}, scheme, format) == expected
    assert stream.report.bytes_in == sum(t.nbytes for t in state.values())
    assert stream.report.bytes_out == sum(t.nbytes for _, t in open_checkpoint(tmp_path / "out").tensors())
    assert stream.report.quantized_tensors == len(tiny.weights(state))
    assert stream.report.passed_through.keys() == state.keys() - set(tiny.weights(state))


SELECTIONS = {
    "ignored": {"ignore": ["model.layers.0.mlp", "re:o_proj"]},
    "included": {"include": ["lm_head"]},
    "two schemes": {"scheme": "per_tensor", "schemes": {"*.mlp": "per_channel"}},
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_selection_equals_that_of_the_folder(selection, tmp_path):
    """`ignore`, `include` and schemes by pattern choose what they choose for a folder, in the stream and the config."""
    state = tiny.tensors(dtype=torch.float32)
    folder = tiny.write_sharded(tmp_path / "in", state)
    quantize_checkpoint(folder, tmp_path / "out", **selection)
    stream = fk.quantize_weights(state.items(), **selection)
    equal_bits(dict(stream), dict(open_checkpoint(tmp_path / "out").tensors()))
    assert (
        fk.quantization_config(folder, **selection) == open_checkpoint(tmp_path / "out").config["quantization_config"]
    )
    ignored = [name for name, why in stream.report.passed_through.items() if why.startswith("ignore=")]
    assert bool(ignored) == ("ignore" in selection)


def test_families_of_experts_share_a_scale():
    """w1 and w3, gate and up: one scale for the two of an expert, another for each expert."""
    state = {
        f"mlp.experts.{e}.{part}.weight": torch.randn(6, 10) * 2.0 ** (3 * e + i)
        for e in range(2)
        for i, part in enumerate(("w1", "w3", "w2"))
    }
    found = dict(fk.quantize_weights(state.items(), "per_tensor"))
    for e in range(2):
        gate, up = (state[f"mlp.experts.{e}.{part}.weight"] for part in ("w1", "w3"))
        scale = fk.quantize(torch.cat([gate, up]), "per_tensor")[1].reshape(1)
        assert all(torch.equal(found[f"mlp.experts.{e}.{part}.weight_scale"], scale) for part in ("w1", "w3"))
        own = fk.quantize(state[f"mlp.experts.{e}.w2.weight"], "per_tensor")[1].reshape(1)
        assert torch.equal(found[f"mlp.experts.{e}.w2.weight_scale"], own)


def test_fused_weights_are_treated_alike():
    """A pattern that cuts a family apart is refused when its second member comes, whatever the scheme."""
    state = [(f"a.{m}_proj.weight", torch.randn(4, 32)) for m in "qkv"]
    for scheme in ("per_channel", "per_tensor"):
        with pytest.raises(fk.UnsupportedLayoutError, match=r"a\.k_proj.*kept.*a\.q_proj.*per_.*alike"):
            list(fk.quantize_weights(state, scheme, ignore=["*.k_proj"]))
    with pytest.raises(fk.UnsupportedLayoutError, match="alike"):
        list(fk.quantize_weights(state, schemes={"*.v_proj": "per_tensor"}))


def test_progress_and_report():
    """Progress counts the bytes that have been read, tensor by tensor; the report adds up at any time."""
    state, said = tiny.tensors(), []
    stream = fk.quantize_weights(state.items(), progress=lambda done, name: said.append((done, name)))
    assert next(stream)[0] == "model.embed_tokens.weight" and stream.report.shards == 1
    rest = dict(stream)
    assert [name for _, name in said] == list(state)
    assert [done for done, _ in said] == [
        sum(t.nbytes for t in list(state.values())[: i + 1]) for i in range(len(state))
    ]
    assert len(rest) == 2 * stream.report.quantized_tensors + len(stream.report.passed_through) - 1
    assert stream.report.passed_through["model.norm.weight"] == "1-D"
    assert f"{stream.report.quantized_tensors} weights" in str(stream.report) and stream.report.seconds > 0


def test_a_part_of_the_weights():
    """An update by buckets: patterns of other parts are no mistake there, and the bits are those of the whole."""
    state, options = tiny.tensors(), {"ignore": ["model.layers.1.mlp"]}
    whole, items, parts = dict(fk.quantize_weights(state.items(), **options)), list(state.items()), {}
    for start in range(0, len(items), 5):
        parts |= dict(fk.quantize_weights(items[start : start + 5], **options, partial=True))
    equal_bits(parts, whole)
    with pytest.raises(fk.UnmatchedPatternError):
        list(fk.quantize_weights(items[:5], **options))


def test_nothing_is_read_ahead():
    """A weight is asked for only when what came before it has left."""
    asked = []

    def source():
        for i in range(4):
            asked.append(i)
            yield f"layers.{i}.o_proj.weight", torch.randn(7, 33)

    stream = fk.quantize_weights(source(), "per_channel")
    assert asked == []
    for i in range(4):
        assert [next(stream)[0] for _ in range(2)] == [f"layers.{i}.o_proj.weight", f"layers.{i}.o_proj.weight_scale"]
        assert asked == list(range(i + 1))


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
def test_source_may_reuse_its_memory(scheme):
    """Members of a family that have to wait are copies: a source that overwrites one buffer changes nothing."""
    names = [f"layers.0.{m}.weight" for m in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")]
    state = {name: torch.randn(7, 33, dtype=torch.bfloat16) * 2.0**i for i, name in enumerate(names)}

    def reusing():
        buffer = torch.empty(7, 33, dtype=torch.bfloat16)
        for name, t in state.items():
            yield name, buffer.copy_(t)
            buffer.fill_(float("nan"))

    equal_bits(dict(fk.quantize_weights(reusing(), scheme)), dict(fk.quantize_weights(state.items(), scheme)))


def test_a_member_that_comes_again_is_copied_too():
    """It does not complete its family, though only one other is missing: what waits must not lie in the source."""
    q, k, v = (torch.randn(7, 33).bfloat16() for _ in range(3))
    given = [("q_proj.weight", q), ("k_proj.weight", k), ("q_proj.weight", q), ("v_proj.weight", v)]
    buffer = torch.empty(7, 33, dtype=torch.bfloat16)
    found = dict(fk.quantize_weights(((name, buffer.copy_(t)) for name, t in given), "per_tensor"))
    equal_bits(found, dict(fk.quantize_weights(dict(given), "per_tensor")))


def test_held_memory_is_one_family():
    """With per_tensor scales at most a family's weights are held, in the order of a checkpoint; else one weight."""
    state = tiny.tensors(num_layers=3)
    largest = max(t.nbytes for n, t in state.items() if n in tiny.weights(state))
    for scheme, weights in (("per_channel", 1), ("per_tensor", 3)):
        stream = fk.quantize_weights(state.items(), scheme)
        assert len(dict(stream)) == len(state) + len(tiny.weights(state))
        assert stream.report.peak_staging_bytes <= weights * largest


def test_incomplete_family_leaves_at_the_end_with_its_own_scale():
    """Without names, members whose partners never come share the scale of those that did."""
    q, k = torch.randn(5, 16), 8 * torch.randn(3, 16)
    found = dict(fk.quantize_weights([("a.q_proj.weight", q), ("a.k_proj.weight", k)], "per_tensor"))
    scale = fk.quantize(torch.cat([q, k]), "per_tensor")[1].reshape(1)
    assert torch.equal(found["a.q_proj.weight_scale"], scale) and torch.equal(found["a.k_proj.weight_scale"], scale)
    alone = dict(fk.quantize_weights([("a.q_proj.weight", q)], "per_tensor", names=["a.q_proj.weight"]))
    assert torch.equal(alone["a.q_proj.weight"].view(torch.uint8), fk.quantize(q, "per_tensor")[0].view(torch.uint8))


def test_non_finite_weights_of_long_streams(monkeypatch):
    """Weights are looked at some at a time; at the end every one that is not finite is named, in order."""
    monkeypatch.setattr("fp8_kernels.checkpoint.stream._LOOK_AT", 3)
    good, bad = torch.randn(2, 32), torch.full((2, 32), float("inf"))
    items = [(f"layers.{i}.o_proj.weight", bad if i in (1, 3, 10) else good) for i in range(11)]
    with pytest.raises(fk.NonFiniteWeightError, match=r"3 weights.*layers\.1\..*layers\.3\..*layers\.10\."):
        list(fk.quantize_weights(items))


def test_what_is_wrong_is_named():
    """NaN and unmatched patterns at the end, a weight that cannot be held on the way, bad arguments at once."""
    good, bad = ("x.o_proj.weight", torch.randn(4, 32)), torch.randn(4, 32)
    bad[3, 5] = float("nan")
    with pytest.raises(fk.NonFiniteWeightError, match=r"1 weights.*y\.o_proj\.weight"):
        list(fk.quantize_weights([good, ("y.o_proj.weight", bad)]))
    with pytest.raises(fk.UnmatchedPatternError, match="nowhere"):
        list(fk.quantize_weights([good], ignore=["nowhere"]))
    # A rank that reads a part of a checkpoint knows the names of all of it.
    list(fk.quantize_weights([good], ignore=["elsewhere.*"], names=[good[0], "elsewhere.o_proj.weight"]))
    with pytest.raises(fk.UnsupportedLayoutError, match=r"x\.o_proj\.weight.*128"):
        list(fk.quantize_weights([good], "per_block", "fp8"))
    with pytest.raises(fk.CheckpointError, match=r"z\.o_proj\.weight.*float8_e4m3fn"):
        list(fk.quantize_weights([("z.o_proj.weight", torch.zeros(4, 32).to(torch.float8_e4m3fn))]))
    with pytest.raises(ValueError, match="format"):
        fk.quantize_weights([good], format="gguf")
    with pytest.raises(ValueError, match="scheme"):
        fk.quantize_weights([good], "per_planet")
    with pytest.raises(fk.CheckpointError, match="no weight"):
        fk.quantization_config([("norm.weight", torch.zeros(4, device="meta"))])


def test_weights_may_be_given_by_name_but_not_by_path(tmp_path):
    """A dict is its items; a folder, opened or not, is told how to become what is wanted."""
    state = tiny.tensors(num_layers=1)
    equal_bits(dict(fk.quantize_weights(state)), dict(fk.quantize_weights(state.items())))
    folder = tiny.write_single(tmp_path / "in", state)
    for weights in (str(folder), folder, open_checkpoint(folder)):
        with pytest.raises(TypeError, match=r"open_checkpoint\(path\).tensors\(\)"):
            fk.quantize_weights(weights)


def test_a_bare_string_is_no_list_of_patterns():
    """Its letters would be patterns."""
    with pytest.raises(TypeError, match="`include` must be a list of patterns, got the string 'lm_head'"):
        fk.quantize_weights({}, include="lm_head")
