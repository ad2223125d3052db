"""quantize, amax, dequantize: checks, allocation, backend choice, schemas and fakes.

The registered ops (`torch.ops.fp8_kernels.*`) see one canonical form: weights `[E, N, K]`, groups of
`block_n x block_k`, every output an argument that they write. So they have nothing to allocate and their
fakes have nothing to say. The functions here check, allocate, bring the tensors into that form and call.

Which backend serves a call is decided by the tensor: a CUDA tensor goes to the CUDA extension where it was
built, else to Triton, any other to plain PyTorch (`reference`). `backend=` overrides per call. The environment
variable `FP8_KERNELS_BACKEND` (a name of `BACKENDS`), read at import, overrides for CUDA tensors.
"""

from __future__ import annotations

import os

import torch

from . import _ext, reference, torch_kernels
from .schemes import Scheme, as_scheme, dtype_name

BACKENDS = ("cuda", "triton", "reference")
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = tuple(reference.FP8_MAX)

_library = torch.library.Library("fp8_kernels", "DEF")
for _schema in (
    "quantize_out(Tensor w, Tensor? amax, Tensor(a!) q, Tensor(b!) scale, int block_n, int block_k, bool pow2) -> ()",
    "amax_out(Tensor w, Tensor(a!) amax, int block_n, int block_k, bool accumulate) -> ()",
    "dequantize_out(Tensor q, Tensor scale, Tensor(a!) w, int block_n, int block_k) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_OPS = ("quantize_out", "amax_out", "dequantize_out")
# The registered ops take e8m0 scales as bytes: torch.compile's passes leave out every node that touches the dtype,
# the one included that must replace a mutating op.
_BYTES = {torch.float8_e8m0fnu: torch.uint8}


def quantize(
    w: torch.Tensor,
    scheme: str | Scheme = "per_channel",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    amax: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast a weight to FP8 with scales found from its own values.

    Args:
        w: bf16, fp16 or fp32 `[..., N, K]`; leading dimensions are a batch (`[E, N, K]`: one scale set an
            expert). Any strides and alignment; fast where K is contiguous.
        scheme: a scheme or its name, see `schemes.SCHEMES`.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        out: `(q, scale)` to write into, of any strides: `q` of the shape of `w`, in an FP8 dtype, which
            then wins over `dtype`; `scale` of `scheme.scale_shape(w.shape)` and `scheme.scale_dtype`.
        amax: fp32, the shape of the scales: use these instead of finding them, so only the cast remains.
        backend: one of `BACKENDS`; by default the tensor's device decides.

    Returns:
        `(q, scale)` on the device of `w`, with `w ~ q * scale`; `out` itself where it was given.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; nothing has been written.
        RuntimeError: `backend` is not available for this tensor.
    """
    scheme = as_scheme(scheme)
    _check_weight("w", w)
    shape = scheme.scale_shape(w.shape)
    if out is None:
        _check_dtype("dtype", dtype, FP8_DTYPES)
        q = torch.empty(w.shape, dtype=dtype, device=w.device)
        scale = torch.empty(shape, dtype=_BYTES.get(scheme.scale_dtype, scheme.scale_dtype), device=w.device)
    else:
        q, scale = out
        _check_tensor("out[0]", q, w.shape, FP8_DTYPES, w.device)
        _check_tensor("out[1]", scale, shape, (scheme.scale_dtype,), w.device)
    if amax is not None:
        _check_tensor("amax", amax, shape, (torch.float32,), w.device)
    op = _op("quantize_out", backend, w)
    for w_, amax_, q_, scale_ in _units(w, _as_grid(amax, w), q, _as_grid(scale, w)):
        op(w_, amax_, q_, scale_, *scheme.block, scheme.pow2)
    return q, (scale if scale.dtype == scheme.scale_dtype else scale.view(scheme.scale_dtype))


def amax(
    w: torch.Tensor,
    scheme: str | Scheme = "per_tensor",
    *,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """`max |w|` of each group; NaN where a group holds a NaN, else Inf where it holds an Inf.

    Args:
        w: as for `quantize`.
        scheme: a scheme or its name.
        out: fp32, `scheme.scale_shape(w.shape)`, to write into.
        accumulate: take the maximum with what `out` holds (values >= 0 or NaN) instead of overwriting it,
            so that a unit's amax can grow as its shards arrive.
        backend: as for `quantize`.

    Returns:
        fp32, `scheme.scale_shape(w.shape)`; `out` itself where it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as for `quantize`; also `accumulate` without `out`.
    """
    scheme = as_scheme(scheme)
    _check_weight("w", w)
    shape = scheme.scale_shape(w.shape)
    if out is None:
        if accumulate:
            raise ValueError("`accumulate=True` must come with `out`, which holds the maximum so far")
        out = torch.empty(shape, dtype=torch.float32, device=w.device)
    _check_tensor("out", out, shape, (torch.float32,), w.device)
    op = _op("amax_out", backend, w)
    for w_, out_ in _units(w, _as_grid(out, w)):
        op(w_, out_, *scheme.block, accumulate)
    return out


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    scheme: str | Scheme | None = None,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`q * scale` in fp32, rounded once to `dtype`.

    Args:
        q: FP8 `[..., N, K]`.
        scale: as `quantize` returned it.
        dtype: of the result: bf16, fp16 or fp32.
        scheme: what one scale covers. Without it the shapes must tell: per_tensor and per_channel always
            do; blocks and groups only where `N` and `K` are multiples of the scales' extents.
        out: `[..., N, K]` to write into; its dtype then wins over `dtype`.
        backend: as for `quantize`.

    Returns:
        `[..., N, K]`; `out` itself where it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as for `quantize`; also where the scheme cannot be told.
    """
    _check_tensor("q", q, None, FP8_DTYPES, None)
    if scheme is None:
        block = block_of(q, scale)
    else:
        scheme = as_scheme(scheme)
        block = scheme.block
        _check_tensor("scale", scale, scheme.scale_shape(q.shape), None, q.device)
    if out is None:
        _check_dtype("dtype", dtype, WEIGHT_DTYPES)
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _check_tensor("out", out, q.shape, WEIGHT_DTYPES, q.device)
    op = _op("dequantize_out", backend, q)
    for q_, scale_, out_ in _units(q, _as_grid(scale, q), out):
        op(q_, scale_, out_, *block)
    return out


def block_of(q, scale):
    """The rectangle that one scale covers, told from the shapes alone."""
    if scale.shape == q.shape[:-2]:
        return -1, -1
    if scale.ndim == q.ndim and scale.shape[:-2] == q.shape[:-2]:
        (num_rows, num_cols), (grid_n, grid_k) = q.shape[-2:], scale.shape[-2:]
        if grid_k == 1 and grid_n == num_rows:
            return 1, -1
        if grid_n and grid_k and num_rows % grid_n == 0 and num_cols % grid_k == 0:
            return max(num_rows // grid_n, 1), max(num_cols // grid_k, 1)
    raise ValueError(
        f"`scheme` must be given: scales of shape {tuple(scale.shape)} do not say what they cover "
        f"of a weight of shape {tuple(q.shape)}"
    )


# Canonical form.


def _as_grid(scale, w):
    """Scales as `[..., SN, SK]`: one scale a weight becomes a grid of one; e8m0 as bytes, see `_BYTES`."""
    if scale is None:
        return None
    if scale.dtype in _BYTES:
        scale = scale.view(_BYTES[scale.dtype])
    return scale[..., None, None] if scale.ndim == w.ndim - 2 else scale


def _units(first, *rest):
    """The same tensors as `[E, A, B]`, without copying; more than three dimensions in several steps."""
    if first.ndim == 2:
        yield tuple(t if t is None else t.unsqueeze(0) for t in (first, *rest))
    elif first.ndim == 3:
        yield (first, *rest)
    else:
        for i in range(first.shape[0]):
            yield from _units(*(t if t is None else t[i] for t in (first, *rest)))


# Checks.


def _check_weight(name, w):
    _check_tensor(name, w, None, WEIGHT_DTYPES, None)
    if w.ndim < 2:
        raise ValueError(f"`{name}` must have at least two dimensions [..., N, K], got shape {tuple(w.shape)}")


def _check_tensor(name, t, shape, dtypes, device):
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(t).__name__}")
    if dtypes is not None:
        _check_dtype(name, t.dtype, dtypes)
    if shape is not None and tuple(t.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if device is not None and t.device != device:
        raise ValueError(f"`{name}` must be on {device}, got {t.device}")


def _check_dtype(name, dtype, allowed):
    if dtype not in allowed:
        names = ", ".join(dtype_name(d) for d in allowed)
        raise TypeError(f"`{name}` must be one of {names}, got {dtype_name(dtype)}")


# Backends.


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """The backends that serve tensors of that device, the default one first."""
    if torch.device(device).type != "cuda":
        return ("reference",)
    return tuple(sorted(_CUDA_BACKENDS, key=lambda backend: backend != _CUDA_DEFAULT))


def _op(name, backend, w):
    """The callable that serves this call."""
    if backend is None:
        return getattr(torch.ops.fp8_kernels, name)
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS}, got {backend!r}")
    if backend not in available_backends(w.device):
        hint = " (the extension was not built, or not loaded)" if backend == "cuda" and w.is_cuda else ""
        raise RuntimeError(f"backend {backend!r} does not serve tensors on {w.device}{hint}")
    if backend == "cuda":
        return getattr(torch.ops.fp8_kernels, name)
    return getattr(_python_kernels(backend), name)


def _python_kernels(backend):
    """The module of a Python backend; Triton is imported on first use, since it need not be installed."""
    if backend == "reference":
        return torch_kernels
    from . import triton_kernels

    return triton_kernels


def _register():
    """Give every op its fake, its CPU kernel and its CUDA kernel; return (CUDA backends, the default one)."""
    wanted = os.environ.get("FP8_KERNELS_BACKEND")
    if wanted not in (None, "", *BACKENDS):
        raise ValueError(f"FP8_KERNELS_BACKEND must be one of {BACKENDS}, got {wanted!r}")
    # The library registers itself for CUDA tensors, so it is loaded only where it is to serve them.
    loaded = wanted in (None, "", "cuda") and _ext.load()
    if wanted == "cuda" and not loaded:
        raise RuntimeError("FP8_KERNELS_BACKEND=cuda, but the CUDA extension was not built for this torch")
    default = wanted or ("cuda" if loaded else "triton")
    for op in _OPS:
        torch.library.register_fake(f"fp8_kernels::{op}", lambda *args: None, lib=_library)
        _library.impl(op, getattr(torch_kernels, op), "CPU")
        if default != "cuda":
            _library.impl(op, _deferred(default, op), "CUDA")
    return tuple(b for b in BACKENDS if b != "cuda" or loaded), default


def _deferred(backend, op):
    return lambda *args: getattr(_python_kernels(backend), op)(*args)


_CUDA_BACKENDS, _CUDA_DEFAULT = _register()
