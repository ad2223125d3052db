"""What this package relies on in vLLM, checked against the one that is installed.

Public interfaces are told by the parameters of their functions. Where methods of vLLM are replaced, ours do what the
replaced ones did, so these must be ones that we have read: told by a digest of their source. What is another is refused
by name and never replaced.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import fields

TRIED = ("0.32.0", "0.33.0")

_COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"
_PLUGIN = {
    "vllm.model_executor.layers.quantization:register_quantization_config": ("quantization",),
    "vllm.model_executor.layers.quantization:_CUSTOMIZED_METHOD_TO_QUANT_CONFIG": None,
    "vllm.model_executor.layers.quantization.online.base:OnlineQuantizationConfig": None,
    "vllm.config:get_current_vllm_config_or_none": (),
    f"{_COMPRESSED}:CompressedTensorsConfig.from_config": ("config",),
    "vllm.model_executor.model_loader:register_model_loader": ("load_format",),
    "vllm.model_executor.model_loader:_LOAD_FORMAT_TO_MODEL_LOADER": None,
    "vllm.model_executor.model_loader:DefaultModelLoader.__init__": ("self", "load_config"),
    "vllm.model_executor.model_loader:DefaultModelLoader._prepare_weights": (
        "self",
        "model_name_or_path",
        "subfolder",
        "revision",
        "fall_back_to_pt",
        "allow_patterns_overrides",
    ),
    "vllm.model_executor.model_loader:DefaultModelLoader.get_all_weights": ("self", "model_config", "model"),
    "vllm.model_executor.model_loader:DefaultModelLoader.load_weights": ("self", "model", "model_config"),
    "vllm.model_executor.model_loader:DefaultModelLoader.load_model": ("self", "vllm_config", "model_config", "prefix"),
}
_ENGINE_ARGS = ("quantization", "load_format", "model_loader_extra_config")

# What we replace, undo or call with knowledge of its body -> digests of the sources that we have read.
_ONLINE = "vllm.model_executor.layers.quantization.online"
_RELOAD = "vllm.model_executor.model_loader.reload.layerwise"
_READ = {
    f"{_ONLINE}.base:OnlineQuantizationConfig.__init__": ("e88acb790009af0b",),
    f"{_ONLINE}.base:OnlineQuantizationConfig._get_method_cls": ("7324d2339e6660ad",),
    f"{_ONLINE}.base:OnlineQuantizationConfig.get_quant_method": ("20a3b61ff110b7ce",),
    f"{_ONLINE}.fp8:OnlineLinearBase.create_weights": ("0b2788df094cce19", "9204ff445b120cf3"),
    f"{_ONLINE}.moe_base:OnlineMoEMethodBase.create_weights": ("7c6fb50c8b5b7ae0", "f4abfca90359ba34"),
    f"{_ONLINE}.moe_base:OnlineMoEMethodBase._zero_padding": ("f5fa8657957ff8c2", "569b0aa60d0632c7"),
    f"{_ONLINE}.fp8:Fp8PerTensorOnlineLinearMethod.process_weights_after_loading": (
        "ba6d193b52cedb80",
        "411a76b830b57b07",
    ),
    f"{_ONLINE}.fp8:Fp8PerBlockOnlineLinearMethod.process_weights_after_loading": (
        "2077b2564b70b17b",
        "ffa29a69457ca29e",
    ),
    f"{_ONLINE}.fp8:Fp8PtpcOnlineLinearMethod.process_weights_after_loading": ("f497c6b585e38846",),
    f"{_ONLINE}.fp8:Fp8PerTensorOnlineMoEMethod.process_weights_after_loading": (
        "7f42354fdb35c3b8",
        "9283040ffc328515",
    ),
    f"{_ONLINE}.fp8:Fp8PerBlockOnlineMoEMethod.process_weights_after_loading": ("a6c8d92df239a569", "ec450a89215d2071"),
    f"{_ONLINE}.fp8:Fp8PtpcOnlineMoEMethod.process_weights_after_loading": ("5721d68af20bd831", "f014195ece691499"),
    f"{_ONLINE}.fp8:_Fp8OnlineMoEBase._setup_kernel": ("25b248095e9de92c",),
    f"{_ONLINE}.fp8:_is_tp_sharded": ("20a902379963a578",),
    f"{_ONLINE}.fp8:_fp8_max": ("ad925b97863ed083",),
    f"{_ONLINE}.fp8:_fp8_scale": ("b719bcf93930b9a0",),
    f"{_ONLINE}.fp8:_fp8_channel_scale": ("127fbd46bcaef9a1",),
    f"{_ONLINE}.fp8:_fp8_quant_per_channel": ("2839418f5ab62061",),
    "vllm.model_executor.layers.quantization.utils.quant_utils:amax_for_tp_weight_quant": ("49d570d15a0bf95d",),
    "vllm.model_executor.layers.quantization.utils.quant_utils:amax_for_moe_weight_quant": ("2467049a4bcbabf1",),
    "vllm.model_executor.layers.quantization.utils.quant_utils:get_fp8_min_max": ("ca29a0a182921b08",),
    "vllm.utils.deep_gemm:per_block_cast_to_fp8": ("59de8dd44ab888e3",),
    "vllm.model_executor.utils:replace_parameter": ("03dfde1d005fa6d1", "bfc577a20b1786fd"),
    f"{_RELOAD}:get_layerwise_info": ("382b7b58b7aa07a7",),
    f"{_RELOAD}:initialize_online_processing": ("ccbfd7d0dd5de698",),
    f"{_RELOAD}:_get_original_loader": ("a4ac0fb84cd78b75",),
    f"{_RELOAD}:finalize_layerwise_processing": ("28b7e8c6ecc74ab4",),
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model": ("9d0541705931cff6",),
    "vllm.model_executor.model_loader.base_loader:_has_online_quant": ("15a7f384ffa66a1d",),
}


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one that this part of the package knows."""


def logger():
    """vLLM's logger for us: it shows only loggers of its own name."""
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.fp8_kernels")


def why_not_plugin() -> str | None:
    """What keeps the quantization method and the loader from fitting the installed vLLM; None if nothing does."""
    return _wrong([_signature_problem(path, parameters) for path, parameters in _PLUGIN.items()])


def why_not_engine_args(engine_args: type) -> str | None:
    """What keeps the load format from being chosen by the quantization; None if nothing does."""
    known = {option.name for option in fields(engine_args)}
    missing = [f"`EngineArgs.{name}` is not there" for name in _ENGINE_ARGS if name not in known]
    method = getattr(engine_args, "create_load_config", None)
    if method is None or list(inspect.signature(method).parameters) != ["self"]:
        missing.append("`EngineArgs.create_load_config(self)` is not there")
    return _wrong(missing)


def check_online() -> None:
    """Raise UnsupportedVllmError unless vLLM's online FP8 schemes are ones that we know how to stand in for."""
    found = []
    for path, known in _READ.items():
        target = _find(path)
        if target is None:
            found.append(f"`{path.partition(':')[2]}` is not there")
        elif digest(target) not in known:
            found.append(f"`{path.partition(':')[2]}` is another one ({digest(target)})")
    problem = _wrong(found)
    if problem is not None:
        raise UnsupportedVllmError(
            f"{problem}. Its own FP8 schemes cannot be loaded with load_format='fp8_kernels': leave that out, "
            "or use quantization='fp8_kernels'"
        )


def digest(function) -> str:
    """Of the source of a function, without comments and blank lines."""
    lines = (line.strip() for line in inspect.getsource(function).splitlines())
    kept = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


def _signature_problem(path, parameters):
    target, name = _find(path), path.partition(":")[2]
    if target is None:
        return f"`{name}` is not there"
    if parameters is not None and tuple(inspect.signature(target).parameters) != parameters:
        return f"`{name}` takes other arguments"
    return None


def _find(path):
    module, _, names = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    for name in names.split("."):
        found = getattr(found, name, None)
    return found


def _wrong(problems: Iterable[str | None]) -> str | None:
    problems = [problem for problem in problems if problem]
    if not problems:
        return None
    import vllm

    return f"vLLM {vllm.__version__} is not one that fp8_kernels knows ({', '.join(TRIED)}): {'; '.join(problems)}"
