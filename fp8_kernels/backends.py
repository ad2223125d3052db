"""The registered ops, `torch.ops.fp8_kernels.*`: schemas, fakes, and which backend serves a call.

An op takes weights `[N, K]` or `[E, N, K]` with scales as `Scheme.scale_shape` has them, groups of
`block_n x block_k`, and every output as an argument that it writes. So it has nothing to allocate, and its fake has
nothing to say. The kernels in Python take `[E, N, K]` and grids of scales alone, and get them here.

A CUDA tensor goes to the CUDA extension where it was built, else to Triton; a CPU tensor to the CPU extension where it
was built, else, as any other, to plain PyTorch (`torch_kernels`). The environment variable `FP8_KERNELS_BACKEND`, read
at import, overrides: "cuda" and "triton" for CUDA tensors, "reference" for all.
"""

from __future__ import annotations

import os

import torch

from . import _ext, torch_kernels

BACKENDS = ("cuda", "triton", "cpu", "reference")
SCHEMAS = {
    "quantize_out": "(Tensor w, Tensor? amax, Tensor(a!) q, Tensor(b!) scale, int block_n, int block_k, bool pow2, "
    "int numerics)",
    "amax_out": "(Tensor w, Tensor(a!) amax, int block_n, int block_k, bool accumulate)",
    "quantize_many_out": "(Tensor[] w, Tensor(a!)[] q, Tensor(b!)[] scale, int block_n, int block_k, bool pow2, "
    "int numerics)",
    "copy_amax_out": "(Tensor w, Tensor(a!) out, Tensor(b!) amax, int block_n, int block_k)",
    "dequantize_out": "(Tensor q, Tensor scale, Tensor(a!) w, int block_n, int block_k)",
}


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """The backends that serve tensors of that device, the default one first."""
    return _AVAILABLE.get(torch.device(device).type, ("reference",))


def op(name, backend, device):
    """The callable that serves calls for tensors of that device."""
    if backend is None:
        return OPS[name]
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS}, got {backend!r}")
    if backend not in available_backends(device):
        hint = " (the extension was not built, or not loaded)" if backend == device.type else ""
        raise RuntimeError(f"backend {backend!r} does not serve tensors on {device}{hint}")
    return OPS[name] if backend in ("cuda", "cpu") else _python_op(backend, name)


def _python_op(backend, name):
    """The op as a Python backend has it; Triton is imported on first use, since it need not be installed."""

    def call(*args):
        if backend == "reference":
            kernels = torch_kernels
        else:
            from . import triton_kernels as kernels
        with torch.no_grad():  # as below torch's dispatcher, where the other backends are
            getattr(kernels, name)(*map(_as_units, args))

    return call


def _as_units(t):
    """`[N, K]` as `[1, N, K]`, one scale a unit as a grid of one, in lists too; what is no tensor as it is."""
    if isinstance(t, list):
        return list(map(_as_units, t))
    if not isinstance(t, torch.Tensor):
        return t
    if t.ndim in (0, 2):
        t = t[None]
    return t[:, None, None] if t.ndim == 1 else t


def _register(library):
    """Give every op its fake and its kernels; returns device type -> the backends that serve it, the default first."""
    wanted = os.environ.get("FP8_KERNELS_BACKEND") or None
    if wanted not in (None, "cuda", "triton", "reference"):
        raise ValueError(f"FP8_KERNELS_BACKEND must be cuda, triton or reference, got {wanted!r}")
    # The libraries register themselves, so one is loaded only where it is to serve.
    cuda = wanted in (None, "cuda") and _ext.load("cuda")
    cpu = wanted != "reference" and _ext.load("cpu")
    if wanted == "cuda" and not cuda:
        raise RuntimeError("FP8_KERNELS_BACKEND=cuda, but the CUDA extension was not built for this torch")
    default = wanted or ("cuda" if cuda else "triton")
    for name in SCHEMAS:
        torch.library.register_fake(f"fp8_kernels::{name}", lambda *args: None, lib=library)
        if not cpu:
            library.impl(name, _python_op("reference", name), "CPU")
        if default != "cuda":
            library.impl(name, _python_op(default, name), "CUDA")
    others = [
        backend for backend in ("cuda", "triton", "reference") if backend != default and (backend != "cuda" or cuda)
    ]
    return {"cuda": (default, *others), "cpu": ("cpu", "reference") if cpu else ("reference",)}


_library = torch.library.Library("fp8_kernels", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(f"{_name}{_schema} -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_AVAILABLE = _register(_library)
CUDA_DEFAULT = _AVAILABLE["cuda"][0]
# Overloads, not packets, which look for the overload in every call.
OPS = {name: getattr(torch.ops.fp8_kernels, name).default for name in SCHEMAS}
