"""What `pip install .` gives: a wheel that imports and works outside of the repository."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_holds_the_package_and_works(tmp_path):
    """Without extensions it is pure Python; installed elsewhere it quantizes, and its command runs."""
    if not any(importlib.util.find_spec(name) for name in ("wheel", "setuptools.command.bdist_wheel")):
        pytest.skip("this setuptools (before 70.1) builds wheels only with the package `wheel`")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    source = tmp_path / "source"  # pip builds in place: keep build folders out of the repository
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    env = {**os.environ, "FP8_KERNELS_BUILD_CUDA": "0", "FP8_KERNELS_BUILD_CPU": "0"}
    subprocess.run(command, cwd=source, env=env, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import torch, fp8_kernels as fk; print(fk.__file__, fk.quantize(torch.ones(2, 2))[0].dtype)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert str(tmp_path / "site") in result.stdout and "float8_e4m3fn" in result.stdout, result.stderr
    help_text = subprocess.run(
        [sys.executable, "-m", "fp8_kernels", "--help"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert help_text.returncode == 0
