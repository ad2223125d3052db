"""Folders of FP8: right to the bit, complete, resumable, bounded in memory, and gone when something is wrong."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fp8_kernels as fk
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint, verify_checkpoint
from fp8_kernels.checkpoint.formats import FORMATS
from fp8_kernels.errors import CheckpointError, NonFiniteWeightError, UnmatchedPatternError, UnsupportedLayoutError

from . import tiny

CHOICES = [("per_channel", "compressed-tensors"), ("per_tensor", "compressed-tensors"),
           ("per_block", "compressed-tensors"), ("per_block", "fp8")]  # fmt: skip


def run(program, *args):
    """A program in a process of its own; one thread, since threads that wait for each other starve on a busy host."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def read_all(folder):
    return dict(open_checkpoint(folder).tensors())


@pytest.mark.parametrize("scheme,format", [c for c in CHOICES if c[0] != "per_tensor"])
@pytest.mark.parametrize("write", [tiny.write_single, tiny.write_sharded])
def test_bits_are_those_of_quantize(scheme, format, write, tmp_path):
    """Codes and scales of every weight, and every other tensor untouched, in files of the same names."""
    state = tiny.tensors()
    src = write(tmp_path / "in", state)
    report = quantize_checkpoint(src, tmp_path / "out", scheme, format)
    out = read_all(tmp_path / "out")
    suffix = FORMATS[format].scale_suffix
    expected = dict(state)
    for name in tiny.weights(state):
        expected[name], expected[f"{name.removesuffix('weight')}{suffix}"] = fk.quantize(state[name], scheme)
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
    assert open_checkpoint(tmp_path / "out").files == open_checkpoint(src).files
    assert report.quantized_tensors == len(tiny.weights(state)) == len(state) - len(report.passed_through)
    assert report.bytes_in == sum(t.nbytes for t in state.values())
    assert report.bytes_out == sum(t.nbytes for t in out.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_quantized_from_themselves(dtype, tmp_path):
    """fp32 never goes through bf16."""
    state = tiny.tensors(num_layers=1, dtype=dtype)
    quantize_checkpoint(tiny.write_single(tmp_path / "in", state), tmp_path / "out")
    name = tiny.weights(state)[0]
    assert torch.equal(read_all(tmp_path / "out")[name].float(), fk.quantize(state[name])[0].float())


@pytest.mark.parametrize("write", [tiny.write_single, tiny.write_sharded])
def test_shards_that_engines_fuse_share_one_scale(write, tmp_path):
    """q, k, v and gate, up have the scale of the largest, also across files; the others their own."""
    state = tiny.tensors()
    quantize_checkpoint(write(tmp_path / "in", state), tmp_path / "out", "per_tensor")
    out = read_all(tmp_path / "out")
    families = [("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)),
                ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",))]  # fmt: skip
    for layer in range(2):
        for block, members in families:
            names = [f"model.layers.{layer}.{block}.{member}.weight" for member in members]
            amax = torch.stack([fk.amax(state[name], "per_tensor") for name in names]).max()
            for name in names:
                q, scale = fk.quantize(state[name], "per_tensor", amax=amax)
                assert torch.equal(out[f"{name}_scale"], scale.reshape(1))
                assert torch.equal(out[name].view(torch.uint8), q.view(torch.uint8))


def test_every_projection_of_an_expert_is_a_weight(tmp_path):
    """w1 and w3 of one expert share a scale; the next expert has its own."""
    state = {f"layers.0.moe.experts.{e}.{w}.weight": torch.randn(64, 96).bfloat16() * (e + 1) for e in range(2)
             for w in ("w1", "w2", "w3")}  # fmt: skip
    quantize_checkpoint(tiny.write_single(tmp_path / "in", state), tmp_path / "out", "per_tensor")
    out = read_all(tmp_path / "out")
    scales = [[out[f"layers.0.moe.experts.{e}.{w}.weight_scale"].item() for w in ("w1", "w2", "w3")] for e in range(2)]
    assert scales[0][0] == scales[0][2] != scales[0][1] and scales[0][0] != scales[1][0] == scales[1][2]


def test_rounded_scales_are_stored_as_fp32(tmp_path):
    """Powers of two and bf16 scales are fp32 in the file, and the codes are those of the rounded scale."""
    state = tiny.tensors(num_layers=1)
    src = tiny.write_single(tmp_path / "in", state)
    for i, scheme in enumerate((fk.PerChannel(pow2=True), fk.PerChannel(scale_dtype=torch.bfloat16))):
        quantize_checkpoint(src, tmp_path / str(i), scheme)
        out, name = read_all(tmp_path / str(i)), tiny.weights(state)[0]
        q, scale = fk.quantize(state[name], scheme)
        assert torch.equal(out[f"{name}_scale"], scale.float()) and torch.equal(out[name].float(), q.float())


def test_patterns_decide(tmp_path):
    """ignore keeps, include takes the head too, schemes give a group of their own with exact names."""
    state = tiny.tensors()
    src = tiny.write_sharded(tmp_path / "in", state)
    quantize_checkpoint(
        src,
        tmp_path / "out",
        ignore=["model.layers.1.mlp"],
        include=["lm_head"],
        schemes={"*.down_proj": "per_tensor"},
    )
    out = read_all(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert out["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert out["lm_head.weight"].dtype == torch.float8_e4m3fn
    assert out["model.layers.0.mlp.down_proj.weight_scale"].shape == (1,)
    assert config["ignore"] == [
        "model.embed_tokens",
        *(f"model.layers.1.mlp.{name}" for name in ("down_proj", "gate_proj", "up_proj")),
    ]
    assert [group["targets"] for group in config["config_groups"].values()] == [
        ["Linear"],
        ["model.layers.0.mlp.down_proj"],
    ]
    assert verify_checkpoint(tmp_path / "out", src).ok


def test_a_tied_head_is_kept_though_the_checkpoint_lacks_it(tmp_path):
    """It is a Linear of the model, so the config must name it."""
    state = tiny.tensors(num_layers=1)
    del state["lm_head.weight"]
    src = tiny.write_single(tmp_path / "in", state, {"tie_word_embeddings": True})
    for scheme, format, key in (("per_channel", "compressed-tensors", "ignore"),
                                ("per_block", "fp8", "modules_to_not_convert")):  # fmt: skip
        quantize_checkpoint(src, tmp_path / format, scheme, format)
        config = json.loads((tmp_path / format / "config.json").read_text())
        assert "lm_head" in config["quantization_config"][key]


def test_everything_else_is_carried_over(tmp_path):
    """Byte for byte, links as what they point to; config.json with every key it had."""
    src = tiny.write_sharded(tmp_path / "in", tiny.tensors(), config={"vocab_size": 64, "name": "größer"})
    (tmp_path / "blob").write_bytes(b"\x00blob")
    (src / "tokenizer.model").symlink_to(tmp_path / "blob")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_x.py", "sub/x.txt"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text(f"content of {name}")
    quantize_checkpoint(src, tmp_path / "out")
    before, after = tiny.files(src), tiny.files(tmp_path / "out")
    assert after.keys() == before.keys()
    same = [name for name in before if not name.startswith(("model", "config.json")) or name.endswith(".py")]
    assert len(same) == 6 and all(after[name] == before[name] for name in same)
    assert not (tmp_path / "out" / "tokenizer.model").is_symlink()
    config = json.loads(after["config.json"])
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads(before["config.json"])


def test_the_index_lists_every_tensor(tmp_path):
    """Scales included, beside their weights, and only where there was an index."""
    quantize_checkpoint(tiny.write_sharded(tmp_path / "in", tiny.tensors()), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: info.file for name, info in open_checkpoint(tmp_path / "out").metadata().items()}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_all(tmp_path / "out").values())
    assert all(found[name] == file for name, file in ((n.removesuffix("_scale"), f) for n, f in found.items()))
    quantize_checkpoint(tiny.write_single(tmp_path / "one", tiny.tensors()), tmp_path / "one_out")
    assert sorted(os.listdir(tmp_path / "one_out")) == ["config.json", "model.safetensors"]


def test_pickles_become_safetensors(tmp_path):
    """Under the names that engines look for, with the bits of the same weights from safetensors."""
    state = tiny.tensors()
    names = "pytorch_model-{:05}-of-{:05}.bin"
    src = tiny.write_sharded(tmp_path / "in", state, save=torch.save, names=names)
    quantize_checkpoint(src, tmp_path / "out")
    quantize_checkpoint(tiny.write_sharded(tmp_path / "in2", state), tmp_path / "out2")
    assert open_checkpoint(tmp_path / "out").files == open_checkpoint(tmp_path / "out2").files
    out, expected = read_all(tmp_path / "out"), read_all(tmp_path / "out2")
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)


def test_a_single_file_becomes_a_folder(tmp_path):
    """With a config that says how it is quantized, and nothing of the folder it came from."""
    state = tiny.tensors(num_layers=1)
    src = tiny.write_single(tmp_path / "in", state)
    (src / "tokenizer.json").write_text("{}")
    (src / "model.safetensors").rename(src / "x.safetensors")
    quantize_checkpoint(src / "x.safetensors", src / "out")
    assert sorted(os.listdir(src / "out")) == ["config.json", "model.safetensors"]
    assert verify_checkpoint(src / "out", src / "x.safetensors").ok


def test_progress_counts_every_byte(tmp_path):
    """It never falls, ends at the total, and names each tensor."""
    state, seen = tiny.tensors(), []
    quantize_checkpoint(
        tiny.write_sharded(tmp_path / "in", state), tmp_path / "out", progress=lambda *args: seen.append(args)
    )
    total = sum(t.nbytes for t in state.values())
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == total and {t for _, t, _ in seen} == {total} and {name for *_, name in seen} == state.keys()


# Resuming.

KILLED = """
    import os, signal, sys
    from fp8_kernels.checkpoint import quantize_checkpoint

    count = 0

    def die(done, total, name):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    quantize_checkpoint(sys.argv[1], sys.argv[2], sys.argv[4], progress=die)
"""


@pytest.mark.parametrize("scheme", ["per_channel", "per_tensor"])
def test_a_killed_conversion_resumes_to_the_same_bytes(scheme, tmp_path):
    """Killed in the second file: no folder; then the first file is kept as it is, and the rest is made."""
    state = tiny.tensors()
    src, dst, partial = tiny.write_sharded(tmp_path / "in", state), tmp_path / "out", tmp_path / "out.partial"
    in_first = sum(info.file.startswith("model-00001") for info in open_checkpoint(src).metadata().values())
    killed = run(KILLED, src, dst, in_first + 2, scheme)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = partial / "model-00001-of-00003.safetensors"
    before = first.stat()
    assert not dst.exists() and not (partial / "model-00002-of-00003.safetensors").exists()
    report = quantize_checkpoint(src, dst, scheme)
    after = (dst / first.name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not partial.exists() and report.quantized_tensors == len(tiny.weights(state))
    quantize_checkpoint(src, tmp_path / "whole", scheme)
    assert tiny.files(dst) == tiny.files(tmp_path / "whole")


def test_a_partial_folder_of_something_else_is_not_resumed(tmp_path):
    """Another scheme, and another source: refused, and started over only when asked to."""
    state = tiny.tensors()
    src, dst = tiny.write_sharded(tmp_path / "in", state), tmp_path / "out"
    run(KILLED, src, dst, 12, "per_channel")
    before = tiny.files(tmp_path / "out.partial")
    with pytest.raises(CheckpointError, match="out.partial was left by a conversion with other options"):
        quantize_checkpoint(src, dst, "per_tensor")
    tiny.write_sharded(src, tiny.tensors())
    with pytest.raises(CheckpointError, match="out.partial was left by a conversion with other options"):
        quantize_checkpoint(src, dst, "per_channel")
    assert tiny.files(tmp_path / "out.partial") == before and not dst.exists()
    quantize_checkpoint(src, dst, "per_channel", overwrite=True)
    assert verify_checkpoint(dst, src).ok and not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_one_conversion_at_a_time(tmp_path):
    """A second one into the same folder is refused while the first runs, and the first is not disturbed."""
    src, dst = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1)), tmp_path / "out"

    def start_another(done, total, name):
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match="out.partial is being written by another process"):
                quantize_checkpoint(src, dst, overwrite=overwrite)

    quantize_checkpoint(src, dst, progress=start_another)
    assert verify_checkpoint(dst, src).ok


def test_an_fp8_folder_is_replaced_only_when_asked(tmp_path):
    """Until the new one is complete the old one stays; an empty one is no obstacle."""
    src, dst = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1)), tmp_path / "out"
    quantize_checkpoint(src, dst, "per_tensor")
    before = tiny.files(dst)
    with pytest.raises(CheckpointError, match="out must not exist, or be empty; overwrite=True"):
        quantize_checkpoint(src, dst)
    assert tiny.files(dst) == before and sorted(os.listdir(tmp_path)) == ["in", "out"]

    def old_one_is_there(*_):
        assert tiny.files(dst) == before

    quantize_checkpoint(src, dst, overwrite=True, progress=old_one_is_there)
    assert tiny.files(dst) != before
    assert verify_checkpoint(dst, src).ok and sorted(os.listdir(tmp_path)) == ["in", "out"]
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(src, tmp_path / "empty")
    assert verify_checkpoint(tmp_path / "empty", src).ok


def test_nothing_but_an_fp8_checkpoint_is_replaced(tmp_path):
    """A wrong path costs nothing: neither a folder of something else, nor the source."""
    src, dst = tiny.write_single(tmp_path / "models" / "in", tiny.tensors(num_layers=1)), tmp_path / "out"
    other = tiny.write_single(tmp_path / "bf16", tiny.tensors(num_layers=1))
    dst.mkdir()
    (dst / "mine.txt").write_text("keep")
    before = tiny.files(tmp_path)
    for place in (dst, other):
        with pytest.raises(CheckpointError, match="must hold an FP8 checkpoint to be replaced"):
            quantize_checkpoint(src, place, overwrite=True)
    for source, place in ((src, tmp_path / "models"), (src / "model.safetensors", src), (src, tmp_path)):
        with pytest.raises(CheckpointError, match="holds the source|must lie outside of the source"):
            quantize_checkpoint(source, place, overwrite=True)
    assert tiny.files(tmp_path) == before


def test_what_cannot_be_replaced_stays_and_the_work_is_resumed(tmp_path, monkeypatch):
    """The new folder cannot get its name: the old one has it again, and nothing is quantized a second time."""
    src, dst = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1)), tmp_path / "out"
    quantize_checkpoint(src, dst, "per_tensor")
    before = tiny.files(dst)
    rename = Path.rename

    def refused(self, target):
        if self.name == "out.partial":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(CheckpointError, match="cannot rename .*out.partial to .*out: Permission denied"):
            quantize_checkpoint(src, dst, overwrite=True)
    assert tiny.files(dst) == before and sorted(os.listdir(tmp_path)) == ["in", "out", "out.partial"]
    progress = []
    quantize_checkpoint(src, dst, overwrite=True, progress=lambda *call: progress.append(call))
    assert progress == [] and verify_checkpoint(dst, src).ok and sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_an_old_folder_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    """The new one is there by then, and the message says so."""
    src, dst = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1)), tmp_path / "out"
    quantize_checkpoint(src, dst, "per_tensor")

    def refused(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(
        CheckpointError, match="out is complete, but .*out.replaced, cannot be removed: Permission denied"
    ):
        quantize_checkpoint(src, dst, overwrite=True)
    assert verify_checkpoint(dst, src).ok and set(tiny.files(dst)) == {"config.json", "model.safetensors"}


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_a_folder_stays_one(tmp_path):
    """Its target, perhaps on a larger disk, is where the folder is made, and what is replaced."""
    src, target = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1)), tmp_path / "disk" / "fp8"
    target.mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to(target)
    for scheme in ("per_tensor", "per_channel"):
        quantize_checkpoint(src, link, scheme, overwrite=True)
    assert link.is_symlink() and verify_checkpoint(target, src).ok
    assert os.listdir(tmp_path / "disk") == ["fp8"] and sorted(os.listdir(tmp_path)) == ["disk", "in", "out"]


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limits on this system")
def test_a_full_disk_is_reported_and_survived(tmp_path):
    """Files may have 64 KiB at most, as if the disk were full: a clear error, no folder; later it goes on."""
    program = """
        import resource, sys
        from fp8_kernels.checkpoint import quantize_checkpoint
        from fp8_kernels.errors import CheckpointError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            quantize_checkpoint(sys.argv[1], sys.argv[2])
        except CheckpointError as error:
            print(error)
    """
    src, dst = tiny.write_sharded(tmp_path / "in", tiny.tensors()), tmp_path / "out"
    done = run(program, src, dst)
    assert done.stdout.startswith(f"cannot write {dst}.partial/model-00001-of-00003.safetensors ("), done.stderr
    assert not dst.exists()
    assert not [name for name in os.listdir(tmp_path / "out.partial") if "safetensors" in name]
    quantize_checkpoint(src, dst)
    assert verify_checkpoint(dst, src).ok


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure peak memory")
def test_memory_is_bounded_by_two_units(tmp_path):
    """Four weights of 32 MiB in one file: a weight with its codes, for a shared scale two weights, are in memory.

    Mapped pages are counted. 16 MiB more are for what the torch kernels compute a chunk with, and for what a caller
    keeps of each weight, which comes to lie between the codes of two.
    """
    program = """
        import sys, torch
        from fp8_kernels.checkpoint import quantize_checkpoint

        def peak():
            status = open("/proc/self/status").read()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024

        src, dst, scheme = sys.argv[1:]
        quantize_checkpoint(src + "-small", dst + "-small", scheme)  # loads the code, which counts too
        kept = []
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        quantize_checkpoint(src, dst, scheme, progress=lambda *done: kept.append(bytes(400_000)))
        print(peak() - before)
    """
    names, unit = ("q_proj", "k_proj", "v_proj", "o_proj"), 4096 * 4096 * 2
    for src, size in (("in", 4096), ("in-small", 64)):
        weights = {f"{name}.weight": torch.ones(size, size, dtype=torch.bfloat16) for name in names}
        tiny.write_single(tmp_path / src, weights)
    for scheme, held in (("per_channel", unit + unit // 2), ("per_tensor", 2 * unit)):
        done = run(program, tmp_path / "in", tmp_path / scheme, scheme)
        assert done.returncode == 0, done.stderr
        assert unit // 2 < int(done.stdout) < held + (16 << 20)


# Refusals: nothing is written.


def refused(error, match, src, tmp_path, *args, **kwargs):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=match):
        quantize_checkpoint(src, tmp_path / "out", *args, **kwargs)
    assert sorted(os.listdir(tmp_path)) == before


def test_unknown_names_are_refused(tmp_path):
    """Scheme, format, pattern, path: each message lists what there is."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    refused(ValueError, "`scheme` must be one of .*'per_channel'.* got 'per_row'", src, tmp_path, "per_row")
    refused(ValueError, "`format` must be one of .*'fp8'.* got 'gguf'", src, tmp_path, format="gguf")
    refused(UnmatchedPatternError, "'lm_haed'", src, tmp_path, ignore=["lm_haed"])
    refused(CheckpointError, "nowhere does not exist", tmp_path / "nowhere", tmp_path)
    refused(UnsupportedLayoutError, "got float8_e5m2", src, tmp_path, dtype=torch.float8_e5m2)


def test_a_folder_inside_of_its_source_is_refused(tmp_path):
    """It would become part of what it is made from."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    for dst in (src, src / "fp8", tmp_path / "x" / ".." / "in" / "fp8"):
        with pytest.raises(CheckpointError, match="`dst` must lie outside of the source"):
            quantize_checkpoint(src, dst, overwrite=True)
    assert sorted(os.listdir(src)) == ["config.json", "model.safetensors"]


def test_a_folder_that_holds_the_source_is_not_replaced(tmp_path):
    """A parent of the source, the folder of a single file, and the names that a conversion gives its folders."""
    src = tiny.write_single(tmp_path / "out" / "in", tiny.tensors(num_layers=1))
    partial, replaced = (tiny.write_single(tmp_path / f"x.{end}", tiny.tensors()) for end in ("partial", "replaced"))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = tiny.files(src), tiny.files(partial), tiny.files(replaced)
    for source, dst in (
        (src, tmp_path / "out"),
        (src, tmp_path / "link"),
        (src / "model.safetensors", src),
        (src / "model.safetensors", tmp_path / "out"),
        (partial, tmp_path / "x"),
        (replaced, tmp_path / "x"),
    ):
        with pytest.raises(CheckpointError, match="`dst` must not replace .*, which holds the source"):
            quantize_checkpoint(source, dst, overwrite=True)
    assert (tiny.files(src), tiny.files(partial), tiny.files(replaced)) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_only_has_the_name_of_a_partial_one_stays(overwrite, tmp_path):
    """No conversion has made it, so none deletes it."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="out.partial is where .*out is made, but holds something else"):
        quantize_checkpoint(src, tmp_path / "out", overwrite=overwrite)
    assert (mine / "mine.txt").read_text() == "keep"


def test_what_is_put_into_dst_meanwhile_stays(tmp_path):
    """It is refused at the end as it would have been at the start, and the work is not lost."""
    src, dst = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1)), tmp_path / "out"

    def another(*_):
        dst.mkdir(exist_ok=True)
        (dst / "mine.txt").write_text("keep")

    with pytest.raises(CheckpointError, match="out must not exist, or be empty"):
        quantize_checkpoint(src, dst, progress=another)
    assert tiny.files(dst) == {"mine.txt": b"keep"}
    made = (tmp_path / "out.partial" / "model.safetensors").stat().st_ino
    (dst / "mine.txt").unlink()
    quantize_checkpoint(src, dst)
    assert verify_checkpoint(dst, src).ok and (dst / "model.safetensors").stat().st_ino == made


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_while_the_folder_gets_its_name(overwrite, tmp_path, monkeypatch):
    """The same call again finishes it, whichever step it was, and keeps what was written."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    real, steps = os.rename, 2 if overwrite else 1
    for step in range(steps):
        dst, calls = tmp_path / f"out{step}", []
        if overwrite:
            quantize_checkpoint(src, dst, "per_tensor")

        def killed(*args, calls=calls, step=step, **kwargs):
            calls.append(args)
            if len(calls) > step:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(src, dst, overwrite=overwrite)
        made = (tmp_path / f"out{step}.partial" / "model.safetensors").stat().st_mtime_ns
        quantize_checkpoint(src, dst, overwrite=overwrite)
        assert verify_checkpoint(dst, src).ok and (dst / "model.safetensors").stat().st_mtime_ns == made
    if overwrite:  # moved away, and not replaced by the call that moved it
        assert (tmp_path / "out1.replaced").exists()
        with pytest.raises(CheckpointError, match="out1.replaced is where .*out1 waits"):
            quantize_checkpoint(src, dst, "per_tensor", overwrite=True)


def test_dst_may_be_a_link(tmp_path):
    """The folder that it leads to is made, or replaced, and the link stays."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for overwrite in (False, True):
        quantize_checkpoint(src, tmp_path / "out", overwrite=overwrite)
        assert verify_checkpoint(tmp_path / "disk", src).ok and (tmp_path / "out").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["disk", "in", "out"]


def test_dst_may_be_where_one_is(tmp_path, monkeypatch):
    """`.` is a folder like any other."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    quantize_checkpoint(src, ".")
    assert verify_checkpoint(tmp_path / "out", src).ok and sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_two_files_that_would_be_written_to_one(tmp_path):
    """An index may name files that differ in their suffix alone; the second would be taken for written."""
    state = tiny.tensors(num_layers=1)
    src = tiny.write_sharded(tmp_path / "in", state, num_files=1)
    torch.save({"more.weight": torch.randn(128, 128)}, src / "model-00001-of-00001.bin")
    index = json.loads((src / "model.safetensors.index.json").read_text())
    index["weight_map"]["more.weight"] = "model-00001-of-00001.bin"
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must have different names without suffixes"):
        quantize_checkpoint(src, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_a_link_to_nowhere_is_named(tmp_path):
    """Beside the weights; found before anything is written."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    (src / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot read .*tokenizer.json"):
        quantize_checkpoint(src, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("scheme", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_all_listed(value, scheme, tmp_path):
    """In different files; a weight that merely shares its scale with a bad one is not blamed."""
    state = tiny.tensors()
    bad = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    for name in bad:
        state[name][3, 5] = value
    state["model.embed_tokens.weight"][0, 0] = value  # passes through, so it is not ours to judge
    src = tiny.write_sharded(tmp_path / "in", state)
    with pytest.raises(NonFiniteWeightError) as caught:
        quantize_checkpoint(src, tmp_path / "out", scheme)
    assert sorted(str(caught.value).removeprefix("weights hold NaN or Inf: ").split(", ")) == bad
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_dtypes_are_refused(dtype, tmp_path):
    """By name and with the way out; kept when asked to."""
    state = tiny.tensors(num_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(dtype)
    src = tiny.write_single(tmp_path / "in", state)
    match = f"`{name}` in .* must be bfloat16, float16 or float32 to become FP8, got {str(dtype)[6:]}; ignore="
    refused(CheckpointError, match, src, tmp_path)
    quantize_checkpoint(src, tmp_path / "out", ignore=["*.up_proj", "*.gate_proj"])
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name].double(), state[name].double())


def test_included_integers_are_refused(tmp_path):
    """Kept by default, so only `include` can ask for it."""
    state = tiny.tensors(num_layers=1) | {"model.rotary_embeddings.weight": torch.ones(4, 4, dtype=torch.int32)}
    src = tiny.write_single(tmp_path / "in", state)
    refused(CheckpointError, "rotary_embeddings.* got int32", src, tmp_path, include=["*.rotary_embeddings"])


def test_what_is_quantized_already_is_refused(tmp_path):
    """Told by the config, on top or of a part of the model, by a scale, or by what this library wrote."""
    state = tiny.tensors(num_layers=1)
    for i, config in enumerate(({"quantization_config": {"quant_method": "gptq"}},
                                {"text_config": {"quantization_config": {"quant_method": "gptq"}}})):  # fmt: skip
        src = tiny.write_single(tmp_path / f"in{i}", state, config)
        refused(CheckpointError, "is quantized already .*gptq", src, tmp_path)
    scaled = state | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    src = tiny.write_single(tmp_path / "scaled", scaled)
    refused(CheckpointError, "is quantized already .*up_proj.weight_scale", src, tmp_path)
    quantize_checkpoint(tiny.write_single(tmp_path / "plain", state), tmp_path / "fp8")
    refused(CheckpointError, "is quantized already .*compressed-tensors", tmp_path / "fp8", tmp_path)


def test_nothing_to_quantize_is_an_error(tmp_path):
    """A copy that calls itself FP8 would help nobody."""
    src = tiny.write_single(tmp_path / "in", {"model.norm.weight": torch.ones(8)})
    refused(CheckpointError, "holds no weight that would become FP8", src, tmp_path)


def test_transposed_weights_are_refused(tmp_path):
    """GPT-2 stores [K, N]: a scale a row would be one an input."""
    src = tiny.write_single(tmp_path / "in", {"h.0.attn.c_attn.weight": torch.ones(8, 24)}, {"model_type": "gpt2"})
    refused(UnsupportedLayoutError, r"gpt2 store weights as \[K, N\]", src, tmp_path)


def test_fused_shards_are_treated_alike(tmp_path):
    """k alone in high precision, or with another scheme, is what engines cannot load into qkv."""
    src = tiny.write_single(tmp_path / "in", tiny.tensors(num_layers=1))
    refused(
        UnsupportedLayoutError, "k_proj.weight` .kept. and .* must be treated alike", src, tmp_path, ignore=["*.k_proj"]
    )
    refused(UnsupportedLayoutError, "treated alike", src, tmp_path, schemes={"*.up_proj": "per_tensor"})
