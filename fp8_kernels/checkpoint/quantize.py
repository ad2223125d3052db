"""Turn a checkpoint into an FP8 checkpoint, tensor by tensor, in bounded memory, atomically."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from .. import ops
from ..errors import CheckpointError, NonFiniteWeightError, UnsupportedLayoutError
from ..loading.prefetch import Prefetch
from ..loading.report import Report
from ..loading.rules import HIGH_PRECISION, Rules
from ..schemes import PerTensor, Scheme, as_scheme, dtype_name, scheme_name
from .amax import read_amax
from .folder import PartialFolder, folders_of
from .formats import TIED_HEAD, TRANSPOSED_MODEL_TYPES, Format, as_format, check_treated_alike, family_of, module_of
from .fp8_stream import as_high_precision
from .output import FileOutput, Output
from .plan import PlannedTensor, plan_tensors
from .reader import Checkpoint, TensorInfo, open_checkpoint, read_json
from .safetensors_file import SafetensorsWriter, num_bytes

INDEX = "model.safetensors.index.json"


def quantize_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    scheme: str | Scheme = "per_channel",
    format: str = "compressed-tensors",
    *,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    schemes: Mapping[str, str | Scheme] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
    overwrite: bool = False,
) -> Report:
    """Write an FP8 checkpoint folder that engines load.

    Weights pass through one at a time. The folder is made under `<dst>.partial` and renamed when it is complete;
    a call with the same arguments resumes what an interrupted one left there, file by file, to the same bytes.

    Args:
        src: a Hugging Face folder, or a single .safetensors file.
        dst: the folder to make.
        scheme, ignore, include, schemes: which weights become FP8 and how, see `Rules`.
        format: "compressed-tensors" or "fp8", see `formats`.
        dtype: of the codes.
        device: where the weights are quantized; the bits do not depend on it.
        progress: called with (bytes done, bytes in total, tensor name) after every tensor.
        overwrite: replace `dst`, which has to hold an FP8 checkpoint, and start over where `<dst>.partial` is of
            another conversion.

    Returns:
        What was done; the counts and bytes of a resumed conversion are those of the whole.

    Raises:
        CheckpointError: `src` cannot be read or is quantized already, or `dst` cannot be written.
        UnsupportedLayoutError: the format's engines would not load one of the weights; says what works.
        UnmatchedPatternError: a pattern matches no tensor.
        NonFiniteWeightError: some weights hold NaN or Inf; lists them all, and nothing is left behind.
        ValueError: an unknown scheme or format.
    """
    start = time.perf_counter()
    fmt, scheme = as_format(format), as_scheme(scheme)
    checkpoint = open_checkpoint(src)
    items = select(checkpoint, fmt, dtype, scheme=scheme, ignore=ignore, include=include, schemes=schemes)
    stored = {name: _stored(item, fmt, dtype) for name, item in items.items()}
    _refuse_two_of_a_name(checkpoint)
    quantizer = Quantizer(checkpoint, items, dtype, device)
    dst = Path(dst)
    _refuse_overlap(checkpoint, dst)
    if overwrite:
        _refuse_foreign(dst)
    with PartialFolder(dst, _identity(checkpoint, fmt, items, dtype), overwrite) as folder:
        try:
            seconds = _write_weights(checkpoint, folder, items, quantizer, stored, progress)
        except NonFiniteWeightError:
            folder.discard()  # resuming could only fail again
            raise
        finally:
            quantizer.close()
        _write_the_rest(checkpoint, folder, items, stored, fmt)
        folder.commit()
    num_quantized = sum(item.scheme is not None for item in items.values())
    return Report(
        scheme=scheme_name(scheme),
        device=str(device),
        quantized_units=num_quantized,
        quantized_tensors=num_quantized,
        passed_through={name: item.why for name, item in items.items() if item.scheme is None},
        shards=len(items),
        bytes_in=sum(item.bytes_in for item in items.values()),
        bytes_out=sum(num_bytes(*layout) for entries in stored.values() for layout in entries.values()),
        seconds=time.perf_counter() - start,
        seconds_by_phase=seconds,
        peak_staging_bytes=quantizer.peak_bytes,
    )


def select(
    checkpoint: Checkpoint, fmt: Format, dtype: torch.dtype, may_be_fp8: bool = False, **selection
) -> dict[str, PlannedTensor]:
    """What becomes of every tensor, by name; whatever the headers can tell is refused here.

    Args:
        may_be_fp8: weights may be FP8 already, with scales.
        selection: scheme, ignore, include, schemes.

    Raises:
        CheckpointError, UnsupportedLayoutError, UnmatchedPatternError: as `quantize_checkpoint`.
    """
    tensors = as_high_precision(checkpoint.metadata()) if may_be_fp8 else checkpoint.metadata()
    if len(tensors) == len(checkpoint.metadata()):
        _refuse_quantized(checkpoint)
    _refuse_transposed(checkpoint)
    return select_tensors(tensors, fmt, dtype, str(checkpoint.folder), **selection)


def select_tensors(
    tensors: Mapping[str, TensorInfo | torch.Tensor], fmt: Format, dtype: torch.dtype, where: str, **selection
) -> dict[str, PlannedTensor]:
    """`select` for anything that has shapes and dtypes.

    Args:
        where: the tensors are, for errors.
    """
    items = {item.name: item for item in plan_tensors(tensors, **selection).tensors}
    rules = Rules(**selection)
    for name, item in items.items():
        if item.scheme is not None:
            fmt.check(name, item.shape, item.scheme, dtype)
        elif item.dtype not in HIGH_PRECISION and rules.decide(name, item.shape, torch.float32)[0] is not None:
            raise CheckpointError(
                f"`{name}` in {where} must be bfloat16, float16 or float32 to become FP8, "
                f"got {dtype_name(item.dtype)}; ignore=[{name!r}] keeps it as it is"
            )
    if all(item.scheme is None for item in items.values()):
        raise CheckpointError(f"{where} holds no weight that would become FP8")
    for item in items.values():
        _check_family(items, item)
    return items


def config_of(items: Mapping[str, PlannedTensor], fmt: Format) -> dict:
    """The `quantization_config` of a checkpoint of which these tensors become that."""
    schemes = {module_of(item.name): item.scheme for item in items.values() if item.scheme is not None}
    return fmt.config(schemes, _kept_modules(items))


class Quantizer:
    """Quantizes the weights of one checkpoint; knows which of them share a scale.

    Args:
        checkpoint: to read the other members of a fused family from.
        items: what becomes of every tensor, by name.
        dtype: of the codes.
        device: where to work.

    Attributes:
        device: where it works.
        peak_bytes: the most that one weight with its codes and scales has taken.
    """

    def __init__(self, checkpoint: Checkpoint, items: Mapping[str, PlannedTensor], dtype: torch.dtype, device):
        self._checkpoint, self._items, self._dtype, self.device = checkpoint, items, dtype, torch.device(device)
        self._sources = Prefetch(self.device)
        # amax of every per_tensor weight so far, four bytes each; of all from the start where there is a sidecar
        self._shared = {name: amax.to(device) for name, amax in read_amax(checkpoint).items()}
        self.peak_bytes = 0
        # The codes of each weight in turn, on the CPU: malloc cannot give memory that one weight had to the next where
        # something that stays has come to lie behind it. Pages that nothing was written to take no memory.
        sizes = [math.prod(item.shape) for item in items.values() if item.scheme is not None]
        self._codes = torch.empty(max(sizes, default=0), dtype=dtype) if self.device.type == "cpu" else None

    def quantize(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, fp32 scales) on the CPU, in the shapes that are stored.

        Codes of a weight that is quantized on the CPU last until the next one begins.

        Raises:
            NonFiniteWeightError: the weight holds NaN or Inf; names every such weight of the checkpoint.
        """
        q, scale = self.start(name, weight)()
        if not scale.isfinite().all():
            self.refuse_non_finite()
        return q, scale

    def start(self, name: str, weight: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Begin to quantize a weight; returns what waits for the result of `quantize`, on any thread."""
        scheme = self._items[name].scheme
        weight = self._placed(weight)
        amax = self._shared_amax(name, weight) if isinstance(scheme, PerTensor) else None
        q, scale = ops.quantize(weight, scheme, out=self._outputs(weight, scheme), dtype=self._dtype, amax=amax)
        self.peak_bytes = max(self.peak_bytes, weight.nbytes + q.nbytes + scale.nbytes)
        scale = scale.float().reshape(scale.shape or (1,))
        if self.device.type != "cuda":
            return lambda: (q.cpu(), scale.cpu())
        held = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (q, scale))
        for to, t in zip(held, (q, scale), strict=True):
            to.copy_(t, non_blocking=True)
        arrived = torch.cuda.current_stream(self.device).record_event()

        def result():
            arrived.synchronize()
            return held

        return result

    def refuse_non_finite(self):
        """Raise NonFiniteWeightError; names every weight of the checkpoint that holds NaN or Inf."""
        raise NonFiniteWeightError(f"weights hold NaN or Inf: {', '.join(self._all_non_finite())}")

    def close(self):
        """Let go of what reads ahead."""
        self._sources.close()

    def _outputs(self, weight, scheme):
        if self._codes is None:
            return None
        codes = self._codes[: weight.numel()].view(weight.shape)
        return codes, torch.empty(scheme.scale_shape(weight.shape), dtype=scheme.scale_dtype)

    def _placed(self, weight):
        if self.device.type != "cuda":
            return weight.to(self.device)
        placed = torch.empty(weight.shape, dtype=weight.dtype, device=self.device)
        self._sources.bring(placed, weight)
        return placed

    def _shared_amax(self, name, weight):
        """The largest amax of the fused family; each member is read once more at most, in whichever file it is."""
        items = self._items
        family = [
            member for member in family_of(name) if member in items and items[member].scheme == items[name].scheme
        ]
        for member in family:
            if member not in self._shared:  # no name for the other weights, so that one at most is held
                self._shared[member] = ops.amax(
                    weight if member == name else self._placed(self._checkpoint.read(member)), "per_tensor"
                )
        return torch.stack([self._shared[member] for member in family]).amax(dim=0)

    def _all_non_finite(self):
        for name, weight in self._checkpoint.tensors():
            if self._items[name].scheme is not None and not ops.amax(weight, "per_tensor").isfinite():
                yield name


class _NonFinite(Exception):
    """A scale is not finite; which weights are not is found out where their files may be read."""


def _write_weights(checkpoint, folder, items, quantizer, stored, progress):
    """Write each weight file that is not there yet; returns seconds by phase, which overlap.

    Args:
        stored: name of a tensor -> {name: (dtype, shape)} of what is stored for it.
    """
    seconds = {"quantize": 0.0, "write": 0.0}
    done, total = 0, sum(item.bytes_in for item in items.values())

    def written(name):
        nonlocal done
        done += items[name].bytes_in
        if progress:
            progress(done, total, name)

    try:
        # What waits would take memory of the kind that is quantized in; and on the CPU codes last for one weight only.
        with Output(at_once=quantizer.device.type == "cpu") as output:
            for file in checkpoint.files:
                names = [name for name, info in checkpoint.metadata().items() if info.file == file]
                path = folder.path / _output_name(checkpoint, file)
                if folder.has(path.name):
                    done += sum(items[name].bytes_in for name in names)
                    continue
                entries = {entry: layout for name in names for entry, layout in stored[name].items()}
                with FileOutput(SafetensorsWriter(path, entries, {"format": "pt"}), output) as file_output:
                    for name, tensor in checkpoint.tensors(file):
                        started = time.perf_counter()
                        values = _values_of(items[name], tensor, quantizer, stored[name])
                        seconds["quantize"] += time.perf_counter() - started
                        size = sum(num_bytes(*layout) for layout in stored[name].values())
                        file_output.write(values, size, functools.partial(written, name))
                        del tensor, values  # before the next one is read
            seconds["write"] = output.seconds
    except _NonFinite:
        quantizer.refuse_non_finite()
    return seconds


def _values_of(item, tensor, quantizer, stored):
    """What returns the tensors that are stored for one, by name, on whichever thread asks for them."""
    if item.scheme is None:
        return lambda: {item.name: tensor}
    result = quantizer.start(item.name, tensor)

    def values():
        q, scale = result()
        if not scale.isfinite().all():
            raise _NonFinite
        return dict(zip(stored, (q, scale), strict=True))

    return values


def _write_the_rest(checkpoint, folder, items, stored, fmt):
    """The index, config.json and whatever else the source folder holds."""
    if checkpoint.sharded:
        files = {name: _output_name(checkpoint, info.file) for name, info in checkpoint.metadata().items()}
        weight_map = {entry: files[name] for name in items for entry in stored[name]}
        total = sum(num_bytes(*layout) for name in items for layout in stored[name].values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        folder.write_text(INDEX, json.dumps(index, indent=2) + "\n")
    for name in checkpoint.other_files():
        if name != "config.json":
            folder.copy(name, checkpoint.folder / name)
    config = checkpoint.config | {"quantization_config": config_of(items, fmt)}
    folder.write_text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _stored(item, fmt, dtype):
    """{name: (dtype, shape)} of what is stored for a tensor."""
    if item.scheme is None:
        return {item.name: (item.dtype, item.shape)}
    scale = (torch.float32, fmt.scale_shape(item.shape, item.scheme))
    return {item.name: (dtype, item.shape), fmt.scale_name(item.name): scale}


def _kept_modules(items):
    """Modules that stay in high precision, by their exact names.

    A checkpoint does not say which of them are Linear. Naming one that is not does no harm, leaving out one that is
    makes engines expect scales for it; so all are named whose weight has the shape of one.
    """
    kept = [item.name for item in items.values() if item.scheme is None and len(item.shape) in (2, 3)]
    modules = {module_of(name) for name in kept if name.endswith(".weight") or len(items[name].shape) == 3}
    if f"{TIED_HEAD}.weight" not in items:
        modules.add(TIED_HEAD)
    return sorted(modules)


def _refuse_foreign(dst):
    """Raise where what would be replaced was written by no conversion."""
    if dst.is_dir() and any(dst.iterdir()):
        config = dst / "config.json"
        if not config.is_file() or "quantization_config" not in read_json(config):
            raise CheckpointError(f"{dst} must hold an FP8 checkpoint to be replaced; remove it yourself")


def _refuse_quantized(checkpoint):
    folder, config = checkpoint.folder, checkpoint.config
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                method = part[key].get("quant_method", "unknown") if isinstance(part[key], dict) else part[key]
                raise CheckpointError(f"{folder} is quantized already (`{key}` of config.json: {method})")
    if not checkpoint.is_single_file and (folder / "hf_quant_config.json").exists():
        raise CheckpointError(f"{folder} is quantized already (it holds hf_quant_config.json)")
    for name in checkpoint.metadata():
        if name.endswith((".weight_scale", ".weight_scale_inv")):
            raise CheckpointError(f"{folder} is quantized already (it holds `{name}`)")


def _refuse_overlap(checkpoint, dst):
    """Raise where the source would be written to, or replaced: it may hold the only copy of the weights."""
    folder = checkpoint.folder.resolve()
    if not checkpoint.is_single_file and folder in (dst.resolve(), *dst.resolve().parents):
        raise CheckpointError(f"`dst` must lie outside of the source {checkpoint.folder}, got {dst}")
    read = [folder, *((folder / file).resolve() for file in checkpoint.files)]
    for made in folders_of(dst):
        if any(made.resolve() in (path, *path.parents) for path in read):
            raise CheckpointError(f"`dst` must not replace {made}, which holds the source, got {dst}")


def _refuse_transposed(checkpoint):
    """Raise for checkpoints whose rows are not output channels."""
    folder, config = checkpoint.folder, checkpoint.config
    if config.get("model_type") in TRANSPOSED_MODEL_TYPES:
        raise UnsupportedLayoutError(
            f"{folder}: checkpoints of {config['model_type']} store weights as [K, N], which no FP8 format can say"
        )


def _check_family(items, item):
    """Shards that engines fuse must be treated alike."""
    for other in family_of(item.name):
        if other in items:
            check_treated_alike(item.name, item.scheme, other, items[other].scheme)


def _output_name(checkpoint, file):
    """The name that engines look for: model.safetensors, or that of the shard, without its pickle past."""
    if not checkpoint.sharded:
        return "model.safetensors"
    return f"{os.path.splitext(file)[0].replace('pytorch_model', 'model')}.safetensors"


def _refuse_two_of_a_name(checkpoint):
    """Raise where two files would be written to one."""
    names = {}
    for file in checkpoint.files:
        other = names.setdefault(_output_name(checkpoint, file), file)
        if other != file:
            raise CheckpointError(f"{checkpoint.folder}: {other} and {file} must have different names without suffixes")


def _identity(checkpoint, fmt, items, dtype):
    """Everything that the written bytes depend on, as text."""
    from .. import __version__  # not above: the package imports this module before it knows its version

    files = [*checkpoint.files, *checkpoint.other_files()]
    try:
        stats = {file: os.stat(checkpoint.folder / file) for file in files}
    except OSError as error:  # a link to nowhere
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    content = {
        "version": __version__,
        "source": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "format": fmt.name,
        "dtype": str(dtype),
        "schemes": {item.name: repr(item.scheme) for item in items.values() if item.scheme is not None},
    }
    return json.dumps(content, indent=1, sort_keys=True)
