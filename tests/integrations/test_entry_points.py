"""What engines find by entry points: there, and importing no engine before it is called."""

import os
import subprocess
import sys

import pytest

from ..models import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
ENTRIES = sorted((group, value) for group, entries in GROUPS.items() for value in entries.values())


@pytest.mark.parametrize("group,value", ENTRIES)
def test_entry_point_imports_no_engine(group, value):
    """The function is there, and neither the package nor its module has imported the engine that looks for it."""
    module, _, function = value.partition(":")
    engine = group.partition(".")[0]
    code = (
        f"import sys, fp8_kernels, {module} as m; assert callable(m.{function}); assert {engine!r} not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
