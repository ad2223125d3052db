"""A trainer in another process writes weights into two buffers, over and over; a serving FP8 model takes them.

What to copy: `receive`, which gives your loader each tensor where the trainer put it and says when the buffer may be
written again, and `update` around it. Of a shard nothing is kept once the loader is done with it, so two buffers carry
a model of any size. On a GPU they are CUDA memory of the trainer's, opened here by its IPC handle; without one
they are shared memory.
"""

import torch
import torch.multiprocessing as mp
from torch import nn

import fp8_kernels as fk

HIDDEN, INTERMEDIATE, STEPS = 192, 344, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build():
    return nn.Sequential(
        nn.Linear(HIDDEN, INTERMEDIATE), nn.SiLU(), nn.Linear(INTERMEDIATE, HIDDEN), nn.LayerNorm(HIDDEN)
    ).bfloat16()


def weights_after(step):
    """The trainer's weights; both processes can make them, so that this one can compare."""
    torch.manual_seed(step)
    return build().state_dict()


def finish_work():
    if DEVICE == "cuda":
        torch.cuda.current_stream().synchronize()  # the other process cannot wait for this one's stream


def train(channel):
    buffers = [torch.empty(HIDDEN * INTERMEDIATE, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    channel.send([buffer if DEVICE == "cuda" else buffer.share_memory_() for buffer in buffers])
    for step in range(STEPS):
        free = [0, 1]
        for name, tensor in weights_after(step).items():
            turn = free.pop() if free else channel.recv()
            buffers[turn].fill_(float("nan"))  # what was there is gone
            buffers[turn][: tensor.numel()].view(tensor.shape).copy_(tensor)
            finish_work()
            channel.send((turn, name, tensor.shape))
        channel.send(None)
        for _ in range(2 - len(free)):
            channel.recv()
    channel.recv()  # memory that another process has opened must stay


def receive(channel, buffers):
    while (message := channel.recv()) is not None:
        turn, name, shape = message
        yield name, buffers[turn][: shape.numel()].view(shape)
        finish_work()
        channel.send(turn)


def update(model, weights):
    params = dict(model.named_parameters())
    with fk.LayerwiseLoader(model, reload="streaming"):
        for name, loaded_weight in weights:
            params[name].data.copy_(loaded_weight)


if __name__ == "__main__":
    with torch.device("meta"):
        model = build()
    fk.load_checkpoint(model, weights_after(100).items(), device=DEVICE)
    pointers = [p.data_ptr() for p in model.parameters()]
    context = mp.get_context("spawn")
    channel, other = context.Pipe()
    process = context.Process(target=train, args=(other,), daemon=True)
    process.start()
    buffers = channel.recv()
    for step in range(STEPS):
        update(model, receive(channel, buffers))
        with torch.device("meta"):
            wanted = build()
        fk.load_checkpoint(wanted, weights_after(step).items(), device=DEVICE)
        for (name, found), p in zip(model.named_parameters(), wanted.parameters(), strict=True):
            assert torch.equal(found.view(torch.uint8), p.view(torch.uint8)), name
        assert pointers == [p.data_ptr() for p in model.parameters()]
        print(f"step {step}: bytes equal to a first load of these weights, no address changed ({DEVICE})")
    del buffers
    channel.send("done")
    process.join()
