"""Models inside transformers: what loading one takes, and how fast it runs. Prints tables, saves JSON.

    python -m bench.engines [--load] [--run] [--folder DIR]

--load makes a checkpoint of the shapes of Qwen1.5-MoE-A2.7B with random weights (26.67 GiB, in shared memory where it
fits) and loads it with stock transformers and with this package, twice: seconds, and device memory above what is
resident afterwards.

--run makes a random Llama of the shapes of Llama-3.1-8B on the GPU, in bf16 and then in FP8: prefill and decode.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers

import fp8_kernels as fk
from bench import engine_tables, running

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30
FILE_BYTES = 4 << 30
WAYS = ("bf16", "stock FineGrainedFP8", "Fp8KernelsConfig", "load_model")
MOE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


# Loading.


def moe_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything in a Qwen2-MoE checkpoint."""
    hidden, inner, shared = (
        config[k] for k in ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    )
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}

    def mlp(prefix, size):
        for part in ("gate_proj", "up_proj"):
            shapes[f"{prefix}.{part}.weight"] = (size, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, size)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{layer}.self_attn.{part}.weight"] = (hidden, hidden)
            shapes[f"{layer}.self_attn.{part}.bias"] = (hidden,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate.weight"] = (config["num_experts"], hidden)
        shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, hidden)
        mlp(f"{layer}.mlp.shared_expert", shared)
        for e in range(config["num_experts"]):
            mlp(f"{layer}.mlp.experts.{e}", inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def write_checkpoint(folder: Path, config: dict):
    """A Hugging Face folder of random bf16 weights; the values repeat, since only their number costs time."""
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.Qwen2MoeConfig(**config, dtype="bfloat16", architectures=["Qwen2MoeForCausalLM"])
    config.save_pretrained(folder)
    files, size = [{}], 0
    shapes = moe_shapes(config.to_dict())
    for name, shape in shapes.items():
        num_bytes = 2 * math.prod(shape)
        if size + num_bytes > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += num_bytes
    pool = torch.randn(max(map(math.prod, shapes.values()))).mul_(0.02).bfloat16()
    pool = memoryview(pool.view(torch.uint8).numpy())
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    threads = [
        threading.Thread(target=_write_file, args=(folder / name, tensors, pool))
        for name, tensors in zip(names, files, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_file(path, tensors, pool):
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            data = pool[: 2 * math.prod(shape)]
            while len(data):
                data = data[file.write(data) :]


def load_once(way: str, folder: Path, scheme: str, device: torch.device):
    """The model, loaded in one of `WAYS`."""
    if way == "load_model":
        return fk.load_model(folder, scheme, device=device)[0]
    config = {
        "bf16": None,
        "stock FineGrainedFP8": transformers.FineGrainedFP8Config(),
        "Fp8KernelsConfig": fk.Fp8KernelsConfig(scheme),
    }[way]
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=device, quantization_config=config
    )


def load_each(folder: Path, ways, scheme: str, device: torch.device, rounds: int) -> dict[str, list[dict]]:
    """Several loads in each way, one after the other; the first of them all also wakes the device."""
    found = {}
    for way in ways:
        found[way] = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            start, peak = time.perf_counter(), _Peak()
            with peak:
                model = load_once(way, folder, scheme, device)
                torch.cuda.synchronize()
            seconds = round(time.perf_counter() - start, 3)
            found[way].append({"seconds": seconds, "resident": torch.cuda.memory_allocated(), **peak.seen})
            del model
            gc.collect()
        print(engine_tables.load_row(way, found[way]), flush=True)
    return found


class _Peak:
    """The most that torch's allocator held meanwhile, also where something inside resets its statistics."""

    def __enter__(self):
        self.seen = {"peak_allocated": 0, "peak_reserved": 0}
        self._reset = torch.cuda.reset_peak_memory_stats
        self._reset()
        torch.cuda.reset_peak_memory_stats = self._note_and_reset
        return self

    def __exit__(self, *exception):
        self._note()
        torch.cuda.reset_peak_memory_stats = self._reset

    def _note(self):
        now = {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
        self.seen = {name: max(value, now[name]) for name, value in self.seen.items()}

    def _note_and_reset(self, device=None):
        self._note()
        self._reset(device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__.partition("\n")[0])
    parser.add_argument("--load", action="store_true", help="only loading")
    parser.add_argument("--run", action="store_true", help="only running")
    parser.add_argument("--folder", type=Path, help="a checkpoint to load, or where to make one that stays")
    parser.add_argument("--ways", nargs="+", default=WAYS[1:], choices=WAYS)
    parser.add_argument("--rounds", type=int, default=2, help="loads in each way")
    parser.add_argument("--scheme", default="per_channel")
    parser.add_argument("--layers", type=int, help="fewer, for a quick look")
    parser.add_argument("--prefill", type=int, default=running.PREFILL)
    parser.add_argument("--save", metavar="FOLDER", nargs="?", const=str(RESULTS), help="write the JSON there")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("needs a CUDA GPU", file=sys.stderr)
        return 1
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    fewer = {"num_hidden_layers": args.layers} if args.layers else {}
    device, name = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    result: dict = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    result["scheme"], lines = args.scheme, []
    if args.load or not args.run:
        folder = args.folder or _place() / "fp8_kernels_bench"
        if not (folder / "config.json").exists():
            start = time.perf_counter()
            write_checkpoint(folder, MOE | fewer)
            print(f"wrote {folder} in {time.perf_counter() - start:.1f} s\n", flush=True)
        print(*engine_tables.LOAD_HEAD, sep="\n", flush=True)
        result["load"] = load_each(folder, args.ways, args.scheme, device, args.rounds)
        lines += engine_tables.load_bars(result["load"])
        if not args.folder:
            shutil.rmtree(folder)
    if args.run or not args.load:
        found = running.run_both(running.DENSE | fewer, device, args.scheme, args.prefill)
        result["run"] = found
        print("", *running.run_table(found), sep="\n")
        lines += running.run_bars(found)
    print("", *lines, sep="\n")
    if args.save:
        path = Path(args.save) / f"engines_{name.lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
    return 0


def _place():
    """Shared memory where a checkpoint fits, so that no disk is measured; else where temporary files are."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > 32 * GIB:
        return shared
    return Path(tempfile.gettempdir())


if __name__ == "__main__":
    sys.exit(main())
