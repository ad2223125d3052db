"""A model in the style of nano-vLLM: parallel layers whose parameters carry a `weight_loader`, and its loading loop.

Each rank makes its part of every layer; the loop goes over all names of the checkpoint, on every rank.
"""

import torch
from torch import nn

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 24
HIDDEN, INTERMEDIATE, EXPERTS, EXPERT_INTERMEDIATE = 72, 136, 4, 40
VOCAB, VOCAB_BLOCK, LAYERS = 50, 8, 4  # the vocabulary is padded to a multiple of 8 rows for each rank

PACKED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class Ranks:
    """Where this rank stands: its index and the number of ranks in each dimension."""

    def __init__(self, tp=(0, 1), pp=(0, 1), ep=(0, 1)):
        (self.tp_rank, self.tp_size), (self.pp_rank, self.pp_size), (self.ep_rank, self.ep_size) = tp, pp, ep

    def part(self, size):
        assert size % self.tp_size == 0
        return size // self.tp_size


def weight(loader, *shape):
    parameter = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)
    parameter.weight_loader = loader
    return parameter


def default_weight_loader(param, loaded_weight):
    param.data.copy_(loaded_weight)


class MergedColumnParallel(nn.Module):
    """A part of the rows of each of its shards, one below the other."""

    def __init__(self, ranks, columns, sizes):
        super().__init__()
        self.ranks, self.sizes = ranks, {shard: ranks.part(size) for shard, size in sizes.items()}
        self.weight = weight(self.weight_loader, sum(self.sizes.values()), columns)

    def weight_loader(self, param, loaded_weight, shard_id):
        offset = sum(size for shard, size in self.sizes.items() if shard < shard_id)
        param_data = param.data.narrow(0, offset, self.sizes[shard_id])
        param_data.copy_(loaded_weight.chunk(self.ranks.tp_size, 0)[self.ranks.tp_rank])


class QKVParallel(nn.Module):
    """Heads of q are dealt to the ranks; so are those of k and v, or several ranks have the same one."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks, self.num_heads = ranks, ranks.part(HEADS)
        self.num_kv_heads = max(1, KV_HEADS // ranks.tp_size)
        self.copies = max(1, ranks.tp_size // KV_HEADS)
        rows = (self.num_heads + 2 * self.num_kv_heads) * HEAD_DIM
        self.weight = weight(self.weight_loader, rows, HIDDEN)

    def weight_loader(self, param, loaded_weight, shard_id):
        heads = self.num_heads if shard_id == "q" else self.num_kv_heads
        rank = self.ranks.tp_rank if shard_id == "q" else self.ranks.tp_rank // self.copies
        offset = {"q": 0, "k": self.num_heads, "v": self.num_heads + self.num_kv_heads}[shard_id]
        loaded_weight = loaded_weight.narrow(0, rank * heads * HEAD_DIM, heads * HEAD_DIM)
        param.data.narrow(0, offset * HEAD_DIM, heads * HEAD_DIM).copy_(loaded_weight)


class RowParallel(nn.Module):
    """A part of the columns."""

    def __init__(self, ranks, columns, rows):
        super().__init__()
        self.ranks = ranks
        self.weight = weight(self.weight_loader, rows, ranks.part(columns))

    def weight_loader(self, param, loaded_weight):
        size = param.shape[1]
        param.data.copy_(loaded_weight.narrow(1, self.ranks.tp_rank * size, size))


class Replicated(nn.Module):
    def __init__(self, columns, rows):
        super().__init__()
        self.weight = weight(default_weight_loader, rows, columns)


class VocabParallel(nn.Module):
    """A run of the padded vocabulary's rows; what lies beyond the vocabulary is zero."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks, self.rows = ranks, -(-VOCAB // (VOCAB_BLOCK * ranks.tp_size)) * VOCAB_BLOCK
        self.weight = weight(self.weight_loader, self.rows, HIDDEN)

    def weight_loader(self, param, loaded_weight):
        loaded_weight = loaded_weight[self.ranks.tp_rank * self.rows :][: self.rows]
        param.data[: len(loaded_weight)].copy_(loaded_weight)
        param.data[len(loaded_weight) :].fill_(0)


class ParallelExperts(nn.Module):
    """Some of the experts; of each a part of its intermediate dimension."""

    def __init__(self, ranks):
        super().__init__()
        num_local, size = EXPERTS // ranks.ep_size, ranks.part(EXPERT_INTERMEDIATE)
        self.ranks, self.first, self.size = ranks, ranks.ep_rank * num_local, size
        self.w13_weight = weight(self.weight_loader, num_local, 2 * size, HIDDEN)
        self.w2_weight = weight(self.weight_loader, num_local, HIDDEN, size)

    def weight_loader(self, param, loaded_weight, shard_id, expert):
        if not 0 <= expert - self.first < len(param):
            return
        param_data, start = param.data[expert - self.first], self.ranks.tp_rank * self.size
        if shard_id == "down_proj":
            param_data.copy_(loaded_weight.narrow(1, start, self.size))
        else:
            param_data = param_data.narrow(0, 0 if shard_id == "gate_proj" else self.size, self.size)
            param_data.copy_(loaded_weight.narrow(0, start, self.size))


class Layer(nn.Module):
    def __init__(self, ranks, is_moe):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN, bias=False, dtype=torch.bfloat16)
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = QKVParallel(ranks)
        self.self_attn.o_proj = RowParallel(ranks, HEADS * HEAD_DIM, HIDDEN)
        self.mlp = nn.Module()
        if is_moe:
            self.mlp.gate = Replicated(HIDDEN, EXPERTS)
            self.mlp.experts = ParallelExperts(ranks)
        else:
            self.mlp.gate_up_proj = MergedColumnParallel(ranks, HIDDEN, {0: INTERMEDIATE, 1: INTERMEDIATE})
            self.mlp.down_proj = RowParallel(ranks, INTERMEDIATE, HIDDEN)


class ParallelModel(nn.Module):
    """Dense layers and layers of experts by turns; a pipeline's rank makes a run of them."""

    def __init__(self, ranks):
        super().__init__()
        run = range(LAYERS * ranks.pp_rank // ranks.pp_size, LAYERS * (ranks.pp_rank + 1) // ranks.pp_size)
        self.model = nn.Module()
        if ranks.pp_rank == 0:
            self.model.embed_tokens = VocabParallel(ranks)
        self.model.layers = nn.ModuleDict({str(i): Layer(ranks, is_moe=i % 2 == 1) for i in run})
        if ranks.pp_rank == ranks.pp_size - 1:
            self.model.norm = nn.LayerNorm(HIDDEN, bias=False, dtype=torch.bfloat16)
            self.lm_head = VocabParallel(ranks)

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        for name, loaded_weight in weights:
            module, _, leaf = name.rpartition(".")
            owner, _, shard = module.rpartition(".")
            if ".experts." in name:
                experts, _, expert = owner.rpartition(".")
                param = params.get(f"{experts}.{'w2' if shard == 'down_proj' else 'w13'}_{leaf}")
                if param is not None:
                    param.weight_loader(param, loaded_weight, shard, int(expert))
                continue
            fused, shard_id = PACKED.get(shard, (shard, None))
            param = params.get(f"{owner}.{fused}.{leaf}".lstrip("."))
            if param is None:  # of another stage of the pipeline
                continue
            loader = getattr(param, "weight_loader", default_weight_loader)
            loader(param, loaded_weight, *(() if shard_id is None else (shard_id,)))


def checkpoint():
    """Name -> whole tensor; rows, columns and experts of very different size, so that scales tell them apart."""

    def make(*shape):
        rows = torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
        return (torch.randn(shape) * rows * 2.0 ** torch.randint(-4, 4, ())).bfloat16()

    found = {"model.embed_tokens.weight": make(VOCAB, HIDDEN), "model.norm.weight": make(HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = make(HIDDEN)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = make(heads * HEAD_DIM, HIDDEN)
        found[f"{layer}.self_attn.o_proj.weight"] = make(HIDDEN, HEADS * HEAD_DIM)
        mlps = [(f"{layer}.mlp", INTERMEDIATE)]
        if i % 2 == 1:
            found[f"{layer}.mlp.gate.weight"] = make(EXPERTS, HIDDEN)
            mlps = [(f"{layer}.mlp.experts.{e}", EXPERT_INTERMEDIATE) for e in range(EXPERTS)]
        for mlp, size in mlps:
            found[f"{mlp}.gate_proj.weight"], found[f"{mlp}.up_proj.weight"] = make(size, HIDDEN), make(size, HIDDEN)
            found[f"{mlp}.down_proj.weight"] = make(HIDDEN, size)
    found["lm_head.weight"] = make(VOCAB, HIDDEN)
    return found
