"""The command, run as a user runs it: what it prints, what it writes, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8_kernels import cli
from tests.checkpoint import tiny

ROOT = Path(__file__).resolve().parents[1]


def run(*args, **kwargs):
    """`python -m fp8_kernels` in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fp8_kernels", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **kwargs)


@pytest.fixture
def checkpoint(tmp_path):
    return tiny.write_sharded(tmp_path / "model", tiny.tensors())


def test_plan_shows_every_decision_and_loads_nothing(checkpoint, capsys):
    """Layers of one kind share a row; what is kept says why; sizes add up."""
    assert cli.main(["plan", str(checkpoint), "--ignore", "model.layers.1.mlp"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.weight" in out and "FP8 per_channel" in out
    assert "(embedding)" in out and "(ignore='model.layers.1.mlp')" in out
    assert cli.main(["plan", str(checkpoint), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    state = tiny.tensors()
    assert plan["bytes_in"] == sum(t.numel() * t.element_size() for t in state.values())
    assert {t["name"] for t in plan["tensors"] if t["scheme"]} == set(tiny.weights(state))
    assert plan["bytes_in"] > plan["peak"] > plan["resident"]


def test_plan_promises_nothing_for_weights_that_lie_turned(tmp_path, capsys):
    """GPT-2's rows are no output channels: `quantize` refuses them, and no module runs them in FP8."""
    state = tiny.tensors(num_layers=1)
    folder = tiny.write_single(tmp_path / "model", state, {"model_type": "gpt2"})
    assert cli.main(["plan", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "(stored as [K, N])" in out and f"\n0 of {len(state)} tensors become FP8" in out


def test_quantize_then_verify(checkpoint, tmp_path, capsys):
    """The folder appears, verifies against its source, and stops verifying when one byte changes."""
    out = tmp_path / "fp8"
    assert cli.main(["quantize", str(checkpoint), str(out), "--scheme", "per_tensor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized_tensors"] == 14
    assert cli.main(["verify", str(out), "--against", str(checkpoint)]) == 0
    file = next(file for file in out.glob("*.safetensors") if file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert cli.main(["verify", str(out), "--against", str(checkpoint)]) == 1
    printed = capsys.readouterr().out
    assert any(name in printed for name in tiny.tensors())


def test_amax_is_used_when_quantizing(checkpoint, tmp_path, capsys):
    """The sidecar appears beside the weights; once they change it stops `quantize`, by name."""
    assert cli.main(["amax", str(checkpoint), "--device", "cpu"]) == 0
    assert "fp8_amax.json" in capsys.readouterr().out and (checkpoint / "fp8_amax.json").exists()
    os.utime(next(checkpoint.glob("*.safetensors")))
    assert cli.main(["quantize", str(checkpoint), str(tmp_path / "fp8"), "--scheme", "per_tensor"]) == 2
    assert "fp8_amax.json is stale" in capsys.readouterr().err


def test_schemes_by_pattern(checkpoint, tmp_path, capsys):
    """--scheme-for gives some weights another scheme; --include takes the head along."""
    args = ["plan", str(checkpoint), "--json", "--scheme-for", "*.down_proj=per_tensor", "--include", "lm_head"]
    assert cli.main(args) == 0
    schemes = {t["name"]: t["scheme"] for t in json.loads(capsys.readouterr().out)["tensors"]}
    assert schemes["model.layers.0.mlp.down_proj.weight"] == "per_tensor"
    assert schemes["model.layers.0.mlp.up_proj.weight"] == schemes["lm_head.weight"] == "per_channel"


BAD_INPUT = {
    "not a checkpoint": (["plan", "{tmp}"], "is not a checkpoint"),
    "no such folder": (["quantize", "{tmp}/nowhere", "{tmp}/out"], "does not exist"),
    "unmatched pattern": (["quantize", "{model}", "{tmp}/out", "--ignore", "lm_haed"], "'lm_haed'"),
    "bad pair": (["plan", "{model}", "--scheme-for", "per_tensor"], "PATTERN=SCHEME"),
    "bad layout": (["quantize", "{model}", "{tmp}/out", "--scheme", "mxfp8"], "per_channel"),
    "bad regular expression": (["plan", "{model}", "--ignore", "re:q_proj("], "'re:q_proj('"),
    "compare alone": (["load", "{model}", "--compare"], "--generate"),
    "no tokenizer": (["load", "{model}", "--device", "cpu", "--generate", "Once"], "model must hold a tokenizer"),
    "generate nowhere": (["load", "{tmp}/nowhere", "--generate", "Once"], "nowhere does not exist"),
}


@pytest.mark.parametrize("args, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_exits_with_2_and_one_line(args, message, checkpoint, tmp_path, capsys):
    """No traceback, nothing written, and the message says what is wrong."""
    assert cli.main([a.format(tmp=tmp_path, model=checkpoint) for a in args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("fp8-kernels: ") and not captured.out
    assert not (tmp_path / "out").exists()


def test_what_is_interrupted_goes_on(checkpoint, tmp_path, capsys, monkeypatch):
    """Ctrl-C says what the half-made folder is good for; the same command then makes it whole."""

    class Stops:
        def __init__(self, label):
            self.calls = 0

        def __call__(self, *progress):
            self.calls += 1
            if self.calls > 9:
                raise KeyboardInterrupt

    command = ["quantize", str(checkpoint), str(tmp_path / "out"), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(cli, "ByteProgress", Stops)
        assert cli.main(command) == 130
    assert "interrupted; the same command goes on from there" in capsys.readouterr().err
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    assert cli.main(command) == 0 and cli.main(["verify", str(tmp_path / "out"), "--against", str(checkpoint)]) == 0


def test_unknown_scheme_lists_the_known_ones(checkpoint):
    """argparse's own check, with its exit code."""
    result = run("plan", checkpoint, "--scheme", "per_row")
    assert result.returncode == 2 and "per_channel" in result.stderr


def test_a_package_that_is_missing_is_named(checkpoint, capsys, monkeypatch):
    """transformers is an extra: `load` without it says so."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["load", str(checkpoint), "--device", "cpu"]) == 2
    assert "`load` needs transformers: pip install transformers" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused(device, checkpoint, tmp_path, capsys):
    """Before anything is read or written."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quantize", str(checkpoint), str(tmp_path / "out"), "--device", device])
    assert stopped.value.code == 2 and f"'{device}' is not a device of this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_but_results_on_a_pipe(checkpoint, tmp_path):
    """Progress is for terminals: through a pipe, stderr stays empty and stdout is the report."""
    result = run("quantize", checkpoint, tmp_path / "out")
    assert result.returncode == 0 and result.stderr == "" and "14 weights" in result.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes break otherwise there")
def test_a_reader_that_has_seen_enough_is_no_error(checkpoint):
    """`fp8-kernels plan MODEL_DIR | head -1` prints no complaint."""
    command = [sys.executable, "-m", "fp8_kernels", "plan", str(checkpoint), "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_an_error_on_a_terminal_does_not_stand_behind_the_progress(checkpoint, tmp_path, capsys, monkeypatch):
    """What is left of the line is cleared first; in a log there is nothing to clear."""
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda there=is_terminal: there)
        assert cli.main(["plan", str(tmp_path / "nowhere")]) == 2
        assert capsys.readouterr().err.startswith("\r\x1b[Kfp8-kernels: " if is_terminal else "fp8-kernels: ")


def test_env_names_versions_and_backends():
    """What a bug report needs."""
    found = json.loads(run("env", "--json").stdout)
    assert found["torch"] == torch.__version__ or found["torch"] in torch.__version__
    assert found["backends"]["cpu"] == (["cpu"] if "cpu" in found["extensions"] else []) + ["reference"]
    assert bool(found["devices"]) == torch.cuda.is_available()


def test_help_describes_every_command():
    """The first thing that a newcomer types."""
    out = run("--help").stdout
    for command in ("plan", "quantize", "load", "verify", "env"):
        assert command in out
