"""Rank 0 trains; rank 1 serves in FP8 and takes new weights out of broadcast buckets, such as SGLang's flattened ones.

What to copy: `receive`, which yields tensors out of one buffer that every bucket is received into, and `update`. The
bucket may be overwritten as soon as the loader asks for the next tensor, so the serving rank needs one bucket beside
its model, and with "transactional" the new codes until the last one has come. Gloo on CPUs, NCCL on two GPUs.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fp8_kernels as fk

HIDDEN, INTERMEDIATE, STEPS = 192, 344, 3
BUCKET_BYTES = 300_000  # any size that holds the largest tensor
BACKEND = "nccl" if torch.cuda.device_count() >= 2 else "gloo"


def build():
    layers = [nn.Linear(HIDDEN, INTERMEDIATE), nn.SiLU(), nn.Linear(INTERMEDIATE, HIDDEN), nn.LayerNorm(HIDDEN)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, HIDDEN)).bfloat16()


def weights_after(step):
    """The trainer's weights; both ranks can make them, so that the serving one can compare."""
    torch.manual_seed(step)
    return build().state_dict()


def send(state, bucket):
    """Pack tensors one behind the other until the bucket is full, tell what is in it, broadcast it, start again."""
    contents, used = [], 0
    for name, tensor in [*state.items(), (None, None)]:
        if name is None or used + tensor.nbytes > bucket.numel():
            dist.broadcast_object_list([contents], src=0)
            dist.broadcast(bucket, src=0)
            contents, used = [], 0
        if name is not None:
            bucket[used:][: tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
            contents.append((name, used, tensor.dtype, tensor.shape))
            used += tensor.nbytes
    dist.broadcast_object_list([None], src=0)


def receive(bucket):
    while True:
        message = [None]
        dist.broadcast_object_list(message, src=0)
        if message[0] is None:
            return
        dist.broadcast(bucket, src=0)
        for name, offset, dtype, shape in message[0]:
            yield name, bucket[offset:][: dtype.itemsize * shape.numel()].view(dtype).view(shape)


def update(model, weights, mode="transactional"):
    params = dict(model.named_parameters())
    with fk.LayerwiseLoader(model, reload=mode):
        for name, loaded_weight in weights:
            params[name].data.copy_(loaded_weight)


def run(rank, folder):
    device = f"cuda:{rank}" if BACKEND == "nccl" else "cpu"
    if BACKEND == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(BACKEND, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    bucket = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device)
    (train if rank == 0 else serve)(bucket)
    dist.destroy_process_group()


def train(bucket):
    for step in range(STEPS):
        send(weights_after(step), bucket)


def serve(bucket):
    model = load(weights_after(100), bucket.device)
    for step in range(STEPS):
        update(model, receive(bucket), mode=("transactional", "streaming")[step % 2])
        wanted = load(weights_after(step), bucket.device)
        for (name, found), p in zip(model.named_parameters(), wanted.parameters(), strict=True):
            assert torch.equal(found.view(torch.uint8), p.view(torch.uint8)), name
        print(f"step {step}: bytes equal to a first load of these weights ({BACKEND}, {bucket.device})")


def load(state, device):
    with torch.device("meta"):
        model = build()
    fk.load_checkpoint(model, state.items(), device=device)
    return model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(folder,), nprocs=2)
