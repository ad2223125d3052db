"""The examples under python/ run as they stand, on whatever device there is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = (
    "engine_loader.py",
    "moe_experts.py",
    "quantize_one_weight.py",
    "reload_weights.py",
    "rl_broadcast.py",
    "rl_ipc.py",
)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example):
    """Each asserts its own claim (bytes equal to quantizing after a plain load) and exits with 0."""
    command = [sys.executable, str(ROOT / "python" / example)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_is_short(example):
    """An example is to be copied: it says what to copy, and fits on two pages."""
    text = (ROOT / "python" / example).read_text()
    assert "What to copy:" in text.split('"""')[1]
    assert len(text.splitlines()) <= 100


def _environment():
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
