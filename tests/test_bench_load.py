"""The benchmark of whole loads: its checkpoints, its arithmetic, and that it runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench import checkpoints, load, load_tables, plot, readme, timeline
from bench.files import read_all, weight_files

SMALL = ["--device", "cpu", "--layers", "1", "--scale-down", "16", "--max-small", "40", "--repeats", "1"]


def test_shapes_are_those_of_the_models():
    """Bytes and number of tensors of the published checkpoints."""
    qwen, llama = checkpoints.qwen_moe(), checkpoints.llama_8b()
    assert (round(qwen.num_bytes / 2**30, 2), len(qwen.shapes)) == (26.67, 4659)
    assert (round(llama.num_bytes / 2**30, 2), len(llama.shapes)) == (14.96, 291)


@pytest.mark.parametrize("make", checkpoints.MODELS.values())
def test_a_checkpoint_is_one_that_transformers_loads(make, tmp_path):
    """Several files with an index, every tensor of the class, values that are no zeros and no repetition."""
    transformers = pytest.importorskip("transformers")
    model = make(2, 16)
    folder = checkpoints.write(model, tmp_path / "model", 3, file_bytes=1_000_000)
    assert len(weight_files(folder)) > 2
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weight = loaded.model.embed_tokens.weight
    assert 0.015 < weight.float().std() < 0.025 and weight[0].ne(weight[1]).any()


def test_files_hold_what_their_headers_say(tmp_path):
    """No byte is missing or left over, and names lie sorted, as in files that transformers saves."""
    model = checkpoints.small_experts(9)
    (file,) = weight_files(checkpoints.write(model, tmp_path / "model", 2))
    with safe_open(file, "pt") as f:
        assert {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()} == model.shapes
        assert f.offset_keys() == sorted(f.keys())
        assert all(f.get_tensor(name).isfinite().all() and f.get_tensor(name).any() for name in f.keys())
    assert read_all([file], 2) > 0


def test_a_place_without_room_is_refused(tmp_path):
    """The message says how much there is."""
    with pytest.raises(OSError, match="must have room"):
        checkpoints.place_for(1 << 60, str(tmp_path))


def test_shares_of_a_timeline():
    """Overlapping spans count once, and one that crosses a border counts in both parts."""
    spans = [(1.0, 2.0), (1.5, 2.0), (2.5, 3.5), (9.0, 99.0)]
    assert timeline.shares(spans, 1.0, 4.0, 4) == [1.0, 0.5, 0.5, 0.0]
    assert sum(timeline.shares([(0, 1)], 0, 1, 7)) == pytest.approx(7, abs=0.01)


def test_bars_compare_with_what_was_measured():
    """Each figure against the bar of its model, scheme and cache."""
    row = {"model": "qwen1.5-moe-a2.7b", "system": "fp8_kernels", "scheme": "per_channel", "cache": "warm"}
    row |= {"bytes": 43e9, "seconds": 1.0, "gb_per_s": 43.0, "build_seconds": 0.5, "resident": 0}
    row |= {"peak_allocated": 63 << 20, "peak_reserved": 257 << 20, "host_process": 5, "host_machine": 1025 << 20}
    cold = {**row, "cache": "cold", "gb_per_s": 1.8}
    rival = {**row, "system": "transformers FineGrainedFP8", "seconds": 8.9}
    del rival["scheme"]
    result = {"loads": [row, cold, rival], "reads": [{"model": row["model"], "cache": "cold", "gb_per_s": 2.0}]}
    loop = {**row, "system": "engine's loop", "tensors": 5_000}
    small = {**loop, "model": "40 small weights"}
    result["loops"] = [{**loop, "gb_per_s": 29.0}, {**small, "scheme": "bf16", "seconds": 0.41}, small]
    verdicts = ["met" if line.endswith(": met") else "-" for line in load_tables.bars(result)]
    # Rate, times FineGrainedFP8, allocated, reserved, host; the cold one's rate and memory; both loops.
    assert verdicts == ["met", "-", "met", "-", "-"] + ["-", "met", "-", "-"] + ["-", "met", "met"]


def test_the_readme_holds_what_was_measured():
    """The tables of whole loads in bench/README.md are what the results render to."""
    assert readme.shown(readme.LOAD_BEGIN, readme.LOAD_END) == readme.load_block()


def test_it_runs_where_there_is_no_gpu(tmp_path, capsys):
    """Small shapes on the CPU, every part but the timeline: a table, and the numbers as JSON."""
    pytest.importorskip("transformers")
    assert load.main([*SMALL, "--folder", str(tmp_path), "--save", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "load_cpu.json").read_text())
    ours = [row for row in result["loads"] if row["system"] == "fp8_kernels" and row["cache"] == "warm"]
    assert len(ours) == 6 and all(row["seconds"] > 0 for row in ours)
    assert [row["scheme"] for row in result["loops"]] == [
        "bf16",
        "per_channel",
        "per_tensor",
        *["bf16", "per_channel"] * 2,
    ]
    assert "absent" in next(row for row in result["loads"] if row["system"] == "transformers FineGrainedFP8")
    assert result["quantize"][0]["bytes_out"] > 0 and result["quantize"][0]["model"] == "llama-3.1-8b, 1 layers"
    assert "| qwen1.5-moe-a2.7b | fp8_kernels | per_channel | warm |" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["load_cpu.json"]


def test_a_budget_leaves_out_what_comes_last(tmp_path, capsys):
    """With no time at all nothing is measured, all of it is named, and nothing stays on the disk."""
    assert load.main([*SMALL, "--folder", str(tmp_path), "--budget", "0"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("left out, 0 s were over: qwen") and last.endswith("small weights")
    assert not list(tmp_path.iterdir())


def test_a_timeline_is_drawn(tmp_path):
    """One SVG beside the results."""
    pytest.importorskip("matplotlib")
    lanes = {lane: [0.0, 1.0, 0.5, 0.25] for lane in timeline.LANES}
    found = {"model": "m", "scheme": "per_channel", "seconds": 0.5, "lanes": lanes}
    results = {"machine": {"gpu": "none", "date": "today"}, "timeline": found}
    (file,) = plot.draw(results, Path(tmp_path / "load_none"))
    assert file.name == "load_none_timeline.svg" and "host, not waiting" in file.read_text()
