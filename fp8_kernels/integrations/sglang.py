"""SGLang loads bf16 checkpoints as FP8: `sglang serve MODEL --quantization fp8_kernels`.

SGLang finds `register` by the entry point `sglang.srt.plugins` and calls it in each of its processes. It then builds
the model as for the folder that `fp8-kernels quantize` would write, and its own weight loading is given that folder's
tensors, made one by one from the bf16 ones as they are asked for. Options go into SGLang's own:

    --model-loader-extra-config '{"fp8_kernels": {"scheme": "per_block", "ignore": ["model.layers.0.*"]}}'

with `scheme`, `ignore`, `include`, `schemes` and `format` as for `quantize_weights`.

New weights for a serving model (`update_weights_from_tensor`, `_distributed`, `_ipc`, `_disk`) are taken in the
checkpoint's precision too, and go into the memory that the model has.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import pkgutil

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..checkpoint import open_checkpoint, quantization_config, quantize_weights
from ..checkpoint.formats import as_format
from ..loading.report import Report
from ..schemes import PerBlock, as_scheme

NAME = "fp8_kernels"
OPTIONS = ("scheme", "ignore", "include", "schemes", "format")
LOAD_FORMATS = ("auto", "safetensors", "fastsafetensors", "instanttensor")

_LOADER = "sglang.srt.model_loader.loader"
# What is hooked, with the parameters it has in the SGLang that this was written for (0.5.23).
_HOOKED = {
    f"{_LOADER}.DefaultModelLoader._get_all_weights": ("self", "model_config", "model"),
    f"{_LOADER}.DefaultModelLoader.postprocess_weights": ("model", "target_device"),
    f"{_LOADER}._validate_default_loader_extra_config": ("extra_config", "load_format"),
    f"{_LOADER}.get_model_loader": ("load_config", "model_config"),
    "sglang.srt.model_loader.weight_utils.get_quant_config": (
        "model_config",
        "load_config",
        "packed_modules_mapping",
        "remap_prefix",
    ),
}
# What SGLang's model classes fuse without saying so in a `packed_modules_mapping`.
_FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"],
}
_MARK = "_fp8_kernels"  # on a model: its `_Serving`

logger = logging.getLogger(__name__)
_registered = False


def register() -> None:
    """Make SGLang know the quantization method `fp8_kernels`. Once a process; more calls change nothing.

    Raises:
        RuntimeError: the installed SGLang is not one that this fits; nothing has been changed. (SGLang logs it.)
    """
    global _registered
    if _registered:
        return
    _check_fits()
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
    from sglang.srt.layers import quantization
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in zip(_HOOKED, (_weights, _postprocess, _extra_config, _model_loader, _config), strict=True):
        HookRegistry.register(target, hook, HookType.AROUND)
    if NAME not in QUANTIZATION_CHOICES:
        QUANTIZATION_CHOICES.append(NAME)
    for methods in (quantization.QUANTIZATION_METHODS, quantization.CPU_QUANTIZATION_METHODS):
        methods[NAME] = _method()
    _registered = True


def _check_fits():
    import sglang

    for target, parameters in _HOOKED.items():
        try:
            found = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (ImportError, AttributeError) as error:
            found = error
        if found != parameters:
            raise RuntimeError(
                f"This does not fit SGLang {sglang.__version__}: `{target}` must take {parameters}, got {found}. "
                "It was written for SGLang 0.5.23; `fp8-kernels quantize` writes a folder that every version loads"
            )


@functools.cache
def _method():
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    class Fp8KernelsConfig(CompressedTensorsConfig):
        """What `fp8_kernels` stands for: SGLang's own configs, of the format that the checkpoint is turned into."""

        @classmethod
        def from_config(cls, config):
            made = Fp8Config if config["quant_method"] == "fp8" else CompressedTensorsConfig
            return made.from_config(config)

    return Fp8KernelsConfig


# The hooks. SGLang calls each with what it has wrapped and that function's arguments.


def _extra_config(original, *, extra_config, load_format):
    """Our options are none of those that SGLang refuses."""
    return original(extra_config={k: v for k, v in extra_config.items() if k != NAME}, load_format=load_format)


def _model_loader(original, load_config, model_config=None):
    """Only the loader whose weights are wrapped: any other would put bf16 values into FP8 memory, unscaled."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    ours = model_config is not None and model_config.quantization == NAME
    if not ours:
        if NAME in (load_config.model_loader_extra_config or {}):
            raise ValueError(f"options for {NAME!r} must come with --quantization {NAME}")
        return original(load_config, model_config)
    _options(load_config)
    load_format = getattr(load_config.load_format, "value", load_config.load_format)
    loader = original(load_config, model_config)
    if type(loader) is not DefaultModelLoader or load_format not in LOAD_FORMATS:
        raise ValueError(f"with --quantization {NAME} `load_format` must be one of {LOAD_FORMATS}, got {load_format!r}")
    return loader


def _config(original, model_config, load_config, packed_modules_mapping, remap_prefix=None):
    """The config that the folder would have, told from the headers of its tensors."""
    if model_config.quantization != NAME:
        return original(model_config, load_config, packed_modules_mapping, remap_prefix)
    checkpoint = _checkpoint(model_config, load_config)
    config = quantization_config(checkpoint, **_options(load_config, checkpoint.metadata()))
    for group in config.get("config_groups", {}).values():
        if group["weights"]["strategy"] == "tensor":  # SGLang has experts with one scale for these activations only
            group["input_activations"]["strategy"] = "tensor"
    return _method().from_config({**config, "packed_modules_mapping": {**_FUSED, **packed_modules_mapping}})


def _weights(original, self, model_config, model):
    """The stream of weights, quantized on the device that the model is on."""
    weights = original(self, model_config, model)
    if model_config.quantization != NAME:
        return weights
    checkpoint = _checkpoint(model_config, self.load_config)
    options = _options(self.load_config, checkpoint.metadata())
    setattr(model, _MARK, _Serving(model, options))
    return _logged(quantize_weights(weights, **options, names=checkpoint.metadata(), device=_device(model)))


def _postprocess(original, model, target_device):
    """Around the layouts that SGLang's kernels want, which it makes after a load, and must not make again of them."""
    serving = getattr(model, _MARK, None)
    if serving is None:
        return original(model, target_device)
    if not serving.ready:
        _check_scales_arrived(model)
        with serving.remembered():
            original(model, target_device)


# What they need.


def _options(load_config, names=()) -> dict:
    """What the user gave, checked, and the format: SGLang's models load 128x128 blocks of linear layers as
    "compressed-tensors", not all of them as "fp8", and those of experts as "fp8"."""
    given = (load_config.model_loader_extra_config or {}).get(NAME, {})
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        raise ValueError(f"`{NAME}` of --model-loader-extra-config must be of {OPTIONS}, got {unknown}")
    scheme = as_scheme(given.get("scheme", "per_channel"))
    blocks_of_experts = isinstance(scheme, PerBlock) and any(".experts." in name for name in names)
    options = {"format": "fp8" if blocks_of_experts else "compressed-tensors", **given, "scheme": scheme}
    as_format(options["format"])
    return options


def _check_scales_arrived(model):
    """SGLang fills scales with a negative number first, and only warns of tensors that a model has no place for."""
    for name, p in model.named_parameters():
        if "weight_scale" in name and not bool((p > 0).all()):
            raise RuntimeError(
                f"`{name}` must have arrived, but {type(model).__name__} took no scale for it; another `format` or "
                "scheme may work"
            )


def _checkpoint(model_config, load_config):
    from sglang.srt.model_loader.loader import DefaultModelLoader

    loader = DefaultModelLoader(load_config)  # finds the folder, or downloads it, as the load itself will
    return open_checkpoint(loader._prepare_weights(model_config.model_path, model_config.revision, True)[0])


def _device(model):
    return next(model.parameters()).device


def _logged(stream):
    yield from stream
    logger.info("%s", stream.report)


class _Serving:
    """A model whose weights came through here: how they are loaded again, into the memory they have.

    SGLang's kernels want other shapes than its loaders, mostly views of the same memory. While new weights arrive,
    parameters as the loaders know them are in their places, over the memory that serves.
    """

    def __init__(self, model, options):
        self.model, self.options, self.ready = model, options, False
        self.report = Report()  # of the last update
        self._replaced: list[tuple[torch.nn.Module, str, _Loaded]] = []
        self._moved: list[str] = []

    @contextlib.contextmanager
    def remembered(self):
        """Around SGLang's post-processing of the first load."""
        loaded = [
            (f"{name}.{leaf}", module, leaf, _Loaded(p), p.detach().clone() if "scale" in leaf else None)
            for name, module in self.model.named_modules()
            for leaf, p in module.named_parameters(recurse=False)
        ]
        yield
        for name, module, leaf, parameter, scales in loaded:
            found = module._parameters.get(leaf)
            if not parameter.is_served_by(found) or not parameter.holds(scales, found):
                self._moved.append(name)
            elif id(found) != parameter.identity:
                self._replaced.append((module, leaf, parameter))
        self.model.load_weights = functools.partial(self.update, self.model.load_weights)
        self.ready = True

    def update(self, load, weights, *args, **kwargs):
        """`model.load_weights` of a serving model: all or some of its weights, in the checkpoint's precision."""
        if self._moved:
            raise RuntimeError(
                f"`{self._moved[0]}` ({len(self._moved)} in all) must lie where it was loaded to take new weights, but "
                f"SGLang made another tensor of it for its kernels; the model has to be loaded again"
            )
        stream = quantize_weights(weights, **self.options, partial=True, device=_device(self.model))
        served = [(module, leaf, module._parameters[leaf]) for module, leaf, _ in self._replaced]
        try:
            for module, leaf, parameter in self._replaced:
                module._parameters[leaf] = parameter.over(module._parameters[leaf])
            result = load(stream, *args, **kwargs)
        finally:
            for module, leaf, parameter in served:
                module._parameters[leaf] = parameter
        self.report = stream.report
        return result


class _Loaded:
    """A parameter as SGLang's loaders fill it, without its memory, which may be given back when kernels want a copy."""

    def __init__(self, parameter):
        self.identity = id(parameter)
        self._kind, self._attributes = type(parameter), dict(vars(parameter))
        self._layout, self._dtype = _layout(parameter), parameter.dtype
        self._storage = StorageWeakRef(parameter.untyped_storage())

    def is_served_by(self, found):
        """Is this the same memory?"""
        if found is None or found.untyped_storage()._cdata != self._storage.cdata or found.dtype != self._dtype:
            return False
        return id(found) != self.identity or _layout(found) == self._layout

    def holds(self, values, found):
        """Are scales the same values? Blocks that kernels want with powers of two are quantized again in place."""
        return values is None or torch.equal(found.detach().as_strided(*self._layout), values)

    def over(self, served):
        """The parameter, over the memory of the one that serves."""
        made = torch.Tensor._make_subclass(self._kind, served.detach().as_strided(*self._layout), False)
        made.__dict__.update(self._attributes)
        return made


def _layout(t):
    return t.shape, t.stride(), t.storage_offset()
