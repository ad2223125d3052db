"""The amax sidecar changes what is read, never what is written, and is refused where it speaks of other weights."""

import json
import os
import shutil

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint, read_amax, write_amax
from fp8_kernels.checkpoint.reader import AMAX_SIDECAR, Checkpoint

from . import tiny


@pytest.fixture
def folder(tmp_path):
    state = tiny.tensors()
    state["model.layers.0.experts.gate_up_proj"] = torch.randn(3, 10, 7)
    return tiny.write_sharded(tmp_path / "in", state)


def test_holds_the_maximum_of_every_weight_and_expert(folder):
    """Equal to `amax` to the bit, non-finite ones included; nothing for vectors."""
    weights = dict(open_checkpoint(folder).tensors())
    weights["model.embed_tokens.weight"][3, 5] = float("inf")
    weights["lm_head.weight"][0, 0] = float("nan")
    tiny.write_sharded(folder, weights)
    path = write_amax(folder)
    assert path == folder / AMAX_SIDECAR
    found = read_amax(open_checkpoint(folder))
    assert found.keys() == {name for name, t in weights.items() if t.ndim >= 2}
    for name, amax in found.items():
        assert torch.equal(amax.view(torch.int32), fk.amax(weights[name], "per_tensor").view(torch.int32)), name


def test_same_bytes_and_each_weight_read_once(tmp_path, monkeypatch):
    """With the sidecar fused families need no second read, although their members lie in different files."""
    folder = tiny.write_sharded(tmp_path / "in", tiny.tensors())
    quantize_checkpoint(folder, tmp_path / "without", "per_tensor")
    write_amax(folder)
    read, original = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or original(self, name))
    quantize_checkpoint(folder, tmp_path / "with", "per_tensor")
    assert sorted(read) == sorted(tiny.tensors())
    assert tiny.files(tmp_path / "with") == tiny.files(tmp_path / "without")


def test_stream_waits_for_no_family(tmp_path):
    """Members leave as they come, with the scale that they would share."""
    state = tiny.tensors()
    folder = tiny.write_single(tmp_path / "in", state)
    write_amax(folder)
    stream = fk.quantize_weights(state.items(), "per_tensor", amax=read_amax(open_checkpoint(folder)))
    found = dict(stream)
    for name, t in fk.quantize_weights(state.items(), "per_tensor"):
        assert torch.equal(found[name].view(torch.uint8), t.view(torch.uint8)), name
    assert stream.report.peak_staging_bytes == max(state[name].nbytes for name in tiny.weights(state))


def test_other_weights_are_refused(folder, tmp_path):
    """A changed value, a changed time, another set of files, a damaged sidecar: each is named, with the way out."""
    write_amax(folder)
    file = folder / open_checkpoint(folder).files[1]

    def refused(pattern):
        with pytest.raises(fk.CheckpointError, match=f"{pattern}.*fp8-kernels amax"):
            read_amax(open_checkpoint(folder))

    stat, data = os.stat(file), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(f"{file.name} has another hash;")
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    refused(f"{file.name} has another mtime;")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_amax(open_checkpoint(folder))
    sidecar = folder / AMAX_SIDECAR
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(content | {"amax": content["amax"] | {"nowhere.weight": 1.0}}))
    refused("nowhere.weight")
    sidecar.write_text(json.dumps(content | {"files": {"a.safetensors": content["files"][file.name]}}))
    refused("is of other files: .*a.safetensors")
    sidecar.write_text(json.dumps(content | {"files": dict.fromkeys(content["files"], 1)}))
    refused("has another size, mtime, hash")
    for value in ("x", [1, [2]], None):
        sidecar.write_text(json.dumps(content | {"amax": dict.fromkeys(content["amax"], value)}))
        refused("holds what is no maximum")
    sidecar.write_text(json.dumps(content | {"version": 0}))
    refused("version")
    sidecar.write_text("{")
    with pytest.raises(fk.CheckpointError, match=AMAX_SIDECAR):
        read_amax(open_checkpoint(folder))
    sidecar.unlink()
    assert read_amax(open_checkpoint(folder)) == {}


def test_does_not_go_where_other_weights_are_written(tmp_path):
    """An FP8 folder holds no sidecar of the weights it was made from; a lone file has no place for one."""
    folder = tiny.write_single(tmp_path / "in", tiny.tensors())
    write_amax(folder)
    quantize_checkpoint(folder, tmp_path / "out", "per_channel")
    assert not (tmp_path / "out" / AMAX_SIDECAR).exists()
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(fk.CheckpointError, match="alone.safetensors must be in a folder"):
        write_amax(tmp_path / "alone.safetensors")
