"""Spans hold every byte of a checkpoint once, and each piece is where it says."""

import torch
from safetensors.torch import save_file

from fp8_kernels.checkpoint import open_checkpoint
from fp8_kernels.checkpoint.spans import make_spans
from fp8_kernels.loading.transfer import Options, Transfer

from . import tiny

# Large and small against the limits below, empty, scalars, odd sizes, dtypes of other alignment between them.
ODD = {
    "a.big.weight": torch.randn(1000, 33),
    "a.bias": torch.randn(7).to(torch.bfloat16),
    "a.flag": torch.tensor([True, False, True]),
    "a.steps": torch.arange(5),
    "empty": torch.empty(0, 4),
    "experts.weight": torch.randn(5, 130, 40).to(torch.float16),
    "scalar": torch.tensor(2.5),
    "wide.weight": torch.randn(3, 20_000),
}


def assembled(folder, limit):
    """Name -> tensor, put together from the pieces that arrive."""
    checkpoint = open_checkpoint(folder)
    spans = make_spans(checkpoint, limit)
    out = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in checkpoint.metadata().items()}
    with Transfer("cpu", Options(2, 4096, 3)) as moving:
        arriving = moving.start([span for span, _ in spans if span.num_bytes])
        for span, pieces in spans:
            memory = next(arriving)[1] if span.num_bytes else None
            for piece in pieces:
                if memory is not None:
                    piece.of(out[piece.name]).copy_(memory.view(piece.start, piece.dtype, piece.shape))
    return out, spans, checkpoint


def test_every_element_arrives_whatever_a_span_holds(tmp_path):
    """Limits below a row and above everything: the tensors of the file, each byte moved once."""
    folder = tmp_path / "odd"
    folder.mkdir()
    save_file(ODD, folder / "model.safetensors")
    for limit in (100, 4096, 50_000, 1 << 30):
        out, spans, checkpoint = assembled(folder, limit)
        for name, wanted in ODD.items():
            assert torch.equal(out[name], wanted), (name, limit)
        assert sum(span.num_bytes for span, _ in spans) == sum(i.num_bytes for i in checkpoint.metadata().values())


def test_spans_stay_in_one_file_and_under_the_limit(tmp_path):
    """Of a sharded folder; a tensor that is a little larger is not cut for that."""
    folder = tiny.write_sharded(tmp_path / "m", tiny.tensors())
    _, spans, checkpoint = assembled(folder, 60_000)
    assert all(span.num_bytes <= 60_000 or len(pieces) == 1 and span.num_bytes <= 84_000 for span, pieces in spans)
    assert {span.path for span, _ in spans} == {str(folder / file) for file in checkpoint.files}
    assert len(spans) > len(checkpoint.files)


def test_the_weights_of_an_expert_stay_together(tmp_path):
    """Where they fit: a scale may be over two of them."""
    folder = tmp_path / "experts"
    folder.mkdir()
    state = {f"experts.{e}.{part}_proj.weight": torch.randn(8, 4) for e in range(20) for part in ("down", "gate", "up")}
    save_file(state, folder / "model.safetensors")
    for _, pieces in make_spans(open_checkpoint(folder), 8 * 4 * 4 * 5):
        assert len(pieces) == 3 and len({piece.name.split(".")[1] for piece in pieces}) == 1


def test_large_tensors_are_cut_between_blocks(tmp_path):
    """At multiples of 128 rows, so that no block of 128 x 128 has to wait for its other half."""
    folder = tmp_path / "large"
    folder.mkdir()
    save_file({"w": torch.randn(1000, 16)}, folder / "model.safetensors")
    pieces = [piece for _, found in make_spans(open_checkpoint(folder), 300 * 64) for piece in found]
    assert [piece.first for piece in pieces] == [0, 256, 512, 768]
