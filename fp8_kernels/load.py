"""Load a checkpoint into a model, FP8 as its weights arrive, without an engine.

The model is built on the meta device and costs nothing; each tensor is copied to where it belongs inside a
`LayerwiseLoader`, which quantizes it at once; what no checkpoint holds (rotary tables) is computed by the model.
"""

from __future__ import annotations

import gc
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.amax import read_amax
from .checkpoint.formats import FORMATS, module_of
from .errors import CheckpointError, LoadError, UnsupportedLayoutError
from .loading import LayerwiseLoader
from .loading.plan import listed
from .loading.report import Report
from .loading.rules import Rules
from .modules import Fp8Experts, Fp8Linear, can_run, make_runnable
from .names import Names
from .ops import FP8_DTYPES
from .schemes import PerBlock, PerChannel, PerTensor, Scheme, as_scheme
from .wire import SpanLoad, suits

_SCALE_SUFFIXES = ("_scale", "_scale_inv")


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike | Checkpoint | Iterable[tuple[str, torch.Tensor]],
    scheme: str | Scheme = "per_channel",
    *,
    device: torch.device | str | None = None,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    schemes: Mapping[str, str | Scheme] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    activation: str | None = "dynamic",
    runnable: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    transfer: str = "auto",
) -> Report:
    """Load a checkpoint into a model on the meta device; its weights become FP8 as they arrive.

    Args:
        model: built under `torch.device("meta")`.
        source: a checkpoint folder or .safetensors file, an opened one, or any iterable of `(name, tensor)`, which
            is consumed one tensor at a time. A folder that is FP8 already (as `quantize_checkpoint` writes it) is
            taken as it is: its codes and scales, whatever `scheme` says. FP8 weights of an iterable, with
            `<name>_scale` or `<name>_scale_inv` before or after them, are taken as they are where their scales cover
            what `scheme` says, and are dequantized and quantized again where not. Where a folder has a sidecar of
            maxima (`fp8-kernels amax`), `per_tensor` weights are quantized as they arrive, with the same bits.
        scheme, ignore, include, schemes: which weights become FP8 and how, see `Rules`.
        device: where the model will live; by default the GPU if there is one.
        dtype: of the codes.
        activation: "dynamic" or None, see `Fp8Linear`.
        runnable: replace the modules of FP8 weights by `Fp8Linear` and `Fp8Experts`. Weights of modules that have no
            such replacement then stay in high precision, and the report says so. With False the model holds the
            codes and scales for the caller to run.
        progress: called with (bytes done, bytes in all, name).
        transfer: "spans" reads the safetensors files of a folder by many threads, runs of many tensors at a time;
            "mapped" takes one tensor after the other out of the mapped file. "auto" is by spans to a GPU. The report
            says how fast that was.

    Returns:
        The report. `model` has been filled, on `device`.

    Raises:
        LoadError: and its kinds: incomplete, non-finite, conflicting, unexpected tensors or shapes; the message names
            them, and the model is as it was before.
        CheckpointError: `source` is not a checkpoint.
    """
    ignore, include = list(ignore), list(include)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(source, (str, os.PathLike)):
        source = open_checkpoint(source)
    with _no_collection(), ExitStack() as stack:
        spans, total, amax = None, 0, {}
        if isinstance(source, Checkpoint) and suits(source, device, transfer):
            rules = Rules(scheme, ignore, include, dict(schemes or {}))
            spans = stack.enter_context(SpanLoad(source, device, rules))
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # while that is free: the loader then sees one storage
        stack.enter_context(_restored_on_failure(model))
        if isinstance(source, Checkpoint):
            _expect_fp8(model, source, activation)
            if any(isinstance(as_scheme(each), PerTensor) for each in (scheme, *(schemes or {}).values())):
                amax = _known_maxima(model, source)
            total = sum(info.num_bytes for info in source.metadata().values())
            source = source.tensors()
        _compute_buffers(model, device)
        options = {"device": device, "include": include, "schemes": schemes, "dtype": dtype, "amax": amax}
        loader = LayerwiseLoader(model, scheme, ignore=ignore, **options)
        kept = _not_runnable(model, loader.plan) if runnable else {}
        if kept:
            loader = LayerwiseLoader(model, scheme, ignore=[*ignore, *kept], **options)
        names = Names(model)
        with loader.prepared(spans and spans.given(loader, names)):
            if spans is not None:
                spans.into(loader, names, progress)
            else:
                _copy_all(loader, source, total, progress)
        loader.report.passed_through.update(kept)
        if runnable:
            chosen = {name: entry.scheme for entry in loader.plan.quantized for name in entry.names}
            make_runnable(model, activation, chosen)
        if any(t.device != loader.device for t in (*model.parameters(), *model.buffers())):
            model.to(device)  # buffers that were real all along
    return loader.report


def load_model(
    path: str | os.PathLike, scheme: str | Scheme = "per_channel", *, model_class: type | None = None, **options
) -> tuple[nn.Module, Report]:
    """Build the transformers model of a checkpoint folder and load it, FP8 as its weights arrive.

    Args:
        path: a Hugging Face folder with a config.json.
        scheme, **options: as for `load_checkpoint`.
        model_class: a transformers class with `from_config`; by default the one that the config names.

    Returns:
        `(model, report)`, the model in eval mode.

    Raises:
        CheckpointError: no checkpoint, or one whose config names no class that transformers knows.
        LoadError: as for `load_checkpoint`.
    """
    import transformers

    checkpoint = open_checkpoint(path)
    if not checkpoint.config:
        raise CheckpointError(f"{path} must hold a config.json that names its model, got none")
    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # says how the folder is stored, not what the model is
    if model_class is None:
        names = config.architectures or ["(no architectures)"]
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise CheckpointError(f"{path}: config.json names {names[0]}, which transformers does not know")
    dtype = config.dtype or _main_dtype(checkpoint)
    build = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        model = build(config, dtype=dtype)
    report = load_checkpoint(model, checkpoint, scheme, **options)
    if model.can_generate() and (Path(path) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval(), report


def _copy_all(loader, tensors, total, progress):
    """Copy each tensor to where it belongs, inside the loader."""
    model = loader.model
    names = Names(model)
    targets = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    unexpected, done = [], 0
    for name, tensor, scale in _with_scales(tensors, names):
        done += tensor.nbytes
        destination = names.find(name)
        if destination is None:
            if not names.may_be_dropped(name):
                unexpected.append(name)
        else:
            with torch.no_grad():
                target = destination.of(targets[destination.name])
                if scale is not None:
                    loader.copy_codes(target, tensor, scale)
                    continue
                if tensor.shape != target.shape:
                    tensor = _reshaped_scale(name, tensor, target)
                target.copy_(tensor)
        if progress:
            progress(done, total or done, name)
    if unexpected:
        raise LoadError(
            f"the model has no place for {listed(unexpected)}; leave them out by passing an iterable without them"
        )


def _with_scales(tensors, names):
    """Each (name, tensor, None); FP8 weights that the model holds no scale for as (name, codes, scale), once both have
    arrived. Codes without a scale come last, as they are."""
    codes, scales = {}, {}
    for name, tensor in tensors:
        base = next((name.removesuffix(s) for s in _SCALE_SUFFIXES if name.endswith(s)), None)
        if base is not None and names.find(name) is None and names.find(base) is not None:
            scales[base] = name, tensor
        elif tensor.dtype in FP8_DTYPES and all(names.find(name + s) is None for s in _SCALE_SUFFIXES):
            base, codes[name] = name, tensor
        else:
            yield name, tensor, None
            continue
        if base in codes and base in scales:
            yield base, codes.pop(base), scales.pop(base)[1]
    for name, tensor in [*codes.items(), *scales.values()]:
        yield name, tensor, None


def _reshaped_scale(name, tensor, target):
    """A lone scale is stored as `[1]`; it is `[]`, or covers all rows, in a module."""
    if tensor.numel() == 1 and "weight_scale" in name:
        return tensor.reshape(()).expand(target.shape)
    raise LoadError(f"`{name}` must have shape {tuple(target.shape)}, got {tuple(tensor.shape)}")


def _not_runnable(model, plan):
    """Weights that would become FP8 in modules which `make_runnable` cannot replace -> why they do not."""
    # A model that is itself such a module has no parent in which to replace it.
    return {
        entry.name: f"nothing runs {type(entry.places[0].module).__name__} in FP8"
        for entry in plan.quantized
        if not all(can_run(place.module) and place.module is not model for place in entry.places)
    }


def _known_maxima(model, checkpoint):
    """Parameter -> the maximum of its weight, or of each of its experts, where the checkpoint's sidecar tells all."""
    names, infos = Names(model), checkpoint.metadata()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, torch.Tensor] = {}
    numel: dict[str, int] = {}  # elements of a parameter whose maxima are told
    for name, amax in read_amax(checkpoint).items():
        destination = names.find(name)
        parameter = destination and parameters.get(destination.name)
        if parameter is None or parameter.ndim < 2:
            continue
        known = found.setdefault(destination.name, amax.new_zeros(parameter.shape[:-2]))
        part = known if destination.expert is None else known[destination.expert]
        if part.shape != amax.shape:
            continue
        part.copy_(torch.maximum(part, amax))  # keeps NaN
        numel[destination.name] = numel.get(destination.name, 0) + math.prod(infos[name].shape)
    return {name: amax for name, amax in found.items() if numel.get(name) == parameters[name].numel()}


@contextmanager
def _restored_on_failure(model):
    """Put modules and buffers back where they were if the body raises; parameters are the loader's to restore."""
    modules = [(module, dict(module._modules), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, children, buffers in modules:
            module._modules.update(children)
            module._buffers.update(buffers)
        raise


@contextmanager
def _no_collection():
    """Python's search for garbage cycles takes longer in a large process than a small load does; it waits."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# Checkpoints that are FP8 already.


def _expect_fp8(model, checkpoint, activation):
    """Put FP8 modules, still on meta, where the checkpoint holds FP8 weights, so that they are taken as they are."""
    stored = {name: info for name, info in checkpoint.metadata().items() if info.dtype in FP8_DTYPES}
    if not stored:
        return
    names, found = Names(model), {}
    for name, info in stored.items():
        destination = names.find(name)
        if destination is None:
            continue  # reported as unexpected when it arrives
        owner = destination.name.rpartition(".")[0]
        scheme = _stored_scheme(checkpoint, name, info, destination.expert is not None)
        if found.setdefault(owner, (scheme, info.dtype)) != (scheme, info.dtype):
            raise UnsupportedLayoutError(f"`{owner}` must have one scheme for all its experts, `{name}` has {scheme}")
    for owner, (scheme, dtype) in found.items():
        module = model.get_submodule(owner)
        if not can_run(module) or module is model:
            raise UnsupportedLayoutError(f"`{owner}` ({type(module).__name__}) holds FP8 weights that nothing runs")
        parent, _, child = owner.rpartition(".")
        replacement = _empty_fp8(module, owner, scheme, dtype, activation)
        setattr(model.get_submodule(parent), child, replacement.train(module.training))


def _stored_scheme(checkpoint, name, info, is_expert):
    """What one stored scale covers."""
    metadata = checkpoint.metadata()
    scales = [f"{module_of(name)}.{leaf}" for leaf in ("weight_scale", "weight_scale_inv")]
    scale = next((metadata[s] for s in scales if s in metadata), None)
    if scale is None:
        raise CheckpointError(f"{checkpoint.folder}: FP8 weight `{name}` has no scale `{scales[0]}` beside it")
    if scale.shape in ((), (1,)):
        return PerChannel() if is_expert else PerTensor()  # merged experts get their halves' scales row by row
    if scale.shape == (info.shape[0], 1):
        return PerChannel()
    config = checkpoint.config.get("quantization_config", {})
    format = FORMATS.get(config.get("quant_method"))
    scheme = format.scheme_of(config, module_of(name)) if format else None
    if scheme is None or scheme.scale_shape(info.shape) != tuple(scale.shape):
        raise UnsupportedLayoutError(
            f"{checkpoint.folder}: config.json does not say what the scales of `{name}` cover "
            f"({list(scale.shape)} for {list(info.shape)})"
        )
    return scheme


def _empty_fp8(module, owner, scheme, dtype, activation):
    options = {"dtype": dtype, "activation": activation, "device": "meta"}
    if isinstance(module, nn.Linear):
        new = Fp8Linear(module.in_features, module.out_features, module.bias is not None, scheme, **options)
        new.bias = module.bias
        return new
    new = Fp8Experts.like(module, scheme, **options)
    if isinstance(scheme, PerBlock) and new.intermediate_dim % scheme.block_n:
        raise UnsupportedLayoutError(
            f"`{owner}`: blocks of {scheme.block_n} rows must not straddle gate and up, got {new.intermediate_dim} rows"
        )
    return new


# What no checkpoint holds.


def _compute_buffers(model, device):
    """Let the model compute its non-persistent buffers (rotary tables) on the device.

    The model's parameters are still on meta, so its own initialisation runs without touching a value. It runs over
    two different fillings: a buffer that comes out the same both times was computed, any other was left alone.
    """
    left = []
    for prefix, module in model.named_modules():
        leaves = [leaf for leaf in module._non_persistent_buffers_set if _is_meta(module._buffers.get(leaf))]
        if not leaves:
            continue
        initialise = getattr(_pretrained_ancestor(model, prefix), "_init_weights", lambda module: None)
        results = []
        for filling in (0, 1):
            for leaf in leaves:
                module._buffers[leaf] = torch.full_like(module._buffers[leaf], filling, device=device)
            with torch.no_grad():
                initialise(module)
            results.append([module._buffers[leaf] for leaf in leaves])
        left += [
            f"{prefix}.{leaf}".lstrip(".") for leaf, a, b in zip(leaves, *results, strict=True) if not torch.equal(a, b)
        ]
    if left:
        raise LoadError(
            f"no checkpoint holds {', '.join(f'`{name}`' for name in left)}, and the model does not say how to compute "
            "them: give the model real ones (build the module that owns them outside of the meta device)"
        )


def _is_meta(buffer):
    return buffer is not None and buffer.is_meta


def _pretrained_ancestor(model, prefix):
    """The innermost module around `prefix` that knows how to initialise its parts."""
    parts = prefix.split(".")
    for size in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:size]))
        if hasattr(module, "_init_weights"):
            return module
    return None


def _main_dtype(checkpoint):
    """The dtype that most high-precision elements of the checkpoint have."""
    sizes = Counter()
    for info in checkpoint.metadata().values():
        if info.dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes[info.dtype] += info.num_bytes
    return sizes.most_common(1)[0][0] if sizes else torch.bfloat16
