"""An engine's own weight loading, unchanged, inside `LayerwiseLoader`.

What to copy: build the model under `torch.device("meta")`, then the `with` around the call that already loads your
weights, as `load_fp8` does. The rest stands in for an engine: fused `qkv_proj` and `gate_up_proj`, a `weight_loader`
on each parameter, and tensor-parallel slices.
"""

import torch
from torch import nn

import fp8_kernels as fk

HIDDEN, QUERY, KEY, INTERMEDIATE, LAYERS = 192, 192, 64, 344, 2
FUSED = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "gate": "gate_up_proj", "up": "gate_up_proj"}
ROWS = {"q": QUERY, "k": KEY, "v": KEY, "o": HIDDEN, "gate": INTERMEDIATE, "up": INTERMEDIATE, "down": HIDDEN}
COLUMNS = {"o": QUERY, "down": INTERMEDIATE}


class ParallelLinear(nn.Module):
    """Holds 1/tp_size of each of its shards, one under the other (or, with tp_dim=1, of its columns)."""

    def __init__(self, shards, tp_rank, tp_size, tp_dim=0):
        super().__init__()
        self.tp_rank, self.tp_size, self.tp_dim, self.offsets, rows = tp_rank, tp_size, tp_dim, {}, 0
        for shard in shards:
            size = ROWS[shard] // (tp_size if tp_dim == 0 else 1)
            self.offsets[shard], rows = (rows, size), rows + size
        columns = COLUMNS.get(shards[0], HIDDEN) // (tp_size if tp_dim == 1 else 1)
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.bfloat16))
        self.weight.weight_loader = self.weight_loader

    def weight_loader(self, param, loaded_weight, shard_id):
        size = loaded_weight.size(self.tp_dim) // self.tp_size
        loaded_weight = loaded_weight.narrow(self.tp_dim, self.tp_rank * size, size)
        param.data.narrow(0, *self.offsets[shard_id]).copy_(loaded_weight)


def build(*rank):
    model = nn.ModuleList(nn.Module() for _ in range(LAYERS))
    for layer in model:
        layer.qkv_proj = ParallelLinear(["q", "k", "v"], *rank)
        layer.o_proj = ParallelLinear(["o"], *rank, tp_dim=1)
        layer.gate_up_proj = ParallelLinear(["gate", "up"], *rank)
        layer.down_proj = ParallelLinear(["down"], *rank, tp_dim=1)
    return model


def load_weights(model, weights):
    params = dict(model.named_parameters())
    for name, loaded_weight in weights:  # "0.q_proj.weight"
        layer, module, leaf = name.split(".")
        shard = module.removesuffix("_proj")
        param = params[f"{layer}.{FUSED.get(shard, module)}.{leaf}"]
        param.weight_loader(param, loaded_weight, shard)


def load_fp8(weights, scheme, tp_rank, tp_size):
    with torch.device("meta"):
        model = build(tp_rank, tp_size)
    with fk.LayerwiseLoader(model, scheme) as loader:
        load_weights(model, weights)
    return model, loader.report


if __name__ == "__main__":
    torch.manual_seed(0)
    shapes = {f"{i}.{s}_proj.weight": (ROWS[s], COLUMNS.get(s, HIDDEN)) for i in range(LAYERS) for s in ROWS}
    weights = [(name, torch.randn(shape).bfloat16()) for name, shape in shapes.items()]
    for scheme, *rank in (("per_channel", 0, 1), ("per_tensor", 1, 2), ("per_block", 0, 2)):
        model, report = load_fp8(iter(weights), scheme, *rank)
        plain = build(*rank)
        load_weights(plain, weights)
        for name, param in plain.named_parameters():
            q, scale = fk.quantize(param.data.to(report.device), scheme)
            assert torch.equal(model.get_parameter(name).view(torch.uint8), q.view(torch.uint8)), name
            assert torch.equal(model.get_parameter(f"{name}_scale"), scale), name
        print(f"{scheme}, rank {rank}: equal to quantizing after a plain load, byte for byte\n{report}\n")
