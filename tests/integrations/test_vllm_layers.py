"""vLLM's own parallel layers and weight loaders inside a LayerwiseLoader, as each of four ranks: every byte is that of
loading plainly and quantizing after."""

import pytest
import torch

from .vllm_env import as_rank, current, engine_config, make_model, without_moe_backend  # isort: skip

from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

import fp8_kernels as fk
from fp8_kernels.testing import assert_same_bits

SIZE = 4
SCHEMES = ("per_tensor", "per_channel", "per_block")
BF16 = torch.bfloat16


def w(*shape):
    return (torch.randn(shape) * torch.rand(shape[:-1]).unsqueeze(-1)).to(BF16)


def qkv(heads, kv_heads):
    shards = [(("weight", w(n * 32, 264)), (s,)) for s, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
    shards += [(("bias", w(n * 32)), (s,)) for s, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
    return lambda: QKVParallelLinear(264, 32, heads, kv_heads, bias=True, params_dtype=BF16, prefix="qkv"), shards


def merged():
    shards = [(("weight", w(n, 200)), (i,)) for i, n in enumerate((512, 512, 64))]
    return lambda: MergedColumnParallelLinear(200, [512, 512, 64], bias=False, params_dtype=BF16), shards


def merged_whole():
    """A checkpoint that has the fused weight in one piece, which the loader cuts into its shards."""
    shards = [(("weight", w(1024, 200)), ())]
    return lambda: MergedColumnParallelLinear(200, [512, 512], bias=False, params_dtype=BF16), shards


def column():
    return lambda: ColumnParallelLinear(136, 520, bias=False, params_dtype=BF16), [(("weight", w(520, 136)), ())]


def row():
    return lambda: RowParallelLinear(1024, 72, bias=False, params_dtype=BF16), [(("weight", w(72, 1024)), ())]


def replicated():
    return lambda: ReplicatedLinear(72, 136, bias=False, params_dtype=BF16), [(("weight", w(136, 72)), ())]


def embedding(kind):
    """Padded to a multiple of 64 rows a rank: the last rank holds rows that no checkpoint has."""
    return lambda: kind(997, 96, params_dtype=BF16), [(("weight", w(997, 96)), ())]


def experts(**settings):
    """Each expert's three shards; under tensor parallelism a quarter of its intermediate size, else whole experts."""
    shards = []
    for expert in range(8):
        for shard, shape in (("w1", (512, 136)), ("w2", (136, 512)), ("w3", (512, 136))):
            leaf = "w2_weight" if shard == "w2" else "w13_weight"
            shards.append(((leaf, w(*shape)), (f"experts.{leaf}", shard, expert)))

    def build():
        names = dict(num_experts=8, top_k=2, hidden_size=136, intermediate_size=512, params_dtype=BF16)
        return FusedMoEFactory(**names, prefix=f"moe{torch.randint(1 << 60, ()).item()}", **settings).routed_experts

    return build, shards


LAYERS = {
    "qkv": lambda: qkv(8, 4),
    "qkv_with_fewer_kv_heads_than_ranks": lambda: qkv(8, 2),
    "merged": merged,
    "merged_whole": merged_whole,
    "column": column,
    "row": row,
    "replicated": replicated,
    "embedding": lambda: embedding(VocabParallelEmbedding),
    "head": lambda: embedding(ParallelLMHead),
    "experts": experts,
    "experts_expert_parallel": experts,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """vLLM's config of a model that has experts."""
    return engine_config(make_model(tmp_path_factory.mktemp("moe"), "qwen3_moe"))


def load(layer, shards):
    parameters = dict(layer.named_parameters())
    for (leaf, tensor), arguments in shards:
        loader = getattr(parameters[leaf], "weight_loader", default_weight_loader)
        loader(parameters[leaf], tensor, *arguments)


def on_meta(layer):
    """The layer with its parameters on meta, of the same classes and with the same loaders, by vLLM's own means."""
    for leaf, parameter in list(layer._parameters.items()):
        if parameter is not None:
            layer.register_parameter(leaf, to_meta_tensor(parameter))
    return layer


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rank", range(SIZE))
@pytest.mark.parametrize("kind", LAYERS)
def test_ranks_hold_what_loading_and_quantizing_after_gives(config, monkeypatch, kind, rank, scheme):
    """Shards in a random order; biases, padding and experts of other ranks included."""
    without_moe_backend(monkeypatch)
    build, shards = LAYERS[kind]()
    config.parallel_config.enable_expert_parallel = kind == "experts_expert_parallel"
    with current(config), as_rank(rank, SIZE):
        plain, layer = build(), on_meta(build())
        load(plain, shards)
        shuffled = [shards[i] for i in torch.randperm(len(shards))]
        with fk.LayerwiseLoader(layer, scheme, device="cpu", include=["*weight"]):
            load(layer, shuffled)
    weights = [leaf for leaf, t in plain.named_parameters() if leaf.endswith("weight")]
    assert weights and len(weights) == len([t for t in layer.parameters() if t.dtype == torch.float8_e4m3fn])
    for leaf, t in plain.named_parameters():
        held = layer.get_parameter(leaf)
        if leaf in weights:
            q, scale = fk.quantize(t.data, scheme)
            assert_same_bits(held.data, q, leaf)
            assert_same_bits(layer.get_parameter(f"{leaf}_scale").data, scale, f"{leaf}_scale")
        else:
            assert_same_bits(held.data, t.data, leaf)
    if kind.startswith("experts"):
        num_experts, num_rows, _ = layer.w13_weight.shape
        assert (num_experts, num_rows) == ((2, 1024) if kind == "experts_expert_parallel" else (8, 256))
