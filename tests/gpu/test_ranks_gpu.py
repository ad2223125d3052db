"""Ranks that load together over NCCL, a GPU each; the same checks as over gloo."""

import pytest
import torch

from ..loading import test_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < test_ranks.WORLD, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return test_ranks.run_ranks(tmp_path_factory.mktemp("ranks"), "nccl")


@pytest.mark.parametrize("check", [check.__name__ for check in test_ranks.CHECKS])
def test_two_ranks(outcomes, check):
    """See the docstring of each check; both ranks must have come through it."""
    assert outcomes[check] == ["ok"] * test_ranks.WORLD, "\n".join(outcomes[check])
