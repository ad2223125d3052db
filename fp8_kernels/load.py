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

from .buffers import compute_buffers, keep_precision
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.amax import read_amax
from .errors import CheckpointError, ConflictingShardError, LoadError
from .loading import LayerwiseLoader
from .loading.compare import are_equal
from .loading.plan import Plan, listed, make_plan
from .loading.report import Report
from .loading.rules import Rules
from .modules import can_run, make_runnable
from .names import Names, turned_experts
from .ops import FP8_DTYPES
from .schemes import PerTensor, Scheme, as_scheme
from .stored import SCALE_SUFFIXES, check_dtype, expect_fp8, stored_schemes, wrong_shape
from .wire import SpanLoad, suits


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike | Checkpoint | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    scheme: str | Scheme | None = None,
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
        source: a checkpoint folder or .safetensors file, an opened one, tensors by name, or any iterable of `(name,
            tensor)`, which is consumed one tensor at a time. FP8 weights come with `<name>_scale` or
            `<name>_scale_inv`, before or after them. Where a folder has a sidecar of maxima (`fp8-kernels amax`),
            `per_tensor` weights are quantized as they arrive, with the same bits.
        scheme, ignore, include, schemes: which weights become FP8 and how, see `Rules`; per_channel by default. But
            where none of them is given, a folder that holds FP8 weights is taken as it is, with its codes, scales
            and what it kept. Else FP8 weights are taken as they are where their scales cover what they are to cover,
            and dequantized and quantized again, in pieces, where not.
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
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(source, (str, os.PathLike)):
        source = open_checkpoint(source)
    elif isinstance(source, Mapping):
        source = source.items()
    is_iterable = not isinstance(source, Checkpoint)
    with no_collection(), ExitStack() as stack:
        spans, total, stored, kept, amax = None, 0, {}, {}, {}
        chosen = Rules(ignore=ignore, include=include)
        rules = {"ignore": list(chosen.ignore), "include": list(chosen.include), "schemes": schemes}
        as_it_is = scheme is None and not any(rules.values())
        rules["scheme"] = "per_channel" if scheme is None else scheme
        if isinstance(source, Checkpoint):
            stored = stored_schemes(source)
            if span_by_span(source, model, {} if as_it_is else stored, device, transfer):
                spans = stack.enter_context(SpanLoad(source, device, Rules(**rules), model))
        keep_precision(model)
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # while that is free: the loader then sees one storage
        stack.enter_context(_restored_on_failure(model))
        if stored and as_it_is:
            expect_fp8(model, source, stored, activation)
            rules["ignore"] = ["*"]
        compute_buffers(model, device)
        plan = None
        if runnable:
            plan = make_plan(model, dtype=dtype, **rules)
            kept = not_runnable(model, plan)
            rules["ignore"] += kept
            stack.enter_context(turned_experts(model, names_to_quantize(plan) - kept.keys()))
        if isinstance(source, Checkpoint):
            amax = known_maxima(model, source, rules)
            total = sum(info.num_bytes for info in source.metadata().values())
            source = source.tensors()
        loader, names = LayerwiseLoader(model, device=device, dtype=dtype, amax=amax, **rules), Names(model)
        if spans is not None and plan is not None and not kept:
            loader.take_plan(plan)
        with loader.prepared(spans and spans.given(loader, names)):
            if spans is not None:
                spans.into(loader, names, progress)
            else:
                copy_all(loader, source, names, stored, total, progress, reuses_memory=is_iterable)
        loader.report.passed_through.update(kept)
        if runnable:
            chosen = {name: entry.scheme for entry in loader.plan.quantized for name in entry.names}
            make_runnable(model, activation, chosen)
        if any(t.device != loader.device for t in (*model.parameters(), *model.buffers())):
            model.to(device)  # buffers that were real all along
    return loader.report


def load_model(
    path: str | os.PathLike, scheme: str | Scheme | None = None, *, model_class: type | None = None, **options
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


def span_by_span(checkpoint: Checkpoint, model, codes, device: torch.device, transfer: str) -> bool:
    """Is it read by spans? Not where FP8 `codes` become others, or where experts are to be turned."""
    turned = any(getattr(module, "is_transposed", False) for module in model.modules())
    if not suits(checkpoint, device, transfer) or codes or turned:
        return False
    fused = {name: info.shape for name, info in checkpoint.metadata().items() if len(info.shape) == 3}
    if fused:
        names, shapes = Names(model), {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, shape in fused.items():
            found = names.find(name)
            if found is not None and found.expert is None and shapes.get(found.name, shape) != shape:
                return False
    return True


def copy_all(loader, tensors, names, stored=None, total=0, progress=None, reuses_memory=False):
    """Copy each tensor to where it belongs, inside the loader.

    Args:
        tensors: (name, tensor), taken one by one.
        names: `Names`, or what has its `find` and `may_be_dropped`.
        stored: name of FP8 codes -> what their scales cover, where shapes do not tell.
        total: bytes of all tensors; 0 where that is not known.
        progress: called with (bytes done, bytes in all, name).
        reuses_memory: a tensor may be overwritten once the next one is asked for.

    Raises:
        LoadError: of another shape, or without a place in the model.
    """
    model, stored = loader.model, stored or {}
    targets = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    unexpected, done = [], 0
    for name, tensor, scale in _with_scales(tensors, names, reuses_memory):
        done += tensor.nbytes
        destination = names.find(name)
        if destination is None:
            if not names.may_be_dropped(name):
                unexpected.append(name)
        else:
            with torch.no_grad():
                target = destination.of(targets[destination.name])
                if scale is None:
                    check_dtype(name, tensor.dtype, target.dtype)
                if scale is not None:
                    # There dequantizing, where it has to be, is fast, and the way there is a byte an element.
                    tensor, scale = tensor.to(loader.device), scale.to(loader.device)
                    loader.copy_codes(target, tensor, scale, stored.get(name))
                elif destination.turned or _is_turned(tensor, target):
                    if tensor.shape != target.mT.shape:
                        raise wrong_shape(name, tensor.shape, target.mT.shape)
                    for part, expert in zip(target, tensor, strict=True):
                        part.copy_(expert.to(loader.device).mT)  # turned there, for the host takes long
                else:
                    target.copy_(tensor if tensor.shape == target.shape else _lone_scale(name, tensor, target))
        if progress:
            progress(done, total or done, name)
    if unexpected:
        raise LoadError(
            f"the model has no place for {listed(unexpected)}; leave them out by passing an iterable without them"
        )


def _with_scales(tensors, names, reuses_memory):
    """Each (name, tensor, None); FP8 weights that the model holds no scale for as (name, codes, scale), once both have
    arrived. What has to wait is copied where its memory may be used again; codes without a scale come last, as they
    are."""
    codes, scales = {}, {}
    for name, tensor in tensors:
        base = next((name.removesuffix(s) for s in SCALE_SUFFIXES if name.endswith(s)), None)
        if base is not None and names.find(name) is None and names.find(base) is not None:
            _check_same(name, scales.get(base, (name, tensor))[1], tensor)
            scales[base] = name, tensor.clone() if reuses_memory and base not in codes else tensor
        elif tensor.dtype in FP8_DTYPES and all(names.find(name + s) is None for s in SCALE_SUFFIXES):
            _check_same(name, codes.get(name, tensor), tensor)
            base, codes[name] = name, tensor.clone() if reuses_memory and name not in scales else tensor
        else:
            yield name, tensor, None
            continue
        if base in codes and base in scales:
            yield base, codes.pop(base), scales.pop(base)[1]
    for name, tensor in [*codes.items(), *scales.values()]:
        yield name, tensor, None


def _check_same(name, held, tensor):
    """What waits for its partner may arrive again, but only as it was."""
    if held is not tensor and not (
        (held.shape, held.dtype) == (tensor.shape, tensor.dtype) and are_equal(held, tensor)
    ):
        raise ConflictingShardError(f"`{name}` arrived twice with different values, before its codes or its scale")


def _is_turned(tensor, target):
    """Are these experts as [E, in, out] where the model has them as [E, out, in]?"""
    return tensor.ndim == target.ndim == 3 and tensor.shape != target.shape and tensor.shape == target.mT.shape


def _lone_scale(name, tensor, target):
    """It is stored as `[1]`; it is `[]`, or covers all rows, in a module."""
    if tensor.numel() == 1 and "weight_scale" in name:
        return tensor.reshape(()).expand(target.shape)
    raise wrong_shape(name, tensor.shape, target.shape)


def names_to_quantize(plan: Plan) -> set[str]:
    """Names of the parameters that become FP8."""
    return {name for entry in plan.quantized for name in entry.names}


def not_runnable(model, plan: Plan) -> dict[str, str]:
    """Weights that would become FP8 in modules which `make_runnable` cannot replace -> why they do not."""
    # A model that is itself such a module has no parent in which to replace it.
    return {
        entry.name: f"nothing runs {type(entry.places[0].module).__name__} in FP8"
        for entry in plan.quantized
        if not all(can_run(place.module) and place.module is not model for place in entry.places)
    }


def known_maxima(model, checkpoint: Checkpoint, rules) -> dict[str, torch.Tensor]:
    """Parameter -> the maximum of its weight, or of each of its experts, where the checkpoint's sidecar tells all, and
    some weights become per_tensor."""
    if not any(
        isinstance(as_scheme(each), PerTensor) for each in (rules["scheme"], *(rules["schemes"] or {}).values())
    ):
        return {}
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
    # NaN and Inf are found, and named, where the weight arrives.
    return {n: amax for n, amax in found.items() if numel.get(n) == parameters[n].numel() and amax.isfinite().all()}


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
def no_collection():
    """Python's search for garbage cycles takes longer in a large process than a small load does; it waits."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _main_dtype(checkpoint):
    """The dtype that most high-precision elements of the checkpoint have."""
    sizes = Counter()
    for info in checkpoint.metadata().values():
        if info.dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes[info.dtype] += info.num_bytes
    return sizes.most_common(1)[0][0] if sizes else torch.bfloat16
