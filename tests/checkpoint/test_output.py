"""Writing on another thread keeps its order, its bounds and its errors."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from fp8_kernels.checkpoint import output as output_module
from fp8_kernels.checkpoint.output import FileOutput, Output
from fp8_kernels.checkpoint.safetensors_file import SafetensorsWriter
from fp8_kernels.errors import CheckpointError


def test_tasks_run_in_order_on_one_other_thread_and_all_are_waited_for():
    """Also what follows each of them, on the caller's thread, once it has run."""
    ran, followed = [], []
    with Output() as output:
        for i in range(50):
            output.put(
                lambda i=i: ran.append((i, threading.get_ident())), 1, lambda i=i: followed.append((i, len(ran)))
            )
    assert [i for i, _ in ran] == [i for i, _ in followed] == list(range(50))
    assert {thread for _, thread in ran} != {threading.get_ident()} and len({t for _, t in ran}) == 1
    assert all(count > i for i, count in followed)


@pytest.mark.parametrize("size,most", [(1, output_module.MAX_PENDING), (output_module.MAX_BYTES // 2, 2)])
def test_what_waits_is_bounded(size, most):
    """By number, and by bytes; a task that is larger than all that may wait runs alone."""
    held, peak = 0, 0

    def task():
        nonlocal held
        time.sleep(0.01)
        held -= 1

    with Output() as output:
        for _ in range(12):
            held += 1
            peak = max(peak, held)
            output.put(task, size)
        output.put(lambda: None, 3 * output_module.MAX_BYTES)
    assert most <= peak <= most + 1


def test_at_once_nothing_waits():
    """Tasks run on the caller's thread, before `put` returns."""
    ran = []
    with Output(at_once=True) as output:
        for i in range(5):
            output.put(lambda i=i: ran.append((i, threading.get_ident())), 1, lambda: ran.append("done"))
            assert ran[-2:] == [(i, threading.get_ident()), "done"]


def test_an_error_ends_it():
    """Raised once, here or at the end, and nothing that was put after it runs."""
    ran = []

    def fail():
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"), Output() as output:
        output.put(fail)
        for i in range(100):
            output.put(lambda i=i: ran.append(i))
    assert not ran


def test_a_file_is_there_when_it_is_complete(tmp_path):
    """Its tensors in any order; given up in the middle, nothing of it is left."""
    tensors = {f"w{i}": torch.randn(300, 50 + i) for i in range(20)}
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with Output() as output:
        with FileOutput(SafetensorsWriter(tmp_path / "a.safetensors", entries), output) as file:
            for name in reversed(tensors):
                file.write(lambda name=name: {name: tensors[name]}, tensors[name].nbytes)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], t) for name, t in tensors.items())
    with pytest.raises(RuntimeError, match="stop"), Output() as output:
        with FileOutput(SafetensorsWriter(tmp_path / "b.safetensors", entries), output) as file:
            file.write(lambda: {"w0": tensors["w0"]}, 1)
            raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    """An error of the writing thread reaches the caller, and the part that was written is removed."""
    entries = {"w": (torch.float32, (4,)), "v": (torch.float32, (4,))}

    def fail():
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"), Output() as output:
        with FileOutput(SafetensorsWriter(tmp_path / "a.safetensors", entries), output) as file:
            file.write(lambda: {"w": torch.zeros(4)}, 16)
            file.write(fail, 16)
            for _ in range(10):
                file.write(lambda: {"v": torch.zeros(4)}, 16)
    assert not list(tmp_path.iterdir())
