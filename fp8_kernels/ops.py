"""The public ops: they check, allocate, and call the registered ones (`backends`).

Which backend serves a call is decided by the tensor, see `backends`; `backend=` overrides per call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backends, reference
from .schemes import SCALE_DTYPES, Scheme, as_scheme, by_segment, dtype_name, with_numerics

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = tuple(reference.FP8_MAX)
VLLM_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)

# The registered ops take e8m0 scales as bytes: torch.compile's passes leave out every node that touches the dtype,
# the one included that must replace a mutating op.
_BYTES = {torch.float8_e8m0fnu: torch.uint8}
_quantize_out = backends.OPS["quantize_out"]
_quantize_many_out = backends.OPS["quantize_many_out"]


def quantize(
    w: torch.Tensor,
    scheme: str | Scheme = "per_channel",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    amax: torch.Tensor | None = None,
    numerics: str | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast a weight to FP8 with scales found from its own values.

    Args:
        w: bf16, fp16 or fp32 `[..., N, K]`; leading dimensions are a batch (`[E, N, K]`: one scale set an
            expert). Any strides and alignment; fast where K is contiguous.
        scheme: a scheme or its name, see `schemes.SCHEMES`.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`; AMD's `torch.float8_e4m3fnuz` and
            `torch.float8_e5m2fnuz`, which the CUDA backend has not.
        out: `(q, scale)` to write into, of any strides: `q` of the shape of `w`, in an FP8 dtype, which
            then wins over `dtype`; `scale` of `scheme.scale_shape(w.shape)` and `scheme.scale_dtype`.
        amax: fp32, the shape of the scales: use these instead of finding them, so only the cast remains.
        numerics: "exact" or "vllm", see docs/numerics.md; by default the scheme's.
        backend: one of `BACKENDS`; by default the tensor's device decides.

    Returns:
        `(q, scale)` on the device of `w`, with `w ~ q * scale`; `out` itself where it was given.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; nothing has been written.
        RuntimeError: `backend` is not available for this tensor.
    """
    scheme = as_scheme(scheme) if numerics is None else with_numerics(scheme, numerics)
    if scheme.segments:
        return _quantize_segments(w, scheme, dtype, out, amax, backend)
    # The CUDA op itself refuses all that the checks refuse, before it writes anything. So a call that it takes is
    # spared them, and one that it refuses gets their words.
    direct = backend is None and _is_direct(w, scheme, out)
    if not direct:
        _check_quantize(w, scheme, dtype, out, amax)
    q, scale = _empty_outputs(w, scheme, dtype) if out is None else out
    if direct:
        try:
            _quantize_out(w, amax, q, scale, *scheme.quantize_args)
        except RuntimeError:
            _check_quantize(w, scheme, dtype, out, amax)
            raise
        return q, scale
    op = backends.op("quantize_out", backend, w.device)
    for w_, amax_, q_, scale_ in _batches(w.ndim - 3, w, amax, q, as_bytes(scale)):
        op(w_, amax_, q_, scale_, *scheme.quantize_args)
    return q, _typed(scale, scheme)


def _quantize_segments(w, scheme, dtype, out, amax, backend):
    """Each segment as a weight of its own; all in one call of the op, unless their maxima are given."""
    _check_quantize(w, scheme, dtype, out, amax)
    if out is None:
        q, scale = _empty_outputs(w, scheme, dtype)
        out = q, _typed(scale, scheme)
    q, scale = out
    parts, one = list(by_segment(scheme, w, q, scale, amax)), scheme.of_segment()
    if amax is None and w.ndim <= 3:
        quantize_many([p[0] for p in parts], one, out=[(p[1], p[2]) for p in parts], backend=backend)
    else:
        for w_, q_, scale_, amax_ in parts:
            quantize(w_, one, out=(q_, scale_), amax=amax_, backend=backend)
    return out


def quantize_into(w: torch.Tensor, scheme: Scheme, q: torch.Tensor, scale: torch.Tensor, amax: torch.Tensor | None):
    """`quantize` with outputs that are known to fit: two or three dimensions, the default backend, no checks."""
    if scheme.segments:
        _quantize_segments(w, scheme, q.dtype, (q, scale), amax, None)
        return
    _quantize_out(w, amax, q, as_bytes(scale), *scheme.quantize_args)


def quantize_many_into(weights: list, scheme: Scheme, q: list, scale: list):
    """`quantize_many` with outputs that are known to fit, as for `quantize_into`; of no segments."""
    _quantize_many_out(weights, q, list(map(as_bytes, scale)), *scheme.quantize_args)


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
    if scheme.segments:
        for w_, out_ in by_segment(scheme, w, out):
            amax(w_, scheme.of_segment(), out=out_, accumulate=accumulate, backend=backend)
        return out
    op = backends.op("amax_out", backend, w.device)
    for w_, out_ in _batches(w.ndim - 3, w, out):
        op(w_, out_, *scheme.block, accumulate)
    return out


def quantize_many(
    weights: Sequence[torch.Tensor],
    scheme: str | Scheme = "per_channel",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    out: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    numerics: str | None = None,
    backend: str | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`quantize` of several weights in one call of the op, for models with many small layers.

    Args:
        weights: bf16, fp16 or fp32, each `[N, K]` or `[E, N, K]` of its own shape and dtype, all on one device.
        scheme, dtype, numerics, backend: as for `quantize`, the same for all.
        out: a `(q, scale)` for each weight, as for `quantize`; no two may overlap.

    Returns:
        A `(q, scale)` for each weight, the bits of `quantize`; `out`'s own where it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as for `quantize`, of any of the weights; nothing has been written.
    """
    scheme = as_scheme(scheme) if numerics is None else with_numerics(scheme, numerics)
    weights = list(weights)
    given = [None] * len(weights) if out is None else list(out)
    if len(given) != len(weights):
        raise ValueError(f"`out` must have the length of `weights`, {len(weights)}, got {len(given)}")
    for i, (w, pair) in enumerate(zip(weights, given, strict=True)):
        _check_quantize(w, scheme, dtype, pair, None, f"weights[{i}]", f"out[{i}]")
        if w.ndim > 3:
            raise ValueError(f"`weights[{i}]` must be [N, K] or [E, N, K], got shape {tuple(w.shape)}")
        if w.device != weights[0].device:
            raise ValueError(f"`weights[{i}]` must be on {weights[0].device}, got {w.device}")
    if scheme.segments:
        return [quantize(w, scheme, dtype=dtype, out=p, backend=backend) for w, p in zip(weights, given, strict=True)]
    if not weights:
        return []
    pairs = [_empty_outputs(w, scheme, dtype) if pair is None else pair for w, pair in zip(weights, given, strict=True)]
    op = backends.op("quantize_many_out", backend, weights[0].device)
    op(weights, [q for q, _ in pairs], [as_bytes(scale) for _, scale in pairs], *scheme.quantize_args)
    return [(q, _typed(scale, scheme)) for q, scale in pairs]


def copy_amax(
    w: torch.Tensor,
    out: torch.Tensor,
    amax: torch.Tensor,
    scheme: str | Scheme = "per_tensor",
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Copy a shard that is already on the device into its place, and raise `amax` to its groups' maxima: one read.

    What `out.copy_(w)` and `amax(w, scheme, out=amax, accumulate=True)` do; then `quantize(out, amax=amax)` is only a
    cast.

    Args:
        w: as for `quantize`.
        out: the shape, dtype and device of `w`, of any strides; must not overlap it.
        amax: fp32, `scheme.scale_shape(w.shape)`: zeros, or what these ops wrote.
        scheme: a scheme or its name.
        backend: as for `quantize`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `quantize`.
    """
    scheme = as_scheme(scheme)
    _check_weight("w", w)
    _check_tensor("out", out, w.shape, (w.dtype,), w.device)
    _check_tensor("amax", amax, scheme.scale_shape(w.shape), (torch.float32,), w.device)
    if scheme.segments:
        for w_, out_, amax_ in by_segment(scheme, w, out, amax):
            copy_amax(w_, out_, amax_, scheme.of_segment(), backend=backend)
        return out
    op = backends.op("copy_amax_out", backend, w.device)
    for w_, out_, amax_ in _batches(w.ndim - 3, w, out, amax):
        op(w_, out_, amax_, *scheme.block)
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
            do; blocks and groups only where `N` and `K` are multiples of the scales' extents; segments never.
        out: `[..., N, K]` to write into; its dtype then wins over `dtype`.
        backend: as for `quantize`.

    Returns:
        `[..., N, K]`; `out` itself where it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as for `quantize`; also where the scheme cannot be told.
    """
    _check_tensor("q", q, None, FP8_DTYPES, None)
    _check_tensor("scale", scale, None, (*SCALE_DTYPES, torch.uint8), q.device)  # e8m0 as bytes too
    if scheme is None:
        block = block_of(q, scale)
    else:
        scheme = as_scheme(scheme)
        block = scheme.block
        _check_tensor("scale", scale, scheme.scale_shape(q.shape), None, None)
    if out is None:
        _check_dtype("dtype", dtype, WEIGHT_DTYPES)
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _check_tensor("out", out, q.shape, WEIGHT_DTYPES, q.device)
    if scheme is not None and scheme.segments:
        for q_, scale_, out_ in by_segment(scheme, q, scale, out):
            dequantize(q_, scale_, scheme=scheme.of_segment(), out=out_, backend=backend)
        return out
    op = backends.op("dequantize_out", backend, q.device)
    for q_, scale_, out_ in _batches(q.ndim - 3, q, as_bytes(scale), out):
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


# What the registered ops take.


def _is_direct(w, scheme, out):
    """The CUDA op takes these as they are. Not where a compiler traces: the op's fake refuses nothing."""
    return (
        backends.CUDA_DEFAULT == "cuda"
        and isinstance(w, torch.Tensor)
        and w.is_cuda
        and w.ndim in (2, 3)
        and scheme.scale_dtype is torch.float32
        and scheme.numerics == "exact"
        and (out is None or (len(out) == 2 and getattr(out[1], "dtype", None) is torch.float32))
        and not torch.compiler.is_compiling()
    )


def _empty_outputs(w, scheme, dtype):
    q = torch.empty_like(w, dtype=dtype, memory_format=torch.contiguous_format)
    scale_dtype = _BYTES.get(scheme.scale_dtype, scheme.scale_dtype)
    return q, torch.empty(scheme.scale_shape(w.shape), dtype=scale_dtype, device=w.device)


def _typed(scale, scheme):
    return scale if scale.dtype == scheme.scale_dtype else scale.view(scheme.scale_dtype)


def as_bytes(scale: torch.Tensor) -> torch.Tensor:
    """Scales as the registered ops take them."""
    return scale.view(_BYTES[scale.dtype]) if scale.dtype in _BYTES else scale


def _batches(levels, *tensors):
    """The same tensors without the first `levels` dimensions, one index after the other."""
    if levels <= 0:
        yield tensors
        return
    for i in range(tensors[0].shape[0]):
        yield from _batches(levels - 1, *(t if t is None else t[i] for t in tensors))


# Checks.


def _check_quantize(w, scheme, dtype, out, amax, name="w", out_name="out"):
    _check_weight(name, w)
    shape = scheme.scale_shape(w.shape)
    if out is None:
        _check_dtype("dtype", dtype, FP8_DTYPES)
    elif not isinstance(out, Sequence) or len(out) != 2:
        raise TypeError(f"`{out_name}` must be a pair of tensors, (q, scale), got {type(out).__name__}")
    else:
        _check_tensor(f"{out_name}[0]", out[0], w.shape, FP8_DTYPES, w.device)
        dtype = out[0].dtype
        _check_tensor(f"{out_name}[1]", out[1], shape, (scheme.scale_dtype,), w.device)
    if amax is not None:
        _check_tensor("amax", amax, shape, (torch.float32,), w.device)
    if scheme.numerics == "vllm" and dtype not in VLLM_DTYPES:
        raise TypeError(f"`dtype` must be one that vLLM quantizes to, float8_e4m3, got {dtype_name(dtype)}")


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
