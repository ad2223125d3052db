"""README and docs stay true: every command and every Python block in them is run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fp8_kernels
from fp8_kernels import cli
from fp8_kernels.integrations import sglang, vllm
from fp8_kernels.integrations.vllm.options import Options
from tests.checkpoint import tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(language):
    """(page:line, text) of every fenced block of that language."""
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match.group(1), id=f"{page.name}:{line}")


def commands():
    """(page:line, words) of every line of every shell block, comments taken off."""
    for block in blocks("sh"):
        for line in block.values[0].splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield pytest.param(words, id=f"{block.id} {' '.join(words)}")


@pytest.mark.parametrize("words", list(commands()))
def test_command(words, tmp_path, capsys):
    """Every command of the docs does what it says there.

    `fp8-kernels` runs on a small model. Of `vllm` and `sglang` the options are ours to check; tests/integrations runs
    their loaders. `make` targets are parsed and expanded; the demo itself runs in test_demo.py and the tests are what
    runs this. `pip install` builds the wheel (test_package.py).
    """
    if words[0] == "fp8-kernels":
        model = make_model(tmp_path / "model")
        if "OUT_DIR" in words and words[1] != "quantize":
            assert cli.main(["quantize", str(model), str(tmp_path / "out")]) == 0
        paths = {"MODEL_DIR": str(model), "OUT_DIR": str(tmp_path / "out")}
        assert cli.main([paths.get(word, word) for word in words[1:]]) == 0
        assert capsys.readouterr().out.strip()
    elif words[0] == "sglang":
        given = dict(zip(words[3::2], words[4::2], strict=True))
        assert given.pop("--quantization") == sglang.NAME
        options = json.loads(given.pop("--model-loader-extra-config", "{}"))
        assert sglang.options_of(options)["scheme"] and not given
    elif words[0] == "vllm":
        given = dict(zip(words[3::2], words[4::2], strict=True))
        method, load_format = given.pop("--quantization"), given.pop("--load-format", None)
        options, rest = Options.split(json.loads(given.pop("--model-loader-extra-config", "{}")))
        options.check_fits(method, ours=method == vllm.NAME)
        assert vllm.NAME in (method, load_format) and not rest and not given
    elif words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["python", "-m"]:
        subprocess.run([sys.executable, *words[1:3], "--help"], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "pytest":
        subprocess.run(
            [sys.executable, "-m", *words, "--collect-only", "-q"], cwd=ROOT, check=True, capture_output=True
        )
    else:
        assert words[:2] == ["pip", "install"], f"no test runs `{' '.join(words)}`"


@pytest.mark.parametrize("text", list(blocks("python")))
def test_python_block(text, tmp_path, monkeypatch):
    """Every Python block runs, with a model, weights and a checkpoint of the reader's own."""

    class MyModel(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.qkv_proj = torch.nn.Linear(64, 96, bias=False)
            self.lm_head = torch.nn.Linear(64, 128, bias=False)

        def load_weights(self, weights):
            params = dict(self.named_parameters())
            for name, tensor in weights:
                params[name].data.copy_(tensor)

    class MyFp8Model(MyModel):
        """Of an engine that loads FP8 checkpoints: codes and scales are parameters."""

        def __init__(self, config, quantization_config):
            super().__init__(config)
            assert quantization_config["ignore"] == ["lm_head"]
            proj = torch.nn.Module()
            proj.weight = torch.nn.Parameter(torch.zeros(96, 64).to(torch.float8_e4m3fn), requires_grad=False)
            proj.weight_scale = torch.nn.Parameter(torch.zeros(96, 1), requires_grad=False)
            self.qkv_proj = proj

    weights = [("qkv_proj.weight", torch.randn(96, 64)), ("lm_head.weight", torch.randn(128, 64))]
    monkeypatch.chdir(tmp_path)
    tiny.write_single(tmp_path / "path/to/checkpoint", dict(weights))
    if not torch.cuda.is_available():
        text = text.replace('device="cuda"', 'device="cpu"')
    names = {"MyModel": MyModel, "MyFp8Model": MyFp8Model, "config": None, "weights": iter(weights), "fk": fp8_kernels}
    names["new_weights"] = [(name, tensor + 1) for name, tensor in weights]
    exec(compile(text, "block", "exec"), names)
    if "model" in names:
        assert names["model"].qkv_proj.weight.dtype == torch.float8_e4m3fn


def test_links_lead_somewhere():
    """Relative links name files of the repository."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def table(text):
    """Cells of the README's table that follows a text, row by row, without its head."""
    after = (ROOT / "README.md").read_text().partition(text)[2]
    lines = after[after.index("\n|") + 1 :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def results(name):
    return json.loads((ROOT / "bench/results" / f"{name}.json").read_text())


def test_accuracy_in_the_readme_is_what_was_measured():
    """Each row of the table is two rows of the results, rounded; the GPU's are as near as the text says."""
    cpu, gpu = (
        {(row["scheme"], row["activation"]): row for row in results(f"accuracy_{machine}")["rows"]}
        for machine in ("cpu", "nvidia-h100-80gb-hbm3")
    )
    rows = table("**What FP8 costs.**")
    assert len(rows) == len(cpu) / 2
    for scheme, *cells in rows:
        for activation, shown in (("none", cells[:3]), ("dynamic", cells[3:])):
            row = cpu[scheme.strip("`"), activation]
            assert shown == [f"{row['kl']:.4f}", f"{row['top1']:.3f}", f"{row['ppl']:.2f}"], (scheme, activation)
    words = r"KL and top-1 are\s+within ([\d.]+) of it, perplexity within ([\d.]+)\)"
    near, perplexity = map(float, re.search(words, (ROOT / "README.md").read_text()).groups())
    for key, row in cpu.items():
        assert abs(row["ppl"] - gpu[key]["ppl"]) <= perplexity
        assert all(abs(row[what] - gpu[key][what]) < near + 5e-5 for what in ("kl", "top1"))


def test_loads_in_the_readme_are_what_was_measured():
    """Seconds, GB/s and memory of each way are those of the results, rounded."""
    saved = results("load_nvidia-h100-80gb-hbm3")
    measured = {
        (load["system"], load.get("scheme")): load
        for load in (*saved["loads"], *saved["loops"])
        if load["model"].startswith("qwen") and load["cache"] == "warm" and "seconds" in load
    }
    ways = [("fp8_kernels", "per_channel"), ("fp8_kernels", "per_tensor"), ("engine's loop", "per_channel")]
    ways += [("engine's loop", "bf16"), ("transformers bf16", None), ("transformers FineGrainedFP8", None)]
    for way, (_, seconds, rate, above) in zip(ways, table("**Loading.**"), strict=True):
        load = measured[way]
        size = (load["peak_allocated"] - load["resident"]) / 2**20
        sizes = {f"{size:.0f}" if round(size) == 0 else f"{size:.0f} MiB", f"{size / 1024:.1f} GiB"}
        assert (seconds, rate) == (f"{load['seconds']:.2f}", f"{load['gb_per_s']:.1f}") and above in sizes, way


def make_model(folder):
    """A small Llama with a tokenizer, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers", reason="`fp8-kernels load` builds transformers models")
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tiny.VOCAB,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"Once": 3, "upon": 4, "[UNK]": 5}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
