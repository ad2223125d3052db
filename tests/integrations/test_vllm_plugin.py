"""What of the vLLM integration can be told where there is no vLLM."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from fp8_kernels.integrations.vllm import compat, register
from fp8_kernels.integrations.vllm.options import Options

ROOT = Path(__file__).parents[2]


def test_importing_takes_no_vllm():
    """Neither the package nor the module of the entry point imports an engine."""
    code = "import sys, fp8_kernels, fp8_kernels.integrations.vllm; print([m for m in sys.modules if m[:4] == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_entry_point_names_the_function():
    """As it is written in pyproject.toml, and as it is installed where the package is."""
    name, group = "fp8_kernels.integrations.vllm:register", "vllm.general_plugins"
    section = (ROOT / "pyproject.toml").read_text().partition(f'[project.entry-points."{group}"]')[2]
    assert section.splitlines()[1] == f'fp8_kernels = "{name}"'
    installed = [point for point in entry_points(group=group) if point.name == "fp8_kernels"]
    assert all(point.value == name and point.load() is register for point in installed)


def test_options_are_told_from_vllms_own():
    """What is not ours goes on to vLLM's loader, which refuses what it does not know."""
    extra = {"scheme": "per_block", "ignore": ["lm_head"], "enable_multithread_load": True, "num_threads": 4}
    options, rest = Options.split(extra)
    assert options == Options(scheme="per_block", ignore=("lm_head",))
    assert rest == {"enable_multithread_load": True, "num_threads": 4}


@pytest.mark.parametrize(
    "extra, error",
    [
        ({"scheme": "per_row"}, ValueError),
        ({"schemes": {"*": "per_row"}}, ValueError),
        ({"ignore": "lm_head"}, TypeError),
        ({"include": "lm_head"}, TypeError),
    ],
)
def test_options_that_cannot_be_are_refused(extra, error):
    """Before vLLM starts anything."""
    with pytest.raises(error):
        Options.split(extra)


def test_options_without_use_are_refused():
    """An option that does nothing would be believed."""
    with pytest.raises(ValueError, match="must not hold staging_budget"):
        Options(staging_budget=1).check_fits("fp8_kernels", ours=True)
    with pytest.raises(ValueError, match="must not hold scheme, ignore"):
        Options(scheme="per_tensor", ignore=("a",)).check_fits("fp8_per_block", ours=False)


def test_a_digest_is_of_what_runs():
    """Comments and blank lines change nothing; code does."""

    def method(x):
        return x + 1

    first = compat.digest(method)

    def method(x):
        # Why.

        return x + 1

    assert compat.digest(method) == first

    def method(x):
        return x + 2

    assert compat.digest(method) != first
