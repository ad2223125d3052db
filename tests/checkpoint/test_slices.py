"""Lazily read tensors are the tensors, and read no more than what was asked for."""

import random

import pytest
import torch
from safetensors.torch import save_file

from fp8_kernels.checkpoint import open_checkpoint, slices
from fp8_kernels.errors import CheckpointError
from fp8_kernels.loading import LayerwiseLoader

from ..loading.helpers import Model, assert_quantized

STATE = {
    "matrix": torch.randn(37, 53).to(torch.bfloat16),
    "experts": torch.randn(5, 7, 11),
    "vector": torch.randn(3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "four": torch.arange(4 * 3 * 5 * 6).reshape(4, 3, 5, 6),
}


@pytest.fixture
def checkpoint(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


@pytest.fixture
def bytes_read(monkeypatch):
    """How many bytes each read was of."""
    found, read_rows = [], slices.read_rows

    def counted(fd, offset, stride, row_bytes, num_rows, *rest):
        found.append(row_bytes * num_rows)
        return read_rows(fd, offset, stride, row_bytes, num_rows, *rest)

    monkeypatch.setattr(slices, "read_rows", counted)
    return found


def random_index(shape):
    """Integers, whole dimensions and runs, empty ones too."""
    index = []
    for size in shape:
        kind = random.choice(["int", "all", "run"]) if size else "all"
        start, stop = sorted(random.choices(range(size + 1), k=2))
        index.append(
            {"int": random.randrange(-size, size) if size else 0, "all": slice(None)}.get(kind, slice(start, stop))
        )
    return tuple(index)


@pytest.mark.parametrize("name", STATE)
def test_every_index_reads_what_torch_would_give(name, checkpoint, bytes_read):
    """Two hundred random ones; and not one byte more."""
    wanted = STATE[name]
    assert torch.equal(checkpoint.lazy(name).read(), wanted)
    for _ in range(200):
        index = random_index(wanted.shape)
        bytes_read.clear()
        part = checkpoint.lazy(name)[index]
        assert part.shape == wanted[index].shape
        assert torch.equal(part.read(), wanted[index])
        assert sum(bytes_read) == wanted[index].nbytes


def test_narrowing_reads_nothing_and_using_reads_the_rest(checkpoint, bytes_read):
    """`narrow`, `chunk`, `split`, shapes; then `copy_`, assignment, `cat` and methods of tensors."""
    lazy, wanted = checkpoint.lazy("matrix"), STATE["matrix"]
    parts = [lazy.narrow(0, -10, 10), lazy.chunk(4, dim=1)[1], lazy.split([30, 7])[1], lazy[..., 3]]
    same = [wanted.narrow(0, -10, 10), wanted.chunk(4, dim=1)[1], wanted.split([30, 7])[1], wanted[..., 3]]
    assert [part.shape for part in parts] == [part.shape for part in same]
    assert (lazy.size(1), lazy.dim(), lazy.numel(), len(lazy), lazy.get_shape()) == (53, 2, 37 * 53, 37, [37, 53])
    assert not bytes_read
    for part, expected in zip(parts, same, strict=True):
        copied, assigned = torch.empty_like(expected), torch.empty_like(expected)
        copied.copy_(part)
        assigned[:] = part
        assert torch.equal(copied, expected) and torch.equal(assigned, expected)
        assert torch.equal(torch.cat([part, part]), torch.cat([expected, expected]))
        assert torch.equal(part.float(), expected.float())
    assert set(bytes_read) == {part.nbytes for part in same}


@pytest.mark.parametrize("dim", [0, 1])
def test_ranks_read_a_file_once_between_them(dim, checkpoint, bytes_read):
    """An engine's loader that narrows what it is given and copies it, inside of a `LayerwiseLoader`, unchanged."""
    tp_size = 2
    weight = torch.randn(64, 96).to(torch.bfloat16)
    save_file({"fc.weight": weight}, checkpoint.folder / "other.safetensors")
    opened = open_checkpoint(checkpoint.folder / "other.safetensors")

    def weight_loader(param, loaded_weight, tp_rank):
        size = param.data.size(dim)
        param.data.copy_(loaded_weight.narrow(dim, tp_rank * size, size))

    for tp_rank, part in enumerate(weight.chunk(tp_size, dim)):
        model = Model(fc=tuple(part.shape))
        with LayerwiseLoader(model, "per_channel", device="cpu"):
            for _, loaded in opened.lazy_tensors():
                weight_loader(model.fc.weight, loaded, tp_rank)
        assert_quantized(model, "fc.weight", part.contiguous(), "per_channel")
    assert sum(bytes_read) == weight.nbytes


def test_a_rank_without_anything_reads_nothing(checkpoint):
    """As many empty chunks as torch makes of a tensor without rows."""
    parts = checkpoint.lazy("empty").chunk(3)
    assert [part.read().shape for part in parts] == [part.shape for part in STATE["empty"].chunk(3)]


def test_pickles_can_be_narrowed_too(tmp_path):
    torch.save({"w": STATE["matrix"]}, tmp_path / "pytorch_model.bin")
    assert torch.equal(open_checkpoint(tmp_path).lazy("w")[3:5, 7].read(), STATE["matrix"][3:5, 7])


def test_what_cannot_be_is_an_error_that_names_the_tensor(checkpoint):
    lazy = checkpoint.lazy("matrix")
    for wrong in (lambda: lazy[40], lambda: lazy[::2], lambda: lazy[0, 0, 0], lambda: lazy.narrow(0, 30, 10)):
        with pytest.raises(IndexError, match="`matrix`"):
            wrong()
    with pytest.raises(KeyError, match="no tensor `absent`"):
        checkpoint.lazy("absent")
    path, last = checkpoint.folder / "model.safetensors", list(checkpoint.metadata())[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"`{last}`.*ends before its header says"):
        checkpoint.lazy(last).read()
