"""The conformance kit with everything on a GPU: also what only a GPU can show (graphs, reserved memory, devices)."""

import pytest

from fp8_kernels.testing import LayerwiseAdapter, NotOffered, loader_cases, run_case

pytestmark = pytest.mark.gpu
# Ranks over NCCL have tests of their own; the kit's use gloo and CPU tensors.
CASES = [c for s in ("per_channel", "per_tensor") for c in loader_cases(s) if "ranks" not in c.needs]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.scheme}")
def test_case_on_a_gpu(case):
    """What the case says must hold, holds where the model is on the GPU and its sources are on the CPU."""
    try:
        run_case(LayerwiseAdapter("cuda"), case)
    except NotOffered as reason:
        pytest.skip(f"needs {reason}")
