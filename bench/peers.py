"""Other libraries' FP8 quantizers, each brought into one form for `bench.kernels`.

A peer is `bind(w) -> run`: `bind` allocates what the library's interface lets its caller allocate, `run()` does the
work on the current stream and returns `(q, scale)`, or a list of such pairs, one an expert. So no peer pays for an
allocation that it could have been spared. A weight is bf16 `[N, K]` or `[E, N, K]`.

Peers that know no experts get the form that serves them best: one call over all experts' rows where scales stay
within a row or a block, and a loop over the experts where each needs its own amax, which is what vLLM's online
quantization does. vLLM's own online code for per_channel and per_block is made of torch operations; `torch` and
`torch.compile` stand for it.

Libraries are found where they are installed, or by file name in a folder (see `load`). One that is absent is left
out, with a reason.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import torch

F8 = torch.float8_e4m3fn
FP8_MAX = 448.0
COMPILED = "torch.compile"  # compiling takes seconds a case: measured after all the others


class Absent(Exception):
    """The library is not here; the message says what was looked for."""


def load(folder: str | Path | None = None) -> tuple[dict, dict]:
    """Every peer that this machine has.

    Args:
        folder: shared libraries by name, for libraries that are not installed: `vllm*.so`, `fbgemm*.so`, `te*.so`.

    Returns:
        `(peers, absent)`: `{case: {name: bind}}`, and `{library: reason}` for those left out.
    """
    peers, absent = {}, {}
    sources = {
        "torch": lambda: _torch("torch", lambda f: f),
        COMPILED: lambda: _torch(COMPILED, lambda f: torch.compile(f, dynamic=True)),
        "vLLM": lambda: _vllm(folder),
        "TransformerEngine": lambda: _transformer_engine(folder),
        "FBGEMM": lambda: _fbgemm(folder),
        "FBGEMM Triton": _fbgemm_triton,
        "SGLang": _sglang,
        "torchao": _torchao,
        "transformers": _transformers,
    }
    for library, source in sources.items():
        try:
            found = source()
        except Absent as reason:
            absent[library] = str(reason)
        except Exception as error:  # a library that does not load must not stop the others
            absent[library] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        else:
            for case, by_name in found.items():
                peers.setdefault(case, {}).update(by_name)
    return peers, absent


# Experts.


def _as_rows(bind):
    """All experts' rows as one weight."""
    return lambda w: bind(w.flatten(0, -2))


def _each_expert(bind):
    """One call an expert."""

    def bind_all(w):
        if w.ndim == 2:
            return bind(w)
        runs = [bind(expert) for expert in w]
        return lambda: [run() for run in runs]

    return bind_all


def _outputs(w, *scale_shape):
    return torch.empty_like(w, dtype=F8), torch.empty(scale_shape, device=w.device)


# Plain torch: the formula as one would write it.


def _grouped(w, block_n, block_k):
    """`[..., N, K]` as `[..., N / block_n, block_n, K / block_k, block_k]`."""
    return w.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_n))


def plain_amax(w):
    return w.abs().amax((-2, -1)).float()


def plain_cast(w, amax):
    scale = amax / FP8_MAX
    return (w.float() / scale[..., None, None]).clamp(-FP8_MAX, FP8_MAX).to(F8), scale


def plain_per_tensor(w):
    return plain_cast(w, plain_amax(w))


def plain_blocks(w, block_n, block_k):
    groups = _grouped(w, block_n, block_k)
    scale = groups.abs().amax((-3, -1), keepdim=True).float() / FP8_MAX
    q = (groups.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(F8)
    return q.view(w.shape), scale.squeeze(-1).squeeze(-2)


def plain_dequantize(q, scale):
    return (q.float() * scale).bfloat16()


def _torch(name, wrap):
    """`wrap`: as it is, or compiled, with dynamic sizes since a model has many shapes."""
    per_tensor, amax, cast, dequantize = map(wrap, (plain_per_tensor, plain_amax, plain_cast, plain_dequantize))
    channels, blocks, groups = (wrap(_blocks_of(*size)) for size in ((1, None), (128, 128), (1, 128)))

    def bind_cast(w):
        found = plain_amax(w)
        return lambda: cast(w, found)

    def bind_copy(w):
        staged, slot = torch.empty_like(w), torch.zeros(w.shape[:-2], device=w.device)

        def run():
            staged.copy_(w)
            torch.maximum(slot, amax(w), out=slot)
            return staged

        return run

    def bind_dequantize(w):
        q, scale = plain_blocks(w, 1, w.shape[-1])
        return lambda: dequantize(q, scale)

    return {
        "per_tensor": {name: lambda w: lambda: per_tensor(w)},
        "per_channel": {name: _as_rows(lambda w: lambda: channels(w))},
        "per_block": {name: _as_rows(lambda w: lambda: blocks(w))},
        "per_group": {name: _as_rows(lambda w: lambda: groups(w))},
        "cast": {name: bind_cast},
        "amax": {name: lambda w: lambda: amax(w)},
        "copy_amax": {name: bind_copy},
        "dequantize": {name: _as_rows(bind_dequantize)},
    }


def _blocks_of(block_n, block_k):
    return lambda w: plain_blocks(w, block_n, block_k or w.shape[-1])


# Libraries of compiled operators.


def _library(folder, stem, package, *patterns):
    """The shared library of that name in the folder, else in the installed package."""
    if folder is not None and (found := sorted(Path(folder).glob(f"{stem}*.so"))):
        return found[0]
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in patterns:
            if found := sorted(Path(root).glob(pattern)):
                return found[0]
    raise Absent(f"{package} is not installed" + ("" if folder is None else f", and {folder} has no {stem}*.so"))


def vllm_ops(folder=None):
    """vLLM's compiled ops, from the folder or the installed package.

    Raises:
        Absent: in neither.
    """
    torch.ops.load_library(_library(folder, "vllm", "vllm", "_C_stable_libtorch*.so", "_C.*.so"))
    return torch.ops._C


def _vllm(folder):
    ops = vllm_ops(folder)

    def static(w, scale):
        q = torch.empty_like(w, dtype=F8)

        def run():
            ops.static_scaled_fp8_quant(q, w, scale, None)
            return q, scale

        return run

    def bind_static(w):
        return static(w, (plain_amax(w) / FP8_MAX).reshape(1))

    def bind_online(w):
        """What its online quantization runs: amax by torch, then the static kernel."""
        q, fp8_max = torch.empty_like(w, dtype=F8), torch.tensor(FP8_MAX, device=w.device)

        def run():
            low, high = w.aminmax()
            scale = (torch.maximum(low.abs(), high.abs()).float() / fp8_max).reshape(1)
            ops.static_scaled_fp8_quant(q, w, scale, None)
            return q, scale

        return run

    def bind_dynamic(w):
        q, scale = _outputs(w, 1)

        def run():
            ops.dynamic_scaled_fp8_quant(q, w, scale)
            return q, scale

        return run

    def bind_token(w):
        q, scale = _outputs(w, w.shape[0], 1)

        def run():
            ops.dynamic_per_token_scaled_fp8_quant(q, w, scale, None)
            return q, scale

        return run

    def bind_group(w):
        q, scale = _outputs(w, w.shape[0], w.shape[1] // 128)

        def run():
            ops.per_token_group_fp8_quant(w, q, scale, 128, 1e-10, -FP8_MAX, FP8_MAX, False, False, False)
            return q, scale

        return run

    return {
        "per_tensor": {"vLLM online": _each_expert(bind_online), "vLLM dynamic": _each_expert(bind_dynamic)},
        "per_channel": {"vLLM per token": _as_rows(bind_token)},
        "per_group": {"vLLM group": _as_rows(bind_group)},
        "cast": {"vLLM static": _each_expert(bind_static)},
    }


def _fbgemm(folder):
    pattern = "experimental/gen_ai/*gen_ai*.so"
    torch.ops.load_library(_library(folder, "fbgemm", "fbgemm_gpu", pattern))
    ops = torch.ops.fbgemm
    return {
        "per_tensor": {"FBGEMM": _each_expert(lambda w: lambda: tuple(ops.quantize_fp8_per_tensor(w)))},
        "per_channel": {"FBGEMM": _as_rows(lambda w: lambda: tuple(ops.quantize_fp8_per_row(w)))},
    }


class _Shape(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_size_t * 15), ("ndim", ctypes.c_size_t)]


class _Buffer(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("dtype", ctypes.c_int), ("shape", _Shape)]


def _transformer_engine(folder):
    """Through its C interface, which needs none of its Python."""
    path = _library(folder, "te", "transformer_engine", "../libtransformer_engine.so", "**/libtransformer_engine.so")
    site = Path(torch.__file__).parents[1] / "nvidia"
    for pattern in ("cudnn/lib/libcudnn*.so.9", "cu1*/lib/libcublas*.so.1?", "nccl/lib/libnccl.so.2"):
        for needed in sorted(site.glob(pattern)):
            ctypes.CDLL(str(needed), mode=ctypes.RTLD_GLOBAL)
    lib = ctypes.CDLL(str(path), mode=os.RTLD_LAZY | ctypes.RTLD_GLOBAL)  # not every symbol of its GEMMs need be there
    lib.nvte_create_tensor.restype = lib.nvte_create_quantization_config.restype = ctypes.c_void_p
    config = ctypes.c_void_p(lib.nvte_create_quantization_config())
    # From its headers: data types, scaling modes and the parts of a tensor.
    dtypes = {torch.float32: 4, torch.float16: 5, torch.bfloat16: 6, F8: 7}
    per_tensor_mode, block_2d_mode = 0, 3
    data, scale, amax, scale_inv = 0, 2, 3, 4

    class Tensor:
        """Its view of some tensors, which it keeps alive; freed with this object."""

        def __init__(self, mode, parts):
            self.parts = parts
            self.handle = ctypes.c_void_p(lib.nvte_create_tensor(mode))
            for part, t in parts.items():
                buffer = _Buffer(t.data_ptr(), dtypes[t.dtype], _Shape(ndim=t.ndim))
                buffer.shape.sizes[: t.ndim] = t.shape
                lib.nvte_set_tensor_param(ctypes.byref(self.handle), part, ctypes.byref(buffer))

        def __del__(self):
            lib.nvte_destroy_tensor(self.handle)

    def stream():
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def bind_per_tensor(w):
        q = torch.empty_like(w, dtype=F8)
        found, factor, inverse = (torch.empty(1, device=w.device) for _ in range(3))
        source = Tensor(per_tensor_mode, {data: w})
        measured = Tensor(per_tensor_mode, {data: q, scale: factor, amax: found, scale_inv: inverse})
        target = Tensor(per_tensor_mode, {data: q, scale: factor, scale_inv: inverse})

        def run():
            lib.nvte_compute_amax(source.handle, measured.handle, stream())
            lib.nvte_compute_scale_from_amax(measured.handle, config, stream())
            lib.nvte_quantize_v2(source.handle, target.handle, config, stream())
            return q, inverse

        return run

    def bind_amax(w):
        found, factor, inverse = (torch.empty(1, device=w.device) for _ in range(3))
        source = Tensor(per_tensor_mode, {data: w})
        q = torch.empty_like(w, dtype=F8)
        measured = Tensor(per_tensor_mode, {data: q, scale: factor, amax: found, scale_inv: inverse})

        def run():
            lib.nvte_compute_amax(source.handle, measured.handle, stream())
            return found

        return run

    def bind_block(w):
        num_rows, num_cols = (-(-size // 128) for size in w.shape)
        q, inverse = _outputs(w, num_rows, -(-num_cols // 4) * 4)
        source, target = Tensor(per_tensor_mode, {data: w}), Tensor(block_2d_mode, {data: q, scale_inv: inverse})

        def run():
            lib.nvte_quantize_v2(source.handle, target.handle, config, stream())
            return q, inverse[:, :num_cols]

        return run

    return {
        "per_tensor": {"TransformerEngine": _each_expert(bind_per_tensor)},
        "per_block": {"TransformerEngine": _as_rows(bind_block)},
        "amax": {"TransformerEngine": _each_expert(bind_amax)},
    }


# Libraries of Python.


def _import(name):
    """The module; a package that is not there at all is absent, any other failure is reported as what it is."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    importlib.import_module(name)
    return sys.modules[name]


def _refuse_large(w):
    if w.numel() >= 1 << 31:
        raise Absent("an illegal memory access was seen on 256x4096x7168, above 2^31 elements")


def _fbgemm_triton():
    kernels = _import("fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm")

    def bind_blocks(w):
        _refuse_large(w)
        return lambda: kernels.triton_quantize_fp8_block(w, 128, 128)

    return {
        "per_channel": {"FBGEMM Triton": _as_rows(lambda w: lambda: kernels.triton_quantize_fp8_row(w))},
        "per_block": {"FBGEMM Triton": _as_rows(bind_blocks)},
    }


def _sglang():
    kernels = _import("sgl_kernel")

    def bind_per_tensor(w):
        q, scale = _outputs(w, 1)

        def run():
            kernels.sgl_per_tensor_quant_fp8(w, q, scale, False)
            return q, scale

        return run

    def bind_token(w):
        q, scale = _outputs(w, w.shape[0], 1)

        def run():
            kernels.sgl_per_token_quant_fp8(w, q, scale)
            return q, scale

        return run

    return {
        "per_tensor": {"SGLang": _each_expert(bind_per_tensor)},
        "per_channel": {"SGLang per token": _as_rows(bind_token)},
    }


def _torchao():
    blocks = _import("torchao.prototype.blockwise_fp8_training.kernels")
    rows = _import("torchao.prototype.moe_training.kernels.float8_rowwise")

    def bind_row(w):
        def run():
            q, factor = rows.triton_fp8_rowwise_2d_scale_and_cast(w)
            return q, factor.reciprocal()  # it returns what the weight was multiplied by

        return run

    def bind_blocks(w):
        _refuse_large(w)
        return lambda: blocks.triton_fp8_blockwise_weight_quant_rhs(w, 128)

    def bind_groups(w):
        _refuse_large(w)
        return lambda: blocks.triton_fp8_blockwise_act_quant_lhs(w, 128)

    return {
        "per_channel": {"torchao": _as_rows(bind_row)},
        "per_block": {"torchao": _as_rows(bind_blocks)},
        "per_group": {"torchao": _as_rows(bind_groups)},
    }


def _transformers():
    finegrained = _import("transformers.integrations.finegrained_fp8")
    from transformers import FineGrainedFP8Config

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=(128, 128))

    convert = finegrained.Fp8Quantize(Quantizer())

    def bind_block(w):
        def run():
            done = convert.convert({"a.weight": [w]})
            return done["a.weight"], done["a.weight_scale_inv"]

        return run

    return {"per_block": {"transformers": _as_rows(bind_block)}}
