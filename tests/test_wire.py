"""load_checkpoint by spans: what the load of one mapped tensor after the other gives, and its errors."""

import dataclasses
import functools
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fp8_kernels import wire
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint
from fp8_kernels.checkpoint.spans import make_spans
from fp8_kernels.errors import (
    CheckpointError,
    ConflictingShardError,
    IncompleteLoadError,
    LoadError,
    NonFiniteWeightError,
)
from fp8_kernels.load import load_checkpoint, load_model
from fp8_kernels.loading.rules import Rules
from fp8_kernels.loading.transfer import Memory

from .loading.helpers import Model, assert_quantized, values

pytest.importorskip("transformers", minversion="5.0")

SCHEMES = ("per_tensor", "per_channel", "per_block", "per_group", "mxfp8")
FAMILIES = ("tiny_llama", "tiny_qwen3_moe", "tiny_mixtral")


def assert_same(a, b):
    """Every parameter and buffer, to the bit."""
    mine, other = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (a, b))
    assert mine.keys() == other.keys()
    for name, t in mine.items():
        assert t.dtype == other[name].dtype and t.shape == other[name].shape
        assert torch.equal(t.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


# Spans that hold a fraction of a weight, several, and all; tables that go straight to where they stay, or do not; spans
# that have memory of their own.
@pytest.mark.parametrize(("span", "early", "ahead"), [(5000, 1, 50_000), (100_000, 50_000, 1), (18 << 20, 16 << 20, 0)])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_load_of_mapped_tensors(folders, family, scheme, span, early, ahead, monkeypatch):
    """Fused experts whose halves lie apart, tied embeddings, weights cut in the middle of a block."""
    monkeypatch.setattr(wire, "_EARLY_BYTES", early)
    monkeypatch.setattr(wire, "_AHEAD_BYTES", ahead)
    monkeypatch.setattr(wire, "SMALL_BYTES", 1000)
    make = wire.make_spans
    monkeypatch.setattr(wire, "make_spans", lambda checkpoint, _, **options: make(checkpoint, span, **options))
    loaded = [load_model(folders(family), scheme, device="cpu", transfer=way) for way in ("mapped", "spans")]
    (mapped, by_tensor), (spans, by_span) = loaded
    assert_same(mapped, spans)
    assert by_span.transfer_bytes == by_span.bytes_in == by_tensor.bytes_in
    assert by_tensor.transfer is None and "slots" in by_span.transfer and by_span.transfer in str(by_span)


@pytest.mark.parametrize(("rows", "most"), [(256, 1 << 20), (2048, 8 << 20)])
def test_a_small_checkpoint_is_under_way_in_parts(rows, most, tmp_path):
    """Sixteen weights, of 0.5 MiB and of 4: an eighth of them arrives at a time, and none is cut for that."""
    weights = {f"fc{i}.weight": torch.randn(rows, 1024).bfloat16() for i in range(16)}
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint, model = open_checkpoint(tmp_path), nn.Module()
    with wire.SpanLoad(checkpoint, torch.device("cpu"), Rules("per_channel"), model) as load:
        spans = [span.num_bytes for span, _ in load._spans]
        assert max(spans) <= most and sum(spans) == checkpoint.metadata()["fc0.weight"].num_bytes * 16
        assert all(piece.whole for _, pieces in load._spans for piece in pieces)
        assert load._transfer._ring_bytes < 3 * most


def test_a_folder_that_is_fp8_already_is_taken_as_it_is(folders, tmp_path):
    """Codes and scales by spans, as `quantize_checkpoint` wrote them."""
    quantize_checkpoint(folders("tiny_qwen3_moe"), tmp_path / "out", "per_channel")
    mapped, spans = (load_model(tmp_path / "out", device="cpu", transfer=way)[0] for way in ("mapped", "spans"))
    assert_same(mapped, spans)


def test_fp32_and_fp16_data_is_rounded_once(tmp_path):
    """From what the file holds, whatever the dtype of the parameter that it is for."""
    state = {"fc.weight": torch.randn(130, 96), "other.weight": torch.randn(64, 96).half()}
    save_file(state, tmp_path / "model.safetensors")
    loaded = []
    for way in ("mapped", "spans"):
        model = Model(fc=(130, 96), other=(64, 96))
        load_checkpoint(model, tmp_path, "per_block", device="cpu", runnable=False, transfer=way)
        loaded.append(model)
    assert_same(*loaded)


def test_what_is_named_in_include_or_ignored_goes_where_it_belongs(folders):
    """A table that becomes FP8 has not arrived where it stays; one that is ignored has."""
    options = {"include": ["lm_head"], "ignore": ["model.layers.0"]}
    ways = [
        load_model(folders("tiny_qwen3_moe"), device="cpu", transfer=way, **options)[0] for way in ("mapped", "spans")
    ]
    assert_same(*ways)


def test_progress_ends_at_all_bytes(folders):
    calls = []
    _, report = load_model(folders("tiny_llama"), device="cpu", transfer="spans", progress=lambda *a: calls.append(a))
    done = [done for done, _, _ in calls]
    assert done == sorted(done) and calls[-1][:2] == (report.bytes_in, report.bytes_in)


@pytest.fixture
def state(tmp_path):
    """The tensors of `Model(fc=(130, 96), norm=(96,))`, and a function that saves them with changes."""
    whole = {"fc.weight": values(130, 96), "norm.weight": values(96)}

    def save(changes):
        merged = {name: t for name, t in (whole | changes).items() if t is not None}
        save_file(merged, tmp_path / "model.safetensors")
        return tmp_path

    return save


@pytest.mark.parametrize("early", [1, 1 << 30])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"extra.weight": torch.ones(3, 4)}, LoadError, "no place for `extra.weight`"),
        ({"fc.weight": torch.ones(96, 130)}, LoadError, r"`fc.weight` must have shape \(130, 96\), got \(96, 130\)"),
        ({"norm.weight": torch.ones(97)}, LoadError, r"`norm.weight` must have shape \(96,\), got \(97,\)"),
        ({"norm.weight": None}, IncompleteLoadError, "norm.weight: everything"),
        ({"fc.weight": torch.full((130, 96), float("nan"))}, NonFiniteWeightError, "fc.weight"),
    ],
)
def test_errors_name_the_tensor_and_leave_the_model_as_it_was(state, changes, error, message, early, monkeypatch):
    monkeypatch.setattr(wire, "_EARLY_BYTES", early)
    model = Model(fc=(130, 96), norm=(96,))
    with pytest.raises(error, match=message):
        load_checkpoint(model, state(changes), device="cpu", runnable=False, transfer="spans")
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert set(dict(model.named_parameters())) == {"fc.weight", "norm.weight"}
    load_checkpoint(model, state({}), device="cpu", runnable=False, transfer="spans")
    assert torch.equal(model.norm.weight, load_file(state({}) / "model.safetensors")["norm.weight"])


@pytest.mark.parametrize("early", [1, 1 << 30])
def test_a_file_that_is_gone_is_an_error_with_its_name(state, early, monkeypatch):
    """It was there when its header was read; the model is as it was, and no thread is left."""
    monkeypatch.setattr(wire, "_EARLY_BYTES", early)
    model, checkpoint = Model(fc=(130, 96), norm=(96,)), open_checkpoint(state({}))
    (checkpoint.folder / "model.safetensors").unlink()
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="model.safetensors: No such file"):
        load_checkpoint(model, checkpoint, device="cpu", runnable=False, transfer="spans")
    assert all(p.is_meta for p in model.parameters()) and threading.active_count() == before


def test_a_device_tensor_of_a_file_is_not_kept(state):
    """What arrives elsewhere is in the ring, which the next span overwrites: nothing may refer to it."""
    model = Model(fc=(130, 96), norm=(96,))
    seen = []
    original = Memory.__init__

    def remembering(self, ring):
        original(self, ring)
        seen.append(ring)

    Memory.__init__ = remembering
    try:
        load_checkpoint(model, state({}), device="cpu", runnable=False, transfer="spans")
    finally:
        Memory.__init__ = original
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert seen and not held & {ring.untyped_storage().data_ptr() for ring in seen if len(ring)}


@pytest.mark.parametrize("parts", [1, 2])
def test_one_weight_under_two_names_may_arrive_twice_in_a_span(parts, tmp_path, monkeypatch):
    """It is quantized once; other values under its other name are an error, also where the span holds it in parts."""
    if parts == 2:
        monkeypatch.setattr(wire, "_SMALLEST_SPAN_BYTES", 1000)
        monkeypatch.setattr(wire, "make_spans", _in_two_parts)
    w = values(256, 96)
    for other, fails in ((w, False), (w * 2, True)):
        save_file({"fc.weight": w, "other.weight": other.clone()}, tmp_path / "model.safetensors")
        model = Model(fc=(256, 96), other=(256, 96))
        model.other.weight = model.fc.weight
        load = functools.partial(
            load_checkpoint, model, tmp_path, "per_block", device="cpu", runnable=False, transfer="spans"
        )
        if fails:
            with pytest.raises(ConflictingShardError, match="fc.weight"):
                load()
            continue
        report = load()
        assert report.duplicates and all(each.startswith("fc.weight") for each in report.duplicates)
        assert model.other.weight is model.fc.weight
        assert_quantized(model, "fc.weight", w, "per_block")


@pytest.mark.parametrize("wide", ["fc", "other"])
def test_one_table_under_two_names_may_come_early_in_two_dtypes(wide, tmp_path, monkeypatch):
    """The copy that is the model's own memory comes first, whichever the file has first, and the other is compared."""
    monkeypatch.setattr(wire, "_EARLY_BYTES", 1)
    w = values(256, 96)
    for factor, fails in ((1, False), (2, True)):
        state = {"fc.weight": w, "other.weight": w * factor}
        state[f"{wide}.weight"] = state[f"{wide}.weight"].float()
        save_file(state, tmp_path / "model.safetensors")
        model = Model(fc=(256, 96), other=(256, 96))
        model.other.weight = model.fc.weight
        options = {"device": "cpu", "ignore": ["*"], "runnable": False, "transfer": "spans"}
        if fails:
            with pytest.raises(ConflictingShardError, match="fc.weight"):
                load_checkpoint(model, tmp_path, **options)
            assert model.fc.weight.is_meta
        else:
            load_checkpoint(model, tmp_path, **options)
            assert torch.equal(model.fc.weight, w) and model.other.weight is model.fc.weight


def _in_two_parts(checkpoint, limit, **options):
    """One span of everything, each weight of it as two pieces."""
    [(span, pieces)] = make_spans(checkpoint, 1 << 20, **options)
    halves = []
    for piece in pieces:
        rows, cols = piece.shape[0] // 2, piece.shape[1]
        for i in range(2):
            start = piece.start + i * rows * cols * piece.dtype.itemsize
            halves.append(dataclasses.replace(piece, start=start, shape=(rows, cols), first=i * rows, whole=False))
    halves[1], halves[2] = halves[2], halves[1]  # or they would be joined again
    return [(span, halves)]


def test_the_way_can_be_chosen_where_there_is_a_choice(state, tmp_path):
    """By itself only a GPU is loaded by spans; files that have no offsets cannot be."""
    checkpoint = open_checkpoint(state({}))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert wire.suits(checkpoint, cuda, "auto") and not wire.suits(checkpoint, cpu, "auto")
    assert wire.suits(checkpoint, cpu, "spans") and not wire.suits(checkpoint, cuda, "mapped")
    with pytest.raises(ValueError, match="`transfer` must be one of"):
        wire.suits(checkpoint, cuda, "teleport")
    (tmp_path / "bin").mkdir()
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "bin" / "pytorch_model.bin")
    pickled = open_checkpoint(tmp_path / "bin")
    assert not wire.suits(pickled, cuda, "auto")
    with pytest.raises(ValueError, match="no safetensors"):
        wire.suits(pickled, cuda, "spans")
