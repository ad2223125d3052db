"""Weight updates from another process: CUDA IPC on one GPU, NCCL on two; a captured graph replays with what came."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from fp8_kernels.loading import LayerwiseLoader

from .test_reload_gpu import Captured, build, loaded, new_state, pointers

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
STEPS = 3


def run_example(name):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "python" / name)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ipc_example_runs_on_cuda():
    """Both processes of the example share one GPU, and the buffers are CUDA memory."""
    said = run_example("rl_ipc.py")
    assert said.count("no address changed (cuda)") == 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_broadcast_example_runs_over_nccl():
    """A GPU each."""
    assert run_example("rl_broadcast.py").count("(nccl, cuda:1)") == 3


def train(channel, seeds):
    """The trainer's process: one CUDA buffer, which every tensor of every step passes through and which is spoilt
    before the next."""
    size = max(t.numel() for t in build().state_dict().values())
    buffer = torch.empty(size, dtype=torch.bfloat16, device="cuda")
    channel.send(buffer)
    for seed in seeds:
        for name, tensor in new_state(seed).items():
            buffer.fill_(float("nan"))
            buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
            torch.cuda.synchronize()
            channel.send((name, tensor.shape))
            channel.recv()
        channel.send(None)
    channel.recv()


@pytest.mark.parametrize("mode", ["transactional", "streaming"])
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block"])
def test_graph_replays_with_weights_from_ipc(scheme, mode):
    """A serving model with a captured graph takes each update out of one buffer of another process: no address
    changes, and the graph computes what a model computes that was loaded with those weights."""
    seeds = list(range(2, 2 + STEPS))
    model = loaded(scheme)
    captured, before = Captured(model), pointers(model)
    context = mp.get_context("spawn")
    channel, other = context.Pipe()
    process = context.Process(target=train, args=(other, seeds), daemon=True)
    process.start()
    try:
        buffer = channel.recv()
        assert buffer.is_cuda
        for seed in seeds:
            with LayerwiseLoader(model, reload=mode):
                params = dict(model.named_parameters())
                while (message := channel.recv()) is not None:
                    name, shape = message
                    params[name].data.copy_(buffer[: shape.numel()].view(shape))
                    torch.cuda.current_stream().synchronize()
                    channel.send("taken")
            assert pointers(model) == before
            with torch.no_grad():
                wanted = loaded(scheme, seed=seed)(captured.x)
            assert torch.equal(captured.replay(), wanted)
        del buffer
        channel.send("done")
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
