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
import importlib.util
import inspect
import logging
import pkgutil

import torch

from ..checkpoint import open_checkpoint, quantization_config, quantize_weights
from ..checkpoint.formats import as_format, family_of
from ..schemes import PerBlock, as_scheme, dtype_name
from .serving import CodesStayCodes, Serving

NAME = "fp8_kernels"
OPTIONS = ("scheme", "ignore", "include", "schemes", "format")
LOAD_FORMATS = ("auto", "safetensors", "fastsafetensors", "instanttensor")

_JOINED = "fused_qkv_a_proj_with_mqa"
# What SGLang's model classes fuse without saying so in a `packed_modules_mapping`.
_FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    _JOINED: ["q_a_proj", "kv_a_proj_with_mqa"],
}
_MARK = "_fp8_kernels"  # on a model: its `Serving`

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
    hooks = _hooks()
    _check_fits(hooks)
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
    from sglang.srt.layers import quantization
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, (hook, _) in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    if NAME not in QUANTIZATION_CHOICES:
        QUANTIZATION_CHOICES.append(NAME)
    for methods in (quantization.QUANTIZATION_METHODS, quantization.CPU_QUANTIZATION_METHODS):
        methods[NAME] = _method()
    _registered = True


def _hooks():
    """What is hooked -> (our hook, the parameters that it has in SGLang 0.5.23)."""
    loader = "sglang.srt.model_loader.loader"
    hooks = {
        f"{loader}.get_model_loader": (_model_loader, "load_config model_config"),
        f"{loader}._validate_default_loader_extra_config": (_extra_config, "extra_config load_format"),
        "sglang.srt.model_loader.weight_utils.get_quant_config": (
            _config,
            "model_config load_config packed_modules_mapping remap_prefix",
        ),
        f"{loader}.DefaultModelLoader._get_all_weights": (_weights, "self model_config model"),
        f"{loader}.DefaultModelLoader.load_weights_only": (_load_only, "model weights target_device"),
        f"{loader}.DefaultModelLoader.postprocess_weights": (_postprocess, "model target_device"),
    }
    updater = "sglang.srt.model_executor.model_runner_components.weight_updater"
    hooks[f"{updater}._model_load_weights_direct"] = (_direct, "model named_tensors")
    if importlib.util.find_spec("checkpoint_engine") is not None:  # SGLang's module for it imports it
        worker = "sglang.srt.checkpoint_engine.checkpoint_engine_worker.SGLangCheckpointEngineWorkerExtensionImpl"
        hooks[f"{worker}.get_post_hook"] = (_post_hook, "self")
    return hooks


def _check_fits(hooks):
    import sglang

    for target, (_, parameters) in hooks.items():
        try:
            found = " ".join(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (ImportError, AttributeError) as error:
            found = error
        if found != parameters:
            raise RuntimeError(
                f"`{target}` must take ({parameters}), as in SGLang 0.5.23, got ({found}) in {sglang.__version__}, "
                "which is not supported; `fp8-kernels quantize` writes a folder that every version loads"
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
    options_of(load_config.model_loader_extra_config)
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
    config = quantization_config(checkpoint, **options_of(load_config.model_loader_extra_config, checkpoint.metadata()))
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
    options = options_of(self.load_config.model_loader_extra_config, checkpoint.metadata())
    serving = Serving(model, options, _check_joined)
    setattr(model, _MARK, serving)
    serving.stream = quantize_weights(weights, **options, names=checkpoint.metadata(), device=serving.device)
    return _logged(serving.stream)


def _load_only(original, model, weights, target_device):
    """No codes where the model has no place for their scales."""
    serving = getattr(model, _MARK, None)
    with contextlib.nullcontext() if serving is None or serving.ready else CodesStayCodes(serving.stream):
        return original(model, weights, target_device)


def _postprocess(original, model, target_device):
    """Around the layouts that SGLang's kernels want, which it makes after a load, and must not make again of them."""
    serving = getattr(model, _MARK, None)
    if serving is None:
        return original(model, target_device)
    if not serving.ready:
        _check_scales_arrived(model)
        with serving.remembered():
            original(model, target_device)


def _direct(original, model, named_tensors):
    """`load_format="direct"` copies into parameters as they are: bf16 would become FP8 without its scale."""
    if hasattr(model, _MARK):
        params = dict(model.named_parameters())
        for name, tensor in named_tensors:
            if params[name].dtype == torch.float8_e4m3fn and tensor.dtype != torch.float8_e4m3fn:
                raise ValueError(f"`{name}` must be float8_e4m3fn for a direct load, got {dtype_name(tensor.dtype)}")
    return original(model, named_tensors)


def _post_hook(original, self):
    """The same after an update by the checkpoint engine, which goes over the layers by itself."""
    return (lambda: None) if hasattr(self.model_runner.model, _MARK) else original(self)


# What they need.


def options_of(extra_config, names=()) -> dict:
    """The arguments of `quantize_weights` that a `model_loader_extra_config` asks for.

    Args:
        extra_config: SGLang's, with ours under "fp8_kernels", or without.
        names: of the checkpoint's tensors. They decide on the format, where none is given: SGLang's models load 128x128
            blocks of linear layers as "compressed-tensors", not all of them as "fp8", and those of experts as "fp8".

    Raises:
        ValueError: an unknown option, scheme or format.
    """
    given = (extra_config or {}).get(NAME, {})
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        raise ValueError(f"`{NAME}` of --model-loader-extra-config must be of {OPTIONS}, got {unknown}")
    scheme = as_scheme(given.get("scheme", "per_channel"))
    blocks_of_experts = isinstance(scheme, PerBlock) and any(".experts." in name for name in names)
    options = {"format": "fp8" if blocks_of_experts else "compressed-tensors", **given, "scheme": scheme}
    as_format(options["format"])
    return options


def _check_joined(model, names):
    """DeepSeek's loader joins two weights, of one call alone, and forgets the one whose partner comes in another."""
    names, params = set(names), dict(model.named_parameters())
    for name in names:
        fused = name.replace(".q_a_proj.", f".{_JOINED}.").replace(".kv_a_proj_with_mqa.", f".{_JOINED}.")
        missing = [member for member in family_of(name) if member not in names]
        if _JOINED in fused and fused in params and missing:
            raise RuntimeError(f"`{name}` must come in one call with `{missing[0]}`; it has not been loaded")


def _check_scales_arrived(model):
    """SGLang fills scales with a negative number first, or with 1 those of experts, and only warns of tensors that a
    model has no place for."""
    for name, p in model.named_parameters():
        if "weight_scale" in name and p.numel() and (not bool((p > 0).all()) or bool((p == 1).all())):
            raise RuntimeError(
                f"`{name}` must have arrived, but {type(model).__name__} took no scale for it; another `format` or "
                "scheme may work"
            )


def _checkpoint(model_config, load_config):
    from sglang.srt.model_loader.loader import DefaultModelLoader

    loader = DefaultModelLoader(load_config)  # finds the folder, or downloads it, as the load itself will
    return open_checkpoint(loader._prepare_weights(model_config.model_path, model_config.revision, True)[0])


def _logged(stream):
    yield from stream
    logger.info("%s", stream.report)
