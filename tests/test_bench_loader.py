"""The benchmark of loads: its shapes, its arithmetic, and that it runs."""

import json

import torch

from bench import loader, readme


def test_shapes_are_those_of_the_models():
    """Bytes of the checkpoints that the bars speak of, and shards that cover each parameter once."""
    qwen, deepseek = loader.qwen_moe(), loader.deepseek_layer()
    for shapes, gib in ((qwen, 26.67), (deepseek, 21.0)):
        total = sum(p.nbytes for p in shapes.model.parameters())
        assert round(total / 2**30, 2) == gib
        assert total == 2 * sum(torch.Size(shard[3]).numel() for shard in shapes.shards)
    assert len(qwen.shards) > 4500


def test_bars_compare_with_what_was_measured():
    """A load is compared with the bar of its order, a host time with 50 microseconds."""
    case = {"model": "qwen", "scheme": "per_channel", "shuffled": False, "resident": 1, "budget": 256 << 20}
    case |= {"allocated_above": 63 << 20, "reserved_above": 257 << 20}
    lines = loader.bars({"memory": [case, {**case, "shuffled": True, "reserved_above": 321 << 20}]})
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["met", "MISSED", "met", "MISSED"]
    schemes = {"per_channel": {"us": 60, "above": 49.0}, "per_tensor": {"us": 62, "above": 51.0}}
    lines = loader.bars({"host": {"experts": {"pageable": {"plain": 11, **schemes}}}})
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["met", "MISSED"]


def test_the_readme_holds_what_was_measured():
    """The table of loads in bench/README.md is what the results file renders to."""
    assert readme.shown(readme.COST_BEGIN, readme.COST_END) == readme.cost_block()
    assert "NVIDIA H100" in readme.cost_block()


def test_it_runs_where_there_is_no_gpu(tmp_path, capsys):
    """Small shapes on the CPU: a table, and the numbers as JSON."""
    arguments = ["--device", "cpu", "--layers", "1", "--scale-down", "32", "--max-shards", "100"]
    assert loader.main([*arguments, "--save", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "loader_cpu.json").read_text())
    assert len(result["memory"]) == 7 and result["host"]["sweep"]["100"]["plain"] > 0
    assert "| qwen | per_channel | in order |" in capsys.readouterr().out
