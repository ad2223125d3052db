"""Fixtures for every test: seeds from the test's name, and a reason for each skipped GPU test."""

import random
import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(request):
    """The same test sees the same numbers in every run, and different ones than its neighbours."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Checkpoints of the tiny models, name -> folder, written once."""
    from . import models  # not in every environment that tests run in

    made = {}

    def folder(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = models.save(getattr(models, name)(), tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; run `pytest -m gpu` on a machine that has one")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
