"""Small checkpoints with the names and roles of real ones, written without transformers."""

import json

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, VOCAB = 128, 256, 64


def tensors(num_layers=2, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=torch.bfloat16):
    """Name -> tensor of a Llama with an untied head."""

    def make(*shape):
        # Magnitudes differ from weight to weight, so that a scale taken from the wrong one shows.
        return (torch.randn(shape) * 2.0 ** torch.randint(-8, 1, ())).to(dtype)

    found = {"model.embed_tokens.weight": make(VOCAB, hidden), "model.norm.weight": make(hidden)}
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = make(hidden)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{layer}.self_attn.{name}.weight"] = make(hidden, hidden)
        found[f"{layer}.self_attn.q_proj.bias"] = make(hidden)
        found[f"{layer}.mlp.gate_proj.weight"] = make(intermediate, hidden)
        found[f"{layer}.mlp.up_proj.weight"] = make(intermediate, hidden)
        found[f"{layer}.mlp.down_proj.weight"] = make(hidden, intermediate)
    found["lm_head.weight"] = make(VOCAB, hidden)
    return found


def weights(state):
    """Names of those that become FP8."""
    return [name for name in state if name.endswith("_proj.weight")]


def write_single(folder, state, config=None):
    """A folder with one file; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return _write_config(folder, config)


def write_sharded(folder, state, num_files=3, config=None, save=save_file, names="model-{:05}-of-{:05}.safetensors"):
    """A folder with an index and neighbours in different files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {name: names.format(i % num_files + 1, num_files) for i, name in enumerate(state)}
    for file in sorted(set(weight_map.values())):
        save({name: t for name, t in state.items() if weight_map[name] == file}, folder / file)
    index = "model.safetensors.index.json" if names.endswith("safetensors") else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return _write_config(folder, config)


def files(folder):
    """Relative path -> bytes of everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _write_config(folder, config):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": HIDDEN} | (config or {})))
    return folder
