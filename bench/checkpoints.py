"""Checkpoint folders of real models' shapes with random weights, written as fast as the disk or memory takes them."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

GIB = 1 << 30
FILE_BYTES = 4_000_000_000  # as those models' own files are
CHUNK_BYTES = 16 << 20
POOL_NUMEL = (64 << 20) - 24_001  # no power of two: what is written elsewhere begins elsewhere in it
SPARE_BYTES = 4 * GIB  # left free on a disk, or in memory


@dataclass
class Model:
    """A checkpoint to be: config.json and the bf16 tensors, by name."""

    name: str
    config: dict
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return 2 * sum(map(math.prod, self.shapes.values()))


def qwen_moe(layers: int = 24, scale_down: int = 1) -> Model:
    """Qwen1.5-MoE-A2.7B: 26.67 GiB, 24 layers of 60 experts."""
    hidden, inner, shared, vocabulary, experts = (n // scale_down for n in (2048, 1408, 5632, 151936, 60))
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": hidden,
        "intermediate_size": shared,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": shared,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": experts,
        "num_experts_per_tok": min(4, experts),
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "vocab_size": vocabulary,
        "rope_theta": 1000000.0,
        **_COMMON,
    }
    model = Model("qwen1.5-moe-a2.7b", config, {"model.embed_tokens.weight": (vocabulary, hidden)})
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part in ("q", "k", "v"):
            model.shapes[f"{layer}.self_attn.{part}_proj.weight"] = (hidden, hidden)
            model.shapes[f"{layer}.self_attn.{part}_proj.bias"] = (hidden,)
        model.shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        for e in range(experts):
            _add_mlp(model, f"{layer}.mlp.experts.{e}", inner, hidden)
        _add_mlp(model, f"{layer}.mlp.shared_expert", shared, hidden)
        model.shapes[f"{layer}.mlp.gate.weight"] = (experts, hidden)
        model.shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, hidden)
    return _with_the_rest(model, layers, hidden, vocabulary)


def llama_8b(layers: int = 32, scale_down: int = 1) -> Model:
    """Llama-3.1-8B: 14.96 GiB, 32 dense layers."""
    hidden, inner, vocabulary, kv = (n // scale_down for n in (4096, 14336, 128256, 1024))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "rope_theta": 500000.0,
        **_COMMON,
    }
    model = Model("llama-3.1-8b", config, {"model.embed_tokens.weight": (vocabulary, hidden)})
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            model.shapes[f"{layer}.self_attn.{part}_proj.weight"] = (rows, hidden)
        _add_mlp(model, f"{layer}.mlp", inner, hidden)
    return _with_the_rest(model, layers, hidden, vocabulary)


def small_weights(count: int = 30_000) -> Model:
    """Many weights of 64 KiB, a parameter each, for no model in particular."""
    return Model(f"{count} small weights", {}, {f"layers.{i:05}.weight": (32, 1024) for i in range(count)})


def small_experts(count: int = 30_000) -> Model:
    """As many tensors of 64 KiB, of experts: three each, up to 100 experts a layer."""
    layers, experts = max(count // 300, 1), min(count // 3, 100)
    config = {"hidden_size": 1024, "moe_intermediate_size": 32, "num_experts": experts}
    model = Model(f"{3 * layers * experts} small tensors of experts", config)
    for i in range(layers):
        for e in range(experts):
            _add_mlp(model, f"model.layers.{i}.mlp.experts.{e}", 32, 1024)
    return model


MODELS = {"qwen": qwen_moe, "llama": llama_8b}
_COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def _add_mlp(model, prefix, inner, hidden):
    model.shapes[f"{prefix}.gate_proj.weight"] = (inner, hidden)
    model.shapes[f"{prefix}.up_proj.weight"] = (inner, hidden)
    model.shapes[f"{prefix}.down_proj.weight"] = (hidden, inner)


def _with_the_rest(model, layers, hidden, vocabulary):
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            model.shapes[f"model.layers.{i}.{norm}.weight"] = (hidden,)
    model.shapes["model.norm.weight"] = (hidden,)
    model.shapes["lm_head.weight"] = (vocabulary, hidden)
    return model


def write(model: Model, folder: Path, threads: int, file_bytes: int = FILE_BYTES) -> Path:
    """Write the folder, with random values of a standard deviation of 0.02; returns it.

    Names are spread over files in the model's order, and lie sorted within one, as transformers saves them.
    """
    folder.mkdir(parents=True)
    files, size = [{}], 0
    for name, shape in model.shapes.items():
        num_bytes = 2 * math.prod(shape)
        if size + num_bytes > file_bytes and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += num_bytes
    pool = torch.randn(min(POOL_NUMEL, max(model.num_bytes // 2, 1)), generator=torch.Generator().manual_seed(0))
    pool = memoryview(pool.mul_(0.02).bfloat16().view(torch.uint8).numpy())
    weight_map, chunks, descriptors = {}, [], []
    for number, shapes in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        header, end = _header(shapes)
        descriptors.append(os.open(folder / name, os.O_CREAT | os.O_WRONLY))
        os.pwrite(descriptors[-1], header, 0)
        chunks += [(descriptors[-1], at, min(CHUNK_BYTES, end - at)) for at in range(len(header), end, CHUNK_BYTES)]
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(lambda chunk: _fill(pool, *chunk), chunks))
    for descriptor in descriptors:
        os.close(descriptor)
    if len(files) > 1:
        index = {"metadata": {"total_size": model.num_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if "architectures" in model.config:
        (folder / "config.json").write_text(json.dumps(model.config))
    return folder


def _header(shapes):
    """(header bytes, size of the file)."""
    table, at = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(shapes):
        end = at + 2 * math.prod(shapes[name])
        table[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def _fill(pool, descriptor, at, count):
    """Write that many bytes of the pool; where from in it depends on where to."""
    start = at // 16 * 7919 * 16 % len(pool)
    while count:
        written = os.pwrite(descriptor, pool[start : start + count], at)
        start, at, count = (start + written) % len(pool), at + written, count - written


def place_for(num_bytes: int, wanted: str | None) -> tuple[Path, str]:
    """A new folder with room for that many bytes, and what is to be said about it.

    By default on the disk of the temporary files; in memory, as files of /dev/shm, where that has no room.

    Raises:
        OSError: no place has room.
    """
    tried = []
    for parent in [wanted] if wanted else [tempfile.gettempdir(), "/dev/shm"]:
        if not os.path.isdir(parent):
            continue
        free = shutil.disk_usage(parent).free
        tried.append(f"{parent} has {free / GIB:.1f} GiB")
        if free > num_bytes + min(SPARE_BYTES, num_bytes):
            note = "" if len(tried) == 1 else f"{tried[0]}: the files lie in {parent}, where none can be cold"
            return Path(tempfile.mkdtemp(prefix="fp8_bench_", dir=parent)), note
    raise OSError(f"{num_bytes / GIB:.1f} GiB of checkpoints must have room: {', '.join(tried)}")
