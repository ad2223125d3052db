"""What one scale covers.

A *group* is the set of weight elements that share a scale. Every scheme here makes it a rectangle of the
`[N, K]` weight, `block_n` rows by `block_k` columns, with `WHOLE` standing for the full extent of a
dimension. Kernels know only that rectangle, so a new scheme is a new class here and nothing else. Segments of rows
that have a scale each (`PerTensor(segments=...)`) are weights of their own to them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

WHOLE = -1

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
NUMERICS = ("exact", "vllm")  # the registered ops take the index


@dataclass(frozen=True, kw_only=True, repr=False)
class Scheme:
    """Common part of all schemes.

    Args:
        pow2: round each scale up to a power of two.
        scale_dtype: how scales are stored, and what the weight is divided by: float32; bfloat16 (rounded
            first, then used); float8_e8m0fnu (needs `pow2`).
        numerics: "exact"; or "vllm" for the bits of vLLM's online quantization, see docs/numerics.md (needs plain
            fp32 scales).
    """

    pow2: bool = False
    scale_dtype: torch.dtype = torch.float32
    numerics: str = "exact"

    def __post_init__(self):
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"`scale_dtype` must be one of {SCALE_DTYPES}, got {self.scale_dtype}")
        if self.scale_dtype == torch.float8_e8m0fnu and not self.pow2:
            raise ValueError("`scale_dtype=torch.float8_e8m0fnu` holds powers of two only: set `pow2=True`")
        if self.numerics not in NUMERICS:
            raise ValueError(f"`numerics` must be one of {NUMERICS}, got {self.numerics!r}")
        if self.numerics == "vllm" and (self.pow2 or self.scale_dtype != torch.float32):
            raise ValueError("`numerics='vllm'` must come with fp32 scales and `pow2=False`, as vLLM has them")
        for extent in self.block:
            if not isinstance(extent, int) or (extent < 1 and extent != WHOLE):
                raise ValueError(f"{type(self).__name__} sizes must be positive ints, got {extent!r}")
        # The last arguments of the registered quantize ops; an attribute, since a property is computed in every call.
        object.__setattr__(self, "quantize_args", (*self.block, self.pow2, NUMERICS.index(self.numerics)))

    segments = ()

    def __repr__(self):
        """As it is made: the arguments that differ from the default."""
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a scale; `WHOLE` is the full extent."""
        raise NotImplementedError

    def scale_shape(self, shape) -> tuple[int, ...]:
        """Shape of the scales of a weight of shape `[..., N, K]`: no grid where one scale covers all of it."""
        block_n, block_k = self.block
        if block_n == block_k == WHOLE:
            return tuple(shape[:-2])
        return (*shape[:-2], _num_blocks(shape[-2], block_n), _num_blocks(shape[-1], block_k))


@dataclass(frozen=True, repr=False)
class PerTensor(Scheme):
    """One scale a weight, or one an expert: scale `[...]` for `[..., N, K]`.

    Args:
        segments: of a fused weight (q, k and v; gate and up), the rows of each part, from the top, `N` in all: each
            part has a scale of its own, scale `[..., len(segments)]`.
    """

    segments: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "segments", tuple(self.segments))
        if any(not isinstance(rows, int) or rows < 0 for rows in self.segments):
            raise ValueError(f"`segments` must be numbers of rows, got {self.segments}")

    @property
    def block(self):
        return WHOLE, WHOLE

    @property
    def edges(self) -> tuple[int, ...]:
        """The rows at which segments begin and end."""
        return (0, *accumulate(self.segments))

    def part(self, first: int, last: int) -> PerTensor:
        """The scheme of the segments [first, last) alone."""
        return replace(self, segments=self.segments[first:last])

    def of_segment(self) -> PerTensor:
        """The scheme of one segment as a weight of its own."""
        return replace(self, segments=())

    def scale_shape(self, shape):
        if not self.segments:
            return super().scale_shape(shape)
        if sum(self.segments) != shape[-2]:
            raise ValueError(f"`segments` must be {shape[-2]} rows in all, got {self.segments}")
        return (*shape[:-2], len(self.segments))


@dataclass(frozen=True, repr=False)
class PerChannel(Scheme):
    """One scale an output row: scale `[..., N, 1]`."""

    @property
    def block(self):
        return 1, WHOLE


@dataclass(frozen=True, repr=False)
class PerBlock(Scheme):
    """One scale a `block_n x block_k` tile: scale `[..., ceil(N/block_n), ceil(K/block_k)]`.

    Tiles at the right and lower edge may be partial.
    """

    block_n: int = 128
    block_k: int = 128

    @property
    def block(self):
        return self.block_n, self.block_k


@dataclass(frozen=True, repr=False)
class PerGroup(Scheme):
    """One scale for `group_size` neighbours in a row: scale `[..., N, ceil(K/group_size)]`."""

    group_size: int = 128

    @property
    def block(self):
        return 1, self.group_size


def mxfp8() -> PerGroup:
    """The OCP MX format: groups of 32 with e8m0 scales."""
    return PerGroup(32, pow2=True, scale_dtype=torch.float8_e8m0fnu)


SCHEMES = {
    "per_tensor": PerTensor(),
    "per_channel": PerChannel(),
    "per_block": PerBlock(128, 128),
    "per_group": PerGroup(128),
    "mxfp8": mxfp8(),
    # vLLM's names
    "fp8_per_tensor": PerTensor(),
    "fp8_per_channel": PerChannel(),
    "fp8_per_block": PerBlock(128, 128),
    # llm-compressor's names
    "FP8_DYNAMIC": PerChannel(),
    "FP8_BLOCK": PerBlock(128, 128),
}


def as_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of that name, or the scheme itself.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: neither a name nor a scheme.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"`scheme` must be a name or a Scheme, got {type(scheme).__name__}")
    if scheme not in SCHEMES:
        raise ValueError(f"`scheme` must be one of {sorted(SCHEMES)} or a Scheme, got {scheme!r}")
    return SCHEMES[scheme]


@lru_cache(maxsize=256)
def with_numerics(scheme: str | Scheme, numerics: str) -> Scheme:
    """The scheme with these numerics."""
    return replace(as_scheme(scheme), numerics=numerics)


def scheme_name(scheme: Scheme) -> str:
    """The shortest name users know it by; its repr where it has none."""
    if scheme.segments:
        return f"{scheme_name(scheme.of_segment())} of {' + '.join(map(str, scheme.segments))} rows"
    return next((name for name, known in SCHEMES.items() if known == scheme), repr(scheme))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype for people: without `torch.`."""
    return str(dtype).removeprefix("torch.")


def grid(num_rows: int, num_cols: int, block_n: int, block_k: int) -> tuple[int, int]:
    """How many groups a weight has along its rows and its columns."""
    return _num_blocks(num_rows, block_n), _num_blocks(num_cols, block_k)


def have_same_groups(a: Scheme, b: Scheme, shape) -> bool:
    """Does one scale of either cover the same elements of a weight of that shape? Shapes of scales do not tell."""
    extents = (tuple(n if e == WHOLE else min(e, n) for n, e in zip(shape[-2:], s.block, strict=True)) for s in (a, b))
    return next(extents) == next(extents) and a.segments == b.segments


def by_segment(scheme: PerTensor, *tensors: torch.Tensor | None):
    """For each segment, the rows of it of weights `[..., N, K]`, and its element of scales `[..., len(segments)]`.

    Args:
        tensors: weights, of N rows, and scales, which are told by having a dimension less; None stays None.
    """
    num_dims = max(t.ndim for t in tensors if t is not None)
    for i, (start, end) in enumerate(pairwise(scheme.edges)):
        yield [t if t is None else t[..., start:end, :] if t.ndim == num_dims else t[..., i] for t in tensors]


def _num_blocks(size, block):
    return 1 if block == WHOLE else -(-size // block)
