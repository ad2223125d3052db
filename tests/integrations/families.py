"""Tiny random models of the families that `Fp8KernelsConfig` is tried with."""

import torch

from ..models import EXPERTS, HEADS, SIZES, random_model, tiny_llama, tiny_mixtral, tiny_qwen3_moe


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 192, "ffn_dim": 320, "num_hidden_layers": 2, "vocab_size": 160}
    sizes |= {"num_attention_heads": 4, "word_embed_proj_dim": 192, "max_position_embeddings": 64}
    return random_model(OPTForCausalLM, OPTConfig(**sizes))


def granite_moe():
    """Its checkpoint holds all experts in one tensor."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return random_model(GraniteMoeForCausalLM, GraniteMoeConfig(**SIZES | heads | experts))


def qwen2_moe():
    """With a shared expert, and biases in attention."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    shared = {"shared_expert_intermediate_size": 160, "decoder_sparse_step": 1}
    return random_model(Qwen2MoeForCausalLM, Qwen2MoeConfig(**SIZES | heads | EXPERTS | shared))


def deepseek_v3():
    """Attention over latents (MLA), one dense layer before the experts, a bias of the router that stays float32."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    latents = {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_shared_experts": 1}
    routing = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = random_model(DeepseekV3ForCausalLM, DeepseekV3Config(**SIZES | heads | latents | experts | routing))
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.data = torch.rand(bias.shape) / 8  # float32, of values that bfloat16 has not
    return model


def gpt_oss():
    """Experts as [E, in, out] with biases, gate and up in turns."""
    from transformers import GptOssConfig, GptOssForCausalLM

    heads = HEADS | {"head_dim": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return random_model(GptOssForCausalLM, GptOssConfig(**SIZES | heads | experts | layers))


FAMILIES = {
    "llama": tiny_llama,
    "opt": opt,
    "granite_moe": granite_moe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": tiny_qwen3_moe,
    "mixtral": tiny_mixtral,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}
