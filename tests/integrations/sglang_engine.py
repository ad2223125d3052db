"""SGLang's own loader and models in this process, on a CPU: what its wheel can run without a GPU.

Its kernels cannot, so nothing here multiplies. It is told that the device is a GPU of compute capability 9.0, by which
it chooses layouts; parallel groups are over gloo.
"""

import importlib.machinery
import importlib.util
import sys
import tempfile
import types

import torch

_DEVICE = "cpu"


def declare_image_ops():
    """torchvision, which SGLang imports, comes from PyPI for CUDA alone; without its library it misses these names."""
    for op in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, op):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def declare_foreign_kernels():
    """Where SGLang knows no kernels for a device it names vLLM's as it builds a model; nothing here calls them."""
    if importlib.util.find_spec("vllm") is None:
        for name in ("vllm", "vllm._custom_ops"):
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "vllm")
        module.rotary_embedding = None


def start(rank=0, world=1, rendezvous=None, ep_size=1):
    """A tensor-parallel rank, with whole experts or parts of them, as SGLang's scheduler process starts it; returns a
    function that ends it."""
    declare_foreign_kernels()
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import derive_spawn_ranks, get_context, get_parallel

    from fp8_kernels.integrations import sglang as integration

    integration.register()
    HookRegistry.apply_hooks()
    published = get_context().override_server_args(device=_DEVICE, tp_size=world, ep_size=ep_size)
    published.install()
    folder = tempfile.TemporaryDirectory()
    method = f"file://{rendezvous or folder.name}/rendezvous"
    init_distributed_environment(
        world_size=world, rank=rank, local_rank=rank, backend="gloo", distributed_init_method=method
    )
    sizes = {"tp_size": world, "attn_cp_size": 1, "attn_tp_size": world, "moe_dp_size": 1, "moe_ep_size": ep_size}
    get_parallel().override_permanently(**derive_spawn_ranks(world_rank=rank, ep_join_rank_offset=0, **sizes))
    initialize_model_parallel(backend="gloo")

    def end():
        torch.distributed.destroy_process_group()
        published.restore()
        folder.cleanup()

    return end


def loader_of(folder, quantization=None, load_format="auto", **options):
    """(SGLang's loader for that folder, its config of the model)."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader

    config = ModelConfig(model_path=str(folder), dtype="bfloat16", quantization=quantization)
    extra = {"fp8_kernels": options} if options else {}
    # By its module: hooks replace what is found there.
    return loader.get_model_loader(LoadConfig(load_format=load_format, model_loader_extra_config=extra), config), config


def load(folder, quantization=None, **options):
    """The model as SGLang's process has it before the first request."""
    from sglang.srt.configs.device_config import DeviceConfig

    loader, config = loader_of(folder, quantization, **options)
    return loader.load_model(model_config=config, device_config=DeviceConfig(_DEVICE))


def load_without_layouts(folder, quantization=None, **options):
    """The model after its loading and before layouts for kernels, some of which a CPU cannot make."""
    from sglang.srt.configs.device_config import DeviceConfig

    loader, config = loader_of(folder, quantization, **options)
    model = loader.initialize_model_for_startup(model_config=config, device_config=DeviceConfig(_DEVICE))
    loader.load_weights_only(model, loader._get_all_weights(config, model), torch.device(_DEVICE))
    return model
