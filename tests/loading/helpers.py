"""Small models on meta, and the one statement that most loader tests end in."""

import torch
from torch import nn

import fp8_kernels as fk
from fp8_kernels.loading import LayerwiseLoader

SCHEMES = ("per_tensor", "per_channel", "per_block", "per_group", "mxfp8")


class Model(nn.Module):
    """Tensors by name: `weight_a=(N, K)` becomes the module `weight_a` with a `weight` of that shape."""

    def __init__(self, dtype=torch.bfloat16, device="meta", **shapes):
        super().__init__()
        for name, shape in shapes.items():
            child = nn.Module()
            child.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            self.add_module(name, child)


def values(*shape, dtype=torch.bfloat16):
    """Random weights, rows of very different size, so that each scheme's scales differ."""
    return (torch.randn(shape) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)


def assert_quantized(model, name, w, scheme="per_channel", dtype=torch.float8_e4m3fn):
    """The parameter holds the codes and scales of `w`, to the bit, and is an ordinary frozen parameter."""
    module, _, leaf = name.rpartition(".")
    module = model.get_submodule(module)
    q, scale = fk.quantize(w, scheme, dtype=dtype)
    held, held_scale = getattr(module, leaf), getattr(module, f"{leaf}_scale")
    assert held.dtype == dtype and held.shape == w.shape and isinstance(held, nn.Parameter)
    assert not held.requires_grad and not held_scale.requires_grad
    assert torch.equal(held.view(torch.uint8).cpu(), q.view(torch.uint8).cpu())
    assert held_scale.shape == scale.shape and held_scale.dtype == scale.dtype
    assert torch.equal(held_scale.reshape(-1).view(torch.uint8).cpu(), scale.reshape(-1).view(torch.uint8).cpu())


def load(model, function, scheme="per_channel", **options):
    """Run `function(params)` in the loader; `params` is the engine's `dict(model.named_parameters())`."""
    params = dict(model.named_parameters())
    with LayerwiseLoader(model, scheme, device="cpu", **options) as loader:
        function(params)
    return loader
