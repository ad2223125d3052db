"""Mixture-of-experts weights, loaded expert by expert, become FP8 expert by expert.

What to copy: nothing but the `with` line. The engine's loader below writes `w13` `[E, 2*I, H]` and `w2` `[E, H, I]`
by index and `narrow`, and skips the experts of other ranks; each expert is quantized when its last shard is in, so
high-precision memory is two experts and not a layer.
"""

import torch
from torch import nn

import fp8_kernels as fk

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 8, 96, 136


class Experts(nn.Module):
    def __init__(self, local_experts):
        super().__init__()
        self.local = {expert: i for i, expert in enumerate(local_experts)}
        self.w13 = nn.Parameter(torch.empty(len(self.local), 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16))
        self.w2 = nn.Parameter(torch.empty(len(self.local), HIDDEN, INTERMEDIATE, dtype=torch.bfloat16))

    def load(self, expert, shard, loaded):
        if expert not in self.local:
            return
        i = self.local[expert]
        if shard == "w2":
            self.w2.data[i].copy_(loaded)
        else:
            self.w13.data[i].narrow(0, 0 if shard == "w1" else INTERMEDIATE, INTERMEDIATE).copy_(loaded)


def checkpoint():
    for expert in range(NUM_EXPERTS):
        for shard, shape in (
            ("w1", (INTERMEDIATE, HIDDEN)),
            ("w2", (HIDDEN, INTERMEDIATE)),
            ("w3", (INTERMEDIATE, HIDDEN)),
        ):
            yield expert, shard, torch.randn(shape).bfloat16()


if __name__ == "__main__":
    torch.manual_seed(0)
    weights = list(checkpoint())
    for ep_rank, ep_size in ((0, 1), (1, 4)):
        local_experts = range(NUM_EXPERTS * ep_rank // ep_size, NUM_EXPERTS * (ep_rank + 1) // ep_size)
        with torch.device("meta"):
            model = nn.ModuleDict({"experts": Experts(local_experts)})

        with fk.LayerwiseLoader(
            model, scheme="per_tensor", on_unit=lambda unit, q, scale: print(unit, tuple(q.shape))
        ) as loader:
            for expert, shard, loaded in weights:
                model["experts"].load(expert, shard, loaded)

        plain = Experts(local_experts)
        for expert, shard, loaded in weights:
            plain.load(expert, shard, loaded)
        for leaf in ("w13", "w2"):
            q, scale = fk.quantize(getattr(plain, leaf).data.to(loader.device), "per_tensor")
            assert torch.equal(getattr(model["experts"], leaf).view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(getattr(model["experts"], f"{leaf}_scale"), scale)
        assert loader.report.peak_staging_bytes <= 3 * 2 * INTERMEDIATE * HIDDEN * 2
        print(f"rank {ep_rank} of {ep_size}: experts {list(local_experts)} equal, byte for byte\n{loader.report}\n")
