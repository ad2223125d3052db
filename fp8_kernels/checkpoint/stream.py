"""Quantize a stream of weights on its way into an engine, which believes that it loads an FP8 checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from .. import ops
from ..errors import CheckpointError, NonFiniteWeightError
from ..loading.fp8_source import holds_nan, stored_scheme, usable
from ..loading.report import Report
from ..loading.rules import HIGH_PRECISION, Rules
from ..schemes import PerTensor, Scheme, dtype_name, scheme_name
from .formats import as_format, check_treated_alike, family_of
from .fp8_stream import as_high_precision, paired
from .quantize import config_of, select, select_tensors
from .reader import Checkpoint, open_checkpoint

_LOOK_AT = 1024  # weights: each keeps 512 bytes of the device until then


def quantize_weights(
    weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    scheme: str | Scheme = "per_channel",
    format: str = "compressed-tensors",
    *,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    schemes: Mapping[str, str | Scheme] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    device: torch.device | str | None = None,
    names: Iterable[str] | None = None,
    amax: Mapping[str, torch.Tensor] | None = None,
    partial: bool = False,
    progress: Callable[[int, str], None] | None = None,
) -> QuantizedWeights:
    """Iterate over a checkpoint's tensors as if it had been written in FP8.

    Each weight that becomes FP8 leaves as two tensors, its codes under its own name and its scales under the name
    that the format has for them; every other tensor leaves as it came. For an engine that loads FP8 checkpoints:
    give it the `quantization_config` of the same arguments, and this in the place of its weights.

        engine.load_weights(fk.quantize_weights(weights, "per_channel"))

    Weights that are FP8 already, with their scales before or after them, are taken as they are where those cover what
    the scheme says, or are a single one; elsewhere they are dequantized and quantized again, and what stays in high
    precision is dequantized to bfloat16.

    It is lazy: nothing is read before it is asked for, and of the weights only the current one is held. Under
    per_tensor, weights that engines fuse (`formats.FUSED_FAMILIES`) share one scale, so copies of a family's first
    members are held until its last one has come.

    Args:
        weights: (name, tensor) in the checkpoint's names, or tensors by name; a tensor may be overwritten once the
            next is asked for.
        scheme, ignore, include, schemes: which weights become FP8 and how, see `Rules`.
        format: "compressed-tensors" or "fp8", see `formats`.
        dtype: of the codes.
        device: where weights are quantized and their codes and scales are; by default where each one is.
        names: of all tensors of the checkpoint, where they are known: a family then waits only for members that
            exist. Without them a partial family leaves at the end.
        amax: name -> `max |w|` of the weights, from `read_amax`: a family whose members are all in it waits for none.
        partial: the weights are a part of the checkpoint, as in an update by buckets: patterns may match nothing.
            Families that per_tensor gives one scale have to be in one part.
        progress: called with (bytes done, name) after every tensor.

    Returns:
        An iterator of (name, tensor), with the `Report` as its attribute `report`, complete at the end.

    Raises:
        ValueError, TypeError: here, for arguments that name nothing.
        UnsupportedLayoutError, CheckpointError: on the way, for a weight that the format cannot hold, that is neither
            in high precision nor FP8 with scales, or that becomes something else than those it is fused with.
        NonFiniteWeightError: at the end; lists every weight that held NaN or Inf.
        UnmatchedPatternError: at the end; a pattern matched nothing, neither of what came nor of `names`, and the
            weights are not `partial`.
    """
    if isinstance(weights, (str, os.PathLike, Checkpoint)):
        raise TypeError(
            "`weights` must be (name, tensor) pairs; a checkpoint's are `fk.open_checkpoint(path).tensors()`"
        )
    if isinstance(weights, Mapping):
        weights = weights.items()
    rules = Rules(scheme, ignore, include, dict(schemes or {}))
    known = None if names is None else frozenset(names)
    return QuantizedWeights(weights, rules, as_format(format), dtype, device, known, amax or {}, partial, progress)


def quantization_config(
    weights: str | os.PathLike | Checkpoint | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    scheme: str | Scheme = "per_channel",
    format: str = "compressed-tensors",
    *,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    schemes: Mapping[str, str | Scheme] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> dict:
    """The `quantization_config` of config.json that says what `quantize_weights` makes of these weights.

    Args:
        weights: a checkpoint's folder, an opened one, or its tensors by name, of which only shapes and dtypes count:
            they may be on the meta device.
        scheme, format, ignore, include, schemes, dtype: as for `quantize_weights`.

    Raises:
        CheckpointError, UnsupportedLayoutError, UnmatchedPatternError, ValueError: as `quantize_checkpoint`.
    """
    fmt = as_format(format)
    selection = {"scheme": scheme, "ignore": ignore, "include": include, "schemes": schemes}
    if isinstance(weights, (str, os.PathLike)):
        weights = open_checkpoint(weights)
    if isinstance(weights, Checkpoint):
        return config_of(select(weights, fmt, dtype, may_be_fp8=True, **selection), fmt)
    tensors = as_high_precision(dict(weights))
    return config_of(select_tensors(tensors, fmt, dtype, "the given weights", **selection), fmt)


class QuantizedWeights:
    """The iterator of `quantize_weights`.

    Attributes:
        report: what was done so far. `peak_staging_bytes` are those of the weights that were held at once.
        name: of the tensor that was given last.
    """

    def __init__(self, weights, rules, fmt, dtype, device, names, amax, partial, progress):
        self._weights, self._rules, self._fmt, self._names, self._progress = weights, rules, fmt, names, progress
        self._amax, self._partial = amax, partial
        self._dtype, self._device = dtype, None if device is None else torch.device(device)
        self._families: dict[tuple, dict[str, torch.Tensor]] = {}  # members that wait for the others, as copies
        self._treated: dict[tuple, tuple] = {}  # the first of each family, and what becomes of it
        self._finite: dict[str, torch.Tensor] = {}  # of the latest weights; looked at together: a look waits
        self._bad: list[str] = []
        self.report = Report(scheme=scheme_name(rules.scheme), device=str(self._device or "each weight's"))
        self.name: str | None = None
        for name in names or ():  # patterns are of the whole checkpoint, of which a rank may read a part
            rules.decide(name, (), torch.float32)
        self._iterator = self._iterate()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        self.name, tensor = next(self._iterator)
        return self.name, tensor

    def _iterate(self):
        started = time.perf_counter()
        report = self.report
        for name, tensor, stored in paired(self._weights):
            report.shards += 1 if stored is None else 2
            report.bytes_in += tensor.nbytes + (0 if stored is None else stored.nbytes)
            scheme, why = self._decide(name, tensor, stored)
            stays = stored is not None and scheme is not None and self._may_stay(name, tensor, stored, scheme)
            if stored is not None and not stays:
                tensor = self._dequantized(name, tensor, stored, torch.bfloat16 if scheme is None else torch.float32)
            if stays:
                yield from self._as_it_is(name, tensor, stored, scheme)
            elif scheme is None:
                report.passed_through[name] = why
                report.bytes_out += tensor.nbytes
                yield name, tensor
            elif isinstance(scheme, PerTensor):
                yield from self._of_family(name, tensor, scheme)
            else:
                yield from self._quantized(name, tensor, scheme, None)
            del tensor
            report.seconds = time.perf_counter() - started
            if self._progress is not None:
                self._progress(report.bytes_in, name)
        for key in list(self._families):
            yield from self._leave(key)
        report.seconds = time.perf_counter() - started
        if not self._partial:
            self._rules.check_all_used()
        self._look()
        if self._bad:
            raise NonFiniteWeightError(f"{len(self._bad)} weights hold NaN or Inf: {', '.join(self._bad)}")

    def _decide(self, name, tensor, stored):
        scheme, why = self._rules.decide(name, tensor.shape, tensor.dtype if stored is None else torch.float32)
        if scheme is not None:
            self._fmt.check(name, tuple(tensor.shape), scheme, self._dtype)
        elif (
            stored is None
            and tensor.dtype not in HIGH_PRECISION
            and self._rules.decide(name, tensor.shape, torch.float32)[0] is not None
        ):
            raise CheckpointError(
                f"`{name}` must be bfloat16, float16 or float32, or FP8 with its scales, to become FP8, "
                f"got {dtype_name(tensor.dtype)}; ignore=[{name!r}] keeps it as it is"
            )
        family = tuple(family_of(name))
        if len(family) > 1:
            check_treated_alike(name, scheme, *self._treated.setdefault(family, (name, scheme)))
        return scheme, why

    def _may_stay(self, name, codes, stored, scheme):
        """Are FP8 weights what they would become? Fused ones with one scale each get a common one."""
        gets_another = isinstance(scheme, PerTensor) and len(self._members(name)) > 1
        if codes.dtype != self._dtype or scheme.pow2 or gets_another:
            return False
        return stored.numel() == 1 or tuple(stored.shape) == scheme.scale_shape(codes.shape)

    def _as_it_is(self, name, codes, stored, scheme):
        codes, shape = self._placed(codes), self._fmt.scale_shape(tuple(codes.shape), scheme)
        scale = self._placed(stored).float().reshape(-1).expand(math.prod(shape)).reshape(shape).contiguous()
        self._count_held(codes)
        yield from self._made(name, codes, scale, scale.isfinite().all() & ~holds_nan(codes))

    def _dequantized(self, name, codes, stored, dtype):
        codes, stored = self._placed(codes), usable(self._placed(stored))
        stored = stored.reshape(()) if stored.numel() == 1 else stored
        scheme = stored_scheme(codes, stored, f"`{name}`")
        return ops.dequantize(codes, stored, dtype, scheme)

    def _of_family(self, name, tensor, scheme):
        members = self._members(name)
        if len(members) == 1:
            yield from self._quantized(name, tensor, scheme, None)
            return
        known = [self._amax[member] for member in members if member in self._amax]
        if name in self._amax and (self._names is None or len(known) == len(members)):
            yield from self._quantized(name, tensor, scheme, torch.stack(known).amax(dim=0))
            return
        key = (tuple(members), scheme)
        waiting = self._families.setdefault(key, {})
        # The source may reuse the memory of what it gave, so what has to wait is copied.
        completes = name not in waiting and len(waiting) + 1 == len(members)
        waiting[name] = self._placed(tensor, copy=not completes)
        self._count_held()
        if len(waiting) == len(members):
            yield from self._leave(key)

    def _leave(self, key):
        """All members of a family that have come, with one scale."""
        waiting, scheme = self._families.pop(key), key[1]
        amax = None
        if len(waiting) > 1:
            device = next(iter(waiting.values())).device
            amaxes = [ops.amax(tensor, scheme).to(device) for tensor in waiting.values()]
            amax = torch.stack(amaxes).amax(dim=0)  # keeps NaN, as the definition does
        for name in list(waiting):
            yield from self._quantized(name, waiting.pop(name), scheme, amax)

    def _quantized(self, name, tensor, scheme, amax):
        tensor = self._placed(tensor)
        self._count_held(tensor)
        if amax is not None:
            amax = amax.to(tensor.device)
        q, scale = ops.quantize(tensor, scheme, dtype=self._dtype, amax=amax)
        scale = scale.float().reshape(self._fmt.scale_shape(tuple(q.shape), scheme))
        del tensor
        yield from self._made(name, q, scale, scale.isfinite().all())

    def _made(self, name, q, scale, finite):
        self._finite[name] = finite
        if len(self._finite) == _LOOK_AT:
            self._look()
        self.report.quantized_tensors += 1
        self.report.quantized_units += 1
        self.report.bytes_out += q.nbytes + scale.nbytes
        yield name, q
        yield self._fmt.scale_name(name), scale

    def _look(self):
        """Are the latest weights finite? One wait for each device."""
        for device in {finite.device for finite in self._finite.values()}:
            names = [name for name, finite in self._finite.items() if finite.device == device]
            flags = torch.stack([self._finite[name] for name in names]).tolist()
            self._bad += [name for name, finite in zip(names, flags, strict=True) if not finite]
        self._finite.clear()

    def _members(self, name):
        return [member for member in family_of(name) if self._names is None or member in self._names or member == name]

    def _placed(self, tensor, copy=False):
        return tensor.to(self._device or tensor.device, copy=copy)

    def _count_held(self, *tensors):
        held = sum(t.nbytes for waiting in self._families.values() for t in waiting.values())
        held += sum(t.nbytes for t in tensors)
        self.report.peak_staging_bytes = max(self.report.peak_staging_bytes, held)
