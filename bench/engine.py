"""A small engine of its own, after nano-vLLM: fused parameters with `weight_loader`s, filled from safetensors files.

It knows nothing of FP8. `bench.load` runs its loop inside a `LayerwiseLoader`, and as it is for comparison.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from bench.checkpoints import Model
from bench.files import weight_files

PACKED = {  # part of a checkpoint's name -> (part of the parameter's, which shard of it)
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
EXPERTS = {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", None)}


def _parameter(owner, leaf, shape, loader, device):
    p = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=device), requires_grad=False)
    p.weight_loader = loader
    owner.register_parameter(leaf, p)


class Replicated(nn.Module):
    """A weight that is one tensor of the checkpoint."""

    def __init__(self, shape, device):
        super().__init__()
        _parameter(self, "weight", shape, self.weight_loader, device)

    def weight_loader(self, param, loaded_weight):
        param.data.copy_(loaded_weight)


class Merged(nn.Module):
    """Several projections, one below the other."""

    def __init__(self, sizes: dict, cols: int, bias: bool, device):
        super().__init__()
        self.sizes = sizes
        _parameter(self, "weight", (sum(sizes.values()), cols), self.weight_loader, device)
        if bias:
            _parameter(self, "bias", (sum(sizes.values()),), self.weight_loader, device)

    def weight_loader(self, param, loaded_weight, loaded_shard_id):
        shard_offset = 0
        for shard_id, size in self.sizes.items():
            if shard_id == loaded_shard_id:
                break
            shard_offset += size
        param.data.narrow(0, shard_offset, size).copy_(loaded_weight)


class Experts(nn.Module):
    """`w13` `[E, 2*I, H]` and `w2` `[E, H, I]`."""

    def __init__(self, num_experts, inner, hidden, device):
        super().__init__()
        self.inner = inner
        _parameter(self, "w13", (num_experts, 2 * inner, hidden), self.weight_loader, device)
        _parameter(self, "w2", (num_experts, hidden, inner), self.weight_loader, device)

    def weight_loader(self, param, loaded_weight, shard_id, expert):
        expert_data = param.data[expert]
        if shard_id is not None:
            expert_data = expert_data.narrow(0, shard_id * self.inner, self.inner)
        expert_data.copy_(loaded_weight)


def build(model: Model, device: torch.device | str) -> nn.Module:
    """The engine's model of a checkpoint's config, its parameters uninitialised; for no config one weight a tensor."""
    root, config = nn.Module(), model.config
    hidden = config.get("hidden_size")
    for name, shape in model.shapes.items():
        path, leaf = name.rsplit(".", 1)
        if ".experts." in path:
            path = path.partition(".experts.")[0] + ".experts"
            module = lambda: Experts(config["num_experts"], config["moe_intermediate_size"], hidden, device)  # noqa: E731
        elif (part := path.rpartition(".")[2]) in PACKED:
            siblings = {p: s for p, (fused, s) in PACKED.items() if fused == PACKED[part][0]}
            rows = {s: model.shapes[f"{path.removesuffix(part)}{p}.weight"][0] for p, s in siblings.items()}
            path = path.removesuffix(part) + PACKED[part][0]
            bias = f"{name.rsplit('.', 1)[0]}.bias" in model.shapes
            module = lambda rows=rows, bias=bias: Merged(rows, hidden, bias, device)  # noqa: E731
        else:
            module = lambda shape=shape: Replicated(shape, device)  # noqa: E731
        _add(root, path, module)
    return root


def _add(root, path, make):
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    if last not in root._modules:
        root.add_module(last, make())


def load_model(model: nn.Module, folder: Path):
    """Fill the parameters, one tensor of the files after another."""
    for file in weight_files(folder):
        with safe_open(file, "pt", "cpu") as f:
            for weight_name in f.keys():
                path, _, leaf = weight_name.rpartition(".")
                parent, _, part = path.rpartition(".")
                if ".experts." in parent:
                    prefix, _, expert = parent.rpartition(".")
                    name, shard_id = EXPERTS[part]
                    param = model.get_parameter(f"{prefix}.{name}")
                    param.weight_loader(param, f.get_tensor(weight_name), shard_id, int(expert))
                elif part in PACKED:
                    name, shard_id = PACKED[part]
                    param = model.get_parameter(f"{parent}.{name}.{leaf}")
                    param.weight_loader(param, f.get_tensor(weight_name), shard_id)
                else:
                    param = model.get_parameter(weight_name)
                    param.weight_loader(param, f.get_tensor(weight_name))
