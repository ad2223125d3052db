"""The benchmark of models inside transformers: its checkpoint, its arithmetic, and that it runs."""

import torch

import fp8_kernels as fk
from bench import engine_tables, engines, readme, running


def test_checkpoint_is_of_the_models_shapes(tmp_path):
    """26.67 GiB at full size; a small one loads, whole."""
    total = sum(2 * torch.Size(shape).numel() for shape in engines.moe_shapes(engines.MOE).values())
    assert round(total / engines.GIB, 2) == 26.67
    small = {name: size // 16 for name, size in engines.MOE.items() if "size" in name}
    engines.write_checkpoint(tmp_path, engines.MOE | small | {"num_hidden_layers": 2, "num_experts": 5})
    model, report = fk.load_model(tmp_path, device="cpu")
    assert report.quantized_tensors == 2 * (4 + 2 + 3)
    assert 0.01 < model.lm_head.weight.float().std() < 0.03


def test_bars_compare_with_what_was_measured():
    """Memory above resident with 0.6 GiB, seconds with two thirds of stock's, prefill with 1.4 of bf16's."""

    def run(seconds, excess):
        return [{"seconds": seconds, "resident": 5, "peak_allocated": 5 + excess, "peak_reserved": 0}]

    found = {
        "stock FineGrainedFP8": run(4.5, 0),
        "Fp8KernelsConfig": run(2.9, 600 << 20),
        "load_model": run(1, 1 << 30),
    }
    verdicts = [line.rsplit(" ", 1)[1] for line in engine_tables.load_bars(found)]
    assert verdicts == ["met", "MISSED", "met"]
    found["Fp8KernelsConfig"] = run(3.1, 700 << 20)
    verdicts = [line.rsplit(" ", 1)[1] for line in engine_tables.load_bars(found)]
    assert verdicts == ["MISSED", "MISSED", "MISSED"]
    times = {"bf16": {"prefill": 14.0, "token": 5.0, "prefill, compiled": 13.0}, "fp8": dict.fromkeys(
        ("prefill", "token", "prefill, compiled"), 10.0)}  # fmt: skip
    assert [line.rsplit(" ", 1)[1] for line in running.run_bars(times)] == ["met", "MISSED"]


def test_running_is_measured_where_there_is_no_gpu():
    """A small Llama on the CPU, in both precisions."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = running.run_both(running.DENSE | small, torch.device("cpu"), "per_channel", 129)
    assert all(ms > 0 for kind in ("bf16", "fp8") for ms in found[kind].values())
    assert len(running.run_table(found)) == 5


def test_the_readme_holds_what_was_measured():
    """The tables of models in bench/README.md are what the results files render to."""
    assert readme.shown(readme.MODELS_BEGIN, readme.MODELS_END) == readme.models_block()
    assert "Fp8KernelsConfig" in readme.models_block()
