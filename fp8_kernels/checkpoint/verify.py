"""Check an FP8 checkpoint folder: tensors, shapes, dtypes, scales and config; against its source, every bit."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import torch

from ..errors import CheckpointError, NonFiniteWeightError
from ..loading.rules import HIGH_PRECISION, Rules
from ..schemes import dtype_name
from .formats import FORMATS, module_of
from .plan import PlannedTensor
from .quantize import Quantizer
from .reader import open_checkpoint

_SCALE_SUFFIXES = tuple(f".{fmt.scale_suffix}" for fmt in FORMATS.values())
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_checkpoint` found; `problems` is empty where all is well."""

    path: str
    against: str | None
    num_tensors: int
    num_quantized: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict:
        """For `--json`."""
        return {
            "path": self.path,
            "against": self.against,
            "ok": self.ok,
            "tensors": self.num_tensors,
            "quantized": self.num_quantized,
            "problems": list(self.problems),
        }

    def __str__(self):
        checked = f"{self.path}: {self.num_tensors} tensors, {self.num_quantized} of them FP8"
        if self.problems:
            count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
            return "\n".join([f"{checked}, {count}", *(f"  {line}" for line in self.problems)])
        same = f", every bit as quantized from {self.against}" if self.against else ""
        return f"{checked}, complete, shapes and dtypes right, scales finite and positive{same}"


def verify_checkpoint(path: str | os.PathLike, against: str | os.PathLike | None = None) -> VerifyReport:
    """Check a folder that holds an FP8 checkpoint in one of `FORMATS`.

    Every tensor of the index is in its file; every FP8 weight has scales of the shape that the config says, finite
    and positive, and no NaN among its codes; no scales are without a weight; the config keeps exactly what is not
    FP8. With `against`, the codes and scales equal a fresh quantization of that checkpoint on the CPU, and all else
    equals it byte for byte.

    Args:
        path: of the FP8 folder.
        against: the checkpoint that it was made from.

    Returns:
        A report; whatever is wrong with `path` is in its `problems`.

    Raises:
        CheckpointError: `against` cannot be read.
    """
    source = None if against is None else open_checkpoint(against)
    problems: list[str] = []
    num_tensors, schemes = 0, {}
    try:
        checkpoint = open_checkpoint(path)
        num_tensors = len(checkpoint.metadata())
        fmt, config = _quantization(checkpoint)
        try:
            schemes = _check_headers(checkpoint, fmt, config, problems)
        except (AttributeError, TypeError, re.error) as error:  # what is no list, no name or no pattern in it
            raise CheckpointError(f"{path}: `quantization_config` of config.json is malformed: {error}") from error
        traits = _check_values(checkpoint, schemes, fmt, problems)
        if source is not None:
            _check_bits(checkpoint, source, fmt, _restored(schemes, traits), problems)
    except (CheckpointError, NonFiniteWeightError) as error:
        problems.append(str(error))
    return VerifyReport(
        str(path), None if against is None else str(against), num_tensors, len(schemes), tuple(problems)
    )


def _quantization(checkpoint):
    config = checkpoint.config.get("quantization_config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{checkpoint.folder}: config.json holds no `quantization_config`")
    if config.get("quant_method") not in list(FORMATS):
        raise CheckpointError(
            f"{checkpoint.folder}: `quant_method` must be one of {sorted(FORMATS)}, got {config.get('quant_method')!r}"
        )
    return FORMATS[config["quant_method"]], config


def _check_headers(checkpoint, fmt, config, problems):
    """Name -> scheme of every FP8 weight; what headers and config say of each other goes to `problems`."""
    metadata, schemes, rules = checkpoint.metadata(), {}, Rules()
    for name, info in metadata.items():
        module = module_of(name)
        if info.dtype in _FP8:
            scheme = fmt.scheme_of(config, module) if name.endswith(".weight") else None
            if scheme is None:
                problems.append(f"`{name}` is FP8, but the config gives it no scheme")
                continue
            if fmt.keeps(config, module):
                problems.append(f"`{name}` is FP8, but the config keeps `{module}` in high precision")
            schemes[name] = scheme
            expected = (torch.float32, fmt.scale_shape(info.shape, scheme))
            scale = metadata.get(fmt.scale_name(name))
            if scale is None:
                problems.append(f"`{name}` is FP8, but `{fmt.scale_name(name)}` is missing")
            elif (scale.dtype, scale.shape) != expected:
                problems.append(
                    f"`{fmt.scale_name(name)}` must be float32 {list(expected[1])}, "
                    f"got {dtype_name(scale.dtype)} {list(scale.shape)}"
                )
        elif name.endswith(_SCALE_SUFFIXES):
            weight = metadata.get(f"{module}.weight")
            if weight is None or weight.dtype not in _FP8:
                problems.append(f"`{name}` are scales without an FP8 weight")
        elif rules.decide(name, info.shape, info.dtype)[0] is not None and not fmt.keeps(config, module):
            problems.append(f"`{name}` is not FP8, but the config does not keep `{module}` in high precision")
    return schemes


def _check_values(checkpoint, schemes, fmt, problems):
    """Check scales and codes; returns (all scales are powers of two, all are bf16 values) of every FP8 weight."""
    weight_of = {fmt.scale_name(name): name for name in schemes}
    traits = {}
    for name, tensor in checkpoint.tensors():
        if name in weight_of and tensor.dtype == torch.float32:
            num_bad = int((~(tensor.isfinite() & (tensor > 0))).sum())
            if num_bad:
                problems.append(f"`{name}` holds {num_bad} scales that are not finite and positive")
            bits = tensor.view(torch.int32)
            traits[weight_of[name]] = not (bits & 0x7FFFFF).any(), not (bits & 0xFFFF).any()
        elif name in schemes:
            num_nan = int(tensor.isnan().sum())
            if num_nan:
                problems.append(f"`{name}` holds {num_nan} NaN")
    return traits


def _restored(schemes, traits):
    """The schemes with the rounding of their scales.

    The config does not say how scales were rounded, but they do: scales that all are powers of two (or bf16 values)
    are what rounding makes of the exact ones, and where those are such values already, rounding changes nothing.
    """
    restored = {}
    for name, scheme in schemes.items():
        pow2, is_bf16 = traits.get(name, (False, False))
        restored[name] = replace(scheme, pow2=pow2, scale_dtype=torch.bfloat16 if is_bf16 else torch.float32)
    return restored


def _check_bits(checkpoint, source, fmt, schemes, problems):
    """Compare with a fresh quantization of the source."""
    metadata, originals = checkpoint.metadata(), source.metadata()
    scales = {fmt.scale_name(name) for name in schemes}
    for name in metadata:
        if name not in originals and name not in scales:
            problems.append(f"`{name}` is not in {source.folder}")
    items = {
        name: PlannedTensor(
            name, info.shape, info.dtype, schemes.get(name) if info.dtype in HIGH_PRECISION else None, ""
        )
        for name, info in originals.items()
    }
    quantizer = Quantizer(source, items, torch.float8_e4m3fn, "cpu")
    for name, original in originals.items():
        if name not in metadata:
            problems.append(f"`{name}` is in {source.folder}, but not here")
        elif metadata[name].shape != original.shape:
            shape = list(metadata[name].shape)
            problems.append(f"`{name}` must have the shape of its source, {list(original.shape)}, got {shape}")
        elif name not in schemes:
            if not _same_bytes(checkpoint.read(name), source.read(name)):
                problems.append(f"`{name}` differs from its source")
        elif items[name].scheme is None:
            dtype = dtype_name(original.dtype)
            problems.append(f"`{name}` is FP8, but {dtype} in {source.folder}, so there is nothing to compare it with")
        elif fmt.scale_name(name) in metadata:
            q, scale = quantizer.quantize(name, source.read(name))
            num_codes = int((q.view(torch.uint8) != checkpoint.read(name).view(torch.uint8)).sum())
            if num_codes:
                problems.append(f"`{name}`: {num_codes} of {q.numel()} codes differ from a fresh quantization")
            if not _same_bytes(checkpoint.read(fmt.scale_name(name)), scale):
                problems.append(f"`{fmt.scale_name(name)}` differs from a fresh quantization")


def _same_bytes(a, b):
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
