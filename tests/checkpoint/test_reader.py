"""Every layout of a Hugging Face folder, and every way in which one can be broken."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fp8_kernels.checkpoint import open_checkpoint, reader
from fp8_kernels.errors import CheckpointError

from . import tiny

BIN = "pytorch_model-{:05}-of-{:05}.bin"


def write_legacy_bin(folder, state):
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


WRITERS = {
    "single": tiny.write_single,
    "sharded": tiny.write_sharded,
    "bin": lambda folder, state: tiny.write_sharded(folder, state, save=torch.save, names=BIN),
    "old_bin": write_legacy_bin,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_tensors(layout, tmp_path):
    """Names, headers and values, in a stream and one by one; from before torch 1.6 too."""
    state = tiny.tensors(num_layers=1) | {"steps": torch.arange(3), "scalar": torch.tensor(2.5)}
    checkpoint = open_checkpoint(WRITERS[layout](tmp_path / "model", state))
    read = dict(checkpoint.tensors())
    assert read.keys() == state.keys() == checkpoint.metadata().keys()
    for name, tensor in state.items():
        info = checkpoint.metadata()[name]
        assert torch.equal(read[name], tensor) and torch.equal(checkpoint.read(name), tensor)
        assert (info.dtype, info.shape, info.num_bytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert info.file in checkpoint.files
    assert checkpoint.sharded == (layout in ("sharded", "bin"))


def test_a_single_file_is_a_checkpoint(tmp_path):
    """Without the rest of its folder: no config, no other files."""
    state = {"a.weight": torch.randn(7, 3)}
    tiny.write_single(tmp_path, state)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(checkpoint.read("a.weight"), state["a.weight"])
    assert checkpoint.config == {} and checkpoint.other_files() == [] and checkpoint.is_single_file


def test_a_lone_file_of_another_name_is_taken(tmp_path):
    """Two of them without an index could belong to different models."""
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert open_checkpoint(tmp_path).files == ["weights.safetensors"]
    save_file({"y": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 safetensors files but no index"):
        open_checkpoint(tmp_path)


def test_safetensors_win_over_pickles(tmp_path):
    """A folder that holds both is read as Hugging Face libraries read it."""
    torch.save({"x": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(open_checkpoint(tmp_path).read("x"), torch.ones(2))


def test_one_file_can_be_streamed_alone(tmp_path):
    """`tensors(file)` gives exactly the tensors that the metadata puts there."""
    checkpoint = open_checkpoint(tiny.write_sharded(tmp_path, tiny.tensors()))
    for file in checkpoint.files:
        names = [name for name, _ in checkpoint.tensors(file)]
        assert names == [name for name, info in checkpoint.metadata().items() if info.file == file]


def test_tensors_outlive_the_mapping_they_came_from(tmp_path, monkeypatch):
    """Files are mapped anew now and then; what was read before stays valid."""
    monkeypatch.setattr(reader, "_REMAP_BYTES", 1)
    state = tiny.tensors(num_layers=1)
    read = dict(open_checkpoint(tiny.write_sharded(tmp_path, state)).tensors())
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_other_files_are_all_but_weights_and_hidden_ones(tmp_path):
    """Tokenizer, templates, code and sub-folders; neither pickles nor caches."""
    tiny.write_sharded(tmp_path, tiny.tensors(num_layers=1))
    kept = ["1_Pooling/config.json", "chat_template.jinja", "config.json", "modeling_x.py", "tokenizer.model"]
    for name in (*kept, ".git/HEAD", "__pycache__/modeling_x.pyc", "training_args.bin", "model.gguf", "tf_model.h5"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch() if name != "config.json" else None
    assert sorted(open_checkpoint(tmp_path).other_files()) == kept


# What is broken, and what the error must say.


def test_a_path_that_is_not_there(tmp_path):
    """Named, not just missing."""
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("names", [(), ("config.json", "tokenizer.json")])
def test_a_folder_that_is_not_a_checkpoint(names, tmp_path):
    """Empty, or with everything but weights; says what was looked for."""
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it holds none of model.safetensors, "):
        open_checkpoint(tmp_path)


def test_a_file_that_is_no_checkpoint(tmp_path):
    """A config given for the model."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must be a folder or a .safetensors file"):
        open_checkpoint(tmp_path / "config.json")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_safetensors_file(keep, tmp_path):
    """Cut in its length, in its header, and one byte short."""
    file = tiny.write_sharded(tmp_path, tiny.tensors()) / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors is not a whole safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x08" + bytes(7) + b"not json", b"<html>Not found</html>"])
def test_garbage_for_a_header(content, tmp_path):
    """An absurd length, no JSON, and an error page that was saved as the file."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors is not a whole safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_git_lfs_pointer(name, tmp_path):
    """Says what it is and how to get the file."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        open_checkpoint(tmp_path)


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_name_in_the_index_that_no_file_has(tmp_path):
    """Names the tensor and the file that should hold it."""
    tiny.write_sharded(tmp_path, tiny.tensors())
    edit_index(tmp_path, lambda index: index.update({"ghost.weight": "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match="puts `ghost.weight` in model-00001-.*, which does not"):
        open_checkpoint(tmp_path)


def test_a_name_in_another_file_than_the_index_says(tmp_path):
    """Names both files."""
    tiny.write_sharded(tmp_path, tiny.tensors())
    edit_index(tmp_path, lambda index: index.update({"lm_head.weight": "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match="`lm_head.weight` in model-00001-.*, but it is in model-0000[23]"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("missing", ["model-00002-of-00003.safetensors"])
def test_a_file_in_the_index_that_is_missing(missing, tmp_path):
    """Names the file."""
    (tiny.write_sharded(tmp_path, tiny.tensors()) / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing} is missing"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    """Names the tensor and both files: which of the two is meant, nobody can know."""
    tiny.write_sharded(tmp_path, {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)})
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="`a` is in two files, model-00001-.* and model-00002-"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', "[1]", "{", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_is_none(text, tmp_path):
    """Without a map, no object, no JSON, and with a file outside of the folder."""
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json"):
        open_checkpoint(tmp_path)


def test_a_config_that_is_no_json(tmp_path):
    """Named: the model could not be understood without it."""
    tiny.write_single(tmp_path, tiny.tensors(num_layers=1))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read .*config.json"):
        open_checkpoint(tmp_path)


class Payload:
    """Would run on unpickling."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("state", [{"x": Payload()}, {"x": 3}, [torch.ones(1)]])
def test_a_pickle_that_holds_more_than_tensors(state, tmp_path, capsys):
    """Refused without running anything that it holds."""
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        open_checkpoint(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_pickle_of_tensors_without_plain_values(kind, tmp_path):
    """Sparse ones and those on meta are named."""
    bad = torch.eye(3).to_sparse() if kind == "sparse" else torch.empty(3, device="meta")
    torch.save({"good": torch.zeros(3), "bad": bad}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin: `bad` must hold its values.*{kind}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_truncated_pickle(keep, tmp_path):
    """Cut at the start and near the end."""
    torch.save(tiny.tensors(num_layers=1), tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="pytorch_model.bin is not a whole file of tensors"):
        open_checkpoint(tmp_path)
