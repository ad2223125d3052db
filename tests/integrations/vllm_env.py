"""vLLM inside the test's own process: config, process groups, tiny models, and what a machine may lack of it."""

import contextlib
import importlib.util
import os
import tempfile
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip(
    "vllm", reason="vLLM is not installed; run `make test-vllm`, which makes an environment for it"
)

from vllm import platforms  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

if not platforms.current_platform.device_type:
    platforms._current_platform = CpuPlatform()  # a wheel for GPUs finds no platform here; before anyone asks for it

from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402

from fp8_kernels.integrations.vllm import register  # noqa: E402

HAS_KERNELS = importlib.util.find_spec("vllm._C") is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="this vLLM comes without its compiled part")
needs_block_kernels = pytest.mark.skipif(
    not (HAS_KERNELS and torch.cpu._is_amx_tile_supported()),
    reason="vLLM's CPU kernels for blocks need its compiled part and a processor with AMX",
)
COMMON = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
    max_position_embeddings=128,
)
MOE = dict(moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2)


def make_model(folder, kind="llama", seed=0):
    """A folder with a tiny random bf16 checkpoint: llama, qwen2 (with biases) or qwen3_moe."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3_moe": "Qwen3Moe"}[kind]
    settings = COMMON | (MOE if kind == "qwen3_moe" else {})
    if kind == "qwen2":
        del settings["head_dim"]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))  # biases and norms too
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    return folder


def engine_config(folder, **options):
    """vLLM's config for that folder, as `LLM(folder, **options)` makes it."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, "dtype": "bfloat16"} | options
    register()
    return EngineArgs(model=str(folder), **options).create_engine_config()


def start_groups(rank=0, world_size=1, rendezvous=None):
    """vLLM's process groups, once in a process; also that of experts, which it makes only where it knows no model."""
    if parallel_state.model_parallel_is_initialized():
        return
    rendezvous = rendezvous or f"file://{tempfile.mkdtemp()}/rendezvous"
    os.environ.setdefault("VLLM_DIST_IDENT", rendezvous.replace("/", "_"))  # vLLM's CPU worker sets it
    with set_current_vllm_config(VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=world_size))):
        parallel_state.init_distributed_environment(world_size, rank, rendezvous, rank, "gloo")
        parallel_state.initialize_model_parallel(world_size)


@contextlib.contextmanager
def current(config):
    """vLLM's surroundings for building layers: this config, bf16 by default."""
    before = torch.get_default_dtype()
    start_groups()
    with set_current_vllm_config(config), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def as_rank(rank, size):
    """Let vLLM's layers believe that they are one rank of a tensor parallel group; nothing may be sent in it."""
    real = {name: getattr(parallel_state, name) for name in ("_TP", "_EP")}
    group = SimpleNamespace(rank_in_group=rank, rank=rank, world_size=size, device_group=None, cpu_group=None)
    for name in real:
        setattr(parallel_state, name, group)
    try:
        yield
    finally:
        for name, group in real.items():
            setattr(parallel_state, name, group)


def load_model(config, processed=True):
    """The model as vLLM loads it; without its kernels' layouts where `processed` is False."""
    from vllm.model_executor.model_loader import base_loader, get_model

    with current(config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's CPU worker does
        if not processed:
            patch.setattr(base_loader, "process_weights_after_loading", lambda *args: None)
        return get_model(vllm_config=config)


def tensors(module):
    """Name -> every parameter and buffer."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def without_moe_backend(patch):
    """Build experts also where vLLM has no kernel for them on a CPU: they are loaded here and not run."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method

    backend = method.UnquantizedMoeBackend.CPU
    patch.setattr(method, "select_unquantized_moe_backend", lambda moe_config: (backend, None))
    gpu = type("Gpu", (type(config.current_platform),), {"is_xpu": lambda self: True})
    patch.setattr(config, "current_platform", gpu())  # without a gate it refuses a CPU


def without_compiled_ops(patch):
    """Take vLLM's compiled kernels, which this machine has not, out of its online FP8 methods.

    What quantizes becomes its definition in torch, as a GPU computes it; what lays out for a GEMM leaves all as it is.
    """
    from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle
    from vllm.model_executor.layers.quantization.online import fp8

    def scaled_fp8_quant(x, scale=None, use_per_token_if_dynamic=False):
        if scale is None:
            scale = (x.abs().amax(dim=-1, keepdim=True).float() / 448).clamp_min(1 / (448 * 512))
            return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale
        return (x.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    kernel = SimpleNamespace(process_weights_after_loading=lambda layer: None)
    patch.setattr(fp8, "init_fp8_linear_kernel", lambda **settings: kernel)
    patch.setattr(fp8, "expose_input_quant_key", lambda layer, kernel: None)
    patch.setattr(fp8.ops, "scaled_fp8_quant", scaled_fp8_quant)
    blocks_as_on_a_gpu(patch)
    as_it_is = ("w13", "w2", "w13_scale", "w2_scale")
    patch.setattr(oracle, "convert_to_fp8_moe_kernel_format", lambda **given: tuple(given[name] for name in as_it_is))
    patch.setattr(oracle, "make_fp8_moe_quant_config", lambda **settings: None)


def blocks_as_on_a_gpu(patch):
    """Let vLLM's per_block, which is torch code, compute on the CPU what it computes on a GPU: `x / 448` by the
    reciprocal of the number. `numerics="vllm"` is that."""
    from vllm.model_executor.layers.quantization.online import fp8

    def per_block_cast_to_fp8(x, block_size, use_ue8m0):
        num_rows, num_cols = (-(-size // block) for size, block in zip(x.shape, block_size, strict=True))
        padded = x.new_zeros(num_rows * 128, num_cols * 128)
        padded[: x.shape[0], : x.shape[1]] = x
        blocks = padded.view(num_rows, 128, num_cols, 128)
        reciprocal = torch.ones((), dtype=torch.float32) / 448
        scale = blocks.abs().float().amax(dim=(1, 3), keepdim=True).clamp(1e-4) * reciprocal
        codes = (blocks * (1.0 / scale)).to(torch.float8_e4m3fn).view_as(padded)
        return codes[: x.shape[0], : x.shape[1]].contiguous(), scale.view(num_rows, num_cols)

    patch.setattr(fp8, "per_block_cast_to_fp8", per_block_cast_to_fp8)
