"""vLLM's engine as users start it: `LLM(...)` in a process of its own, tokens and the bytes of its worker's weights."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .vllm_env import make_model, needs_kernels  # isort: skip

import fp8_kernels as fk
from tests import models

pytestmark = [pytest.mark.slow, needs_kernels]

# The plugin is found by its entry point: the script says nothing of it.
SCRIPT = """
import json, sys
from digests import digests
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    llm = LLM(enforce_eager=True, max_model_len=64, max_num_seqs=2, **given["engine"])
    outputs = llm.generate(given["prompts"], SamplingParams(temperature=0, max_tokens=given["tokens"], ignore_eos=True))
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    print("RESULT", json.dumps({"tokens": tokens, "weights": llm.apply_model(digests)[0]}))
"""
# A module of its own: vLLM's workers import it by name.
DIGESTS = """
import hashlib
import torch

def digests(model):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    raw = {name: t.detach().contiguous().flatten().view(torch.uint8) for name, t in tensors.items()}
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in raw.items()}
"""


@pytest.fixture
def folder():
    """Not `tmp_path`: pytest keeps that for the latest few runs only, and these tests take minutes."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def generate(checkpoint, folder, prompts, tokens, **engine):
    """What `LLM(checkpoint, **engine)` generates, and a digest of each tensor that its worker holds."""
    script = folder / "generate.py"
    script.write_text(SCRIPT)
    (folder / "digests.py").write_text(DIGESTS)
    given = {"engine": {"model": str(checkpoint), **engine}, "prompts": prompts, "tokens": tokens}
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    done = subprocess.run(
        [sys.executable, script, json.dumps(given)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=1800,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(results[0].removeprefix("RESULT "))


PROMPTS = [{"prompt_token_ids": [5, 17, 300, 44]}, {"prompt_token_ids": [9, 8, 7]}]


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (None, {"quantization": "fp8_kernels"}),
        ({"quantization": "fp8_per_channel"}, {"quantization": "fp8_per_channel", "load_format": "fp8_kernels"}),
    ],
)
def test_tiny_model_generates_the_same_tokens(folder, theirs, ours):
    """As the quantized folder (None), and as vLLM's own loading of its own scheme."""
    source = make_model(folder / "bf16")
    if theirs is None:
        fk.quantize_checkpoint(source, folder / "fp8")
        theirs = {"model": str(folder / "fp8")}
    common = {"skip_tokenizer_init": True}
    expected = generate(source, folder, PROMPTS, 8, **common, **theirs)
    got = generate(source, folder, PROMPTS, 8, **common, **ours)
    assert got == expected and [len(tokens) for tokens in got["tokens"]] == [8, 8]


def test_smollm2_generates_the_tokens_of_its_quantized_folder(folder):
    """SmolLM2-135M, all 30 layers; a few tokens, since each takes vLLM's CPU kernel many seconds."""
    source = models.smollm2()
    fk.quantize_checkpoint(source, folder / "fp8")
    prompts = ["The capital of France is"]
    expected = generate(folder / "fp8", folder, prompts, 3)
    got = generate(source, folder, prompts, 3, quantization="fp8_kernels")
    assert got == expected and len(got["weights"]) > 300
    assert got["tokens"][0][0] == 7042  # " Paris"
