"""The threads that copy to a device, on a stand-in for the CUDA driver (tests/fake_driver.cpp) whose copies come late:
a slot that is read into too early, a copy over the end of what is page-locked and memory that stays locked all show.

Each case runs in a process of its own, as a process finds its driver once.
"""

import ctypes
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fp8_kernels.loading import engine, prefetch

SIZE = 3 << 20
STREAM = types.SimpleNamespace(cuda_stream=5)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The stand-in, compiled."""
    if engine.native() is None or shutil.which("g++") is None:
        pytest.skip("needs the CPU extension and a compiler")
    path = tmp_path_factory.mktemp("driver") / "libfake.so"
    source = Path(__file__).parents[1] / "fake_driver.cpp"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["g++", *options, source, "-o", path], check=True)
    return path


@pytest.mark.parametrize("case", ["whole", "left_early", "refused", "loop", "loop_refused"])
def test_copies_that_come_late(driver, case, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-X", "faulthandler", __file__, driver, case, tmp_path]
    subprocess.run(command, check=True, env=environment, timeout=120)


class Fake:
    """The stand-in's own functions."""

    def __init__(self, path):
        library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        self.copies, self.locked, self.errors = library.fake_copies, library.fake_locked, library.fake_errors
        self.fail_after = library.fake_fail_after
        for function in (self.copies, self.locked, self.errors):
            function.restype = ctypes.c_int64
        self.fail_after.argtypes = [ctypes.c_int64]


def move(fake, folder, case):
    """Groups of random sizes through rings smaller and larger than they are."""
    data = random.randbytes(SIZE)
    (folder / "data").write_bytes(data)
    fd = os.open(folder / "data", os.O_RDONLY)
    for threads, chunk, slots in ((1, 4096, 1), (3, 8192, 3), (8, 65536, 7), (4, 100_000, 5), (8, 1 << 20, 48)):
        if case == "refused":
            fake.fail_after(fake.copies() + random.randrange(3))
        moving = engine.NativeEngine(threads, chunk, slots, False, True, STREAM)
        out, runs, at = ctypes.create_string_buffer(SIZE), [], 0
        while at < SIZE:
            size, group = min(SIZE - at, random.randrange(1, 200_000)), len(runs)
            runs.append(engine.Run(fd, at, size, ctypes.addressof(out) + at, group, max(group - 8, -1)))
            at += size
        moving.add(runs)
        try:
            for group in range(len(runs) // 2 if case == "left_early" else len(runs)):
                moving.wait(group, STREAM)
                moving.release(group, STREAM)
            assert case != "refused"
        except engine.EngineError as error:
            assert case == "refused" and error.what == "cuMemcpyHtoDAsync: FAKE_ERROR"
        moving.close()
        assert case != "whole" or out.raw[:SIZE] == data
        assert fake.locked() == 0 and fake.errors() == 0
        fake.fail_after(-1)


def walk(fake, folder, case):
    """Tensors of a file in its order, small ones and ones larger than the ring, with leaps and other memory between."""
    tensors = {f"w{i:02}": torch.randn(random.choice([64, 5000, 90_000, 200_000])) for i in range(60)}
    save_file(tensors, folder / "a.safetensors")
    for slot_bytes, slots in ((4096, 2), (65536, 3), (16384, 32), (1 << 18, 8)):
        sources = prefetch.Prefetch(torch.device("cpu"))
        for kind in ("file", "memory"):
            sources._readers[kind] = prefetch.library().fp8_ahead_create(slot_bytes, slots, 4, 1)
        if case == "loop_refused":
            fake.fail_after(fake.copies() + random.randrange(5, 20))
        arrived, refused = {}, None
        with safe_open(folder / "a.safetensors", "pt") as f:
            names = sorted(tensors)
            for i, name in enumerate(names + names[20:40]):
                arrived[name] = torch.empty_like(tensors[name])
                source = f.get_tensor(name) if i % 7 else tensors[name].repeat(2)[: len(tensors[name])]
                try:
                    sources.bring(arrived[name], source)
                except RuntimeError as error:
                    assert case == "loop_refused" and "error 700" in str(error)
                    refused = arrived.pop(name)  # alive until what was copied of it before is there
                    break
        sources.close()
        assert all(torch.equal(t, tensors[name]) for name, t in arrived.items())
        assert (len(arrived) == len(tensors)) == (case == "loop") == (refused is None)
        assert fake.locked() == 0 and fake.errors() == 0
        fake.fail_after(-1)


if __name__ == "__main__":
    (move if "loop" not in sys.argv[2] else walk)(Fake(sys.argv[1]), Path(sys.argv[3]), sys.argv[2])
