"""What does a load cost beside the copies: device memory above the model, and time of the host per shard.

    python -m bench.loader [--memory] [--host] [--device cuda] [--save]

Weights have the shapes of Qwen1.5-MoE-A2.7B (26.67 GiB in bf16) and of one MoE layer of DeepSeek-V3 (21 GiB), with
random values out of a small pool, so that neither a download nor host memory for them is needed. `--layers` and
`--scale-down` make them smaller, for machines without such a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import fp8_kernels as fk
from fp8_kernels.loading.report import size_text

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
# Above the resident model, at most: in order, allocated and reserved; in any order, above the budget.
IN_ORDER_BARS, SHUFFLED_BAR, LAYER_BAR = (64 * MIB, 256 * MIB), 64 * MIB, 256 * MIB
HOST_BAR = 50.0  # microseconds a shard above plain parameters
SWEEP = (100, 1_000, 10_000, 100_000)
BURST = 6  # experts between two synchronizations: a queue that is full would show the GPU's time as the host's
SMALL = (2, 64)  # an expert of the sweep, of two shards

Shard = tuple[str, int | None, int, tuple[int, ...]]  # parameter, expert, first row, shape


class Shapes:
    """Parameters by name on meta, and the shards that a checkpoint brings for them, in its order."""

    def __init__(self, scale_down: int = 1):
        self.model, self.shards, self._scale_down = nn.Module(), [], scale_down

    def size(self, full: int) -> int:
        """An extent, scaled down."""
        return max(full // self._scale_down, 1)

    def add(self, name: str, *parts: tuple[int, ...], experts: int | None = None, expert: int | None = None):
        """A parameter of these parts, one below the other, for one expert or for all; one shard a part."""
        path, _, leaf = name.rpartition(".")
        module = self.model
        for child in path.split("."):
            if child not in module._modules:
                module.add_module(child, nn.Module())
            module = module._modules[child]
        rows, rest = sum(part[0] for part in parts), parts[0][1:]
        if leaf not in module._parameters:
            shape = (rows, *rest) if experts is None else (experts, rows, *rest)
            module.register_parameter(
                leaf, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"), requires_grad=False)
            )
        first = 0
        for part in parts:
            self.shards.append((name, expert, first, part))
            first += part[0]


def qwen_moe(layers: int = 24, scale_down: int = 1) -> Shapes:
    """Qwen1.5-MoE-A2.7B as an engine holds it: q, k and v fused, gate and up fused, experts stacked."""
    shapes = Shapes(scale_down)
    hidden, inner, shared = map(shapes.size, (2048, 1408, 5632))
    vocabulary, experts = shapes.size(151936), shapes.size(60)
    shapes.add("embed_tokens.weight", (vocabulary, hidden))
    for i in range(layers):
        layer = f"layers.{i}"
        shapes.add(f"{layer}.qkv_proj.weight", *[(hidden, hidden)] * 3)
        shapes.add(f"{layer}.qkv_proj.bias", *[(hidden,)] * 3)
        shapes.add(f"{layer}.o_proj.weight", (hidden, hidden))
        for e in range(experts):
            shapes.add(f"{layer}.experts.w13", (inner, hidden), (inner, hidden), experts=experts, expert=e)
            shapes.add(f"{layer}.experts.w2", (hidden, inner), experts=experts, expert=e)
        shapes.add(f"{layer}.gate.weight", (experts, hidden))
        shapes.add(f"{layer}.shared_expert.gate_up_proj.weight", (shared, hidden), (shared, hidden))
        shapes.add(f"{layer}.shared_expert.down_proj.weight", (hidden, shared))
        shapes.add(f"{layer}.shared_expert_gate.weight", (1, hidden))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes.add(f"{layer}.{norm}.weight", (hidden,))
    shapes.add("norm.weight", (hidden,))
    shapes.add("lm_head.weight", (vocabulary, hidden))
    return shapes


def deepseek_layer(scale_down: int = 1) -> Shapes:
    """One MoE layer of DeepSeek-V3: 256 experts of 3 x 2048 x 7168."""
    shapes = Shapes(scale_down)
    experts, inner, hidden = map(shapes.size, (256, 2048, 7168))
    for e in range(experts):
        shapes.add("layer.experts.w13", (inner, hidden), (inner, hidden), experts=experts, expert=e)
        shapes.add("layer.experts.w2", (hidden, inner), experts=experts, expert=e)
    return shapes


class Pool:
    """Random values for shards of any size."""

    def __init__(self, numel: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        piece = torch.randn(min(numel, 1 << 22), generator=generator).mul_(0.02).bfloat16()
        self._values = piece.repeat(-(-numel // piece.numel()) + 1)

    def stream(self, shards: list[Shard]) -> Iterator[tuple[Shard, torch.Tensor]]:
        """Each shard with its values, made when it is asked for."""
        for i, shard in enumerate(shards):
            numel = torch.Size(shard[3]).numel()
            start = i * 8191 % (self._values.numel() - numel)
            yield shard, self._values[start : start + numel].view(shard[3])


def load(model: nn.Module, stream: Iterator[tuple[Shard, torch.Tensor]]):
    """An engine's loader: index, narrow, copy."""
    params = dict(model.named_parameters())
    for (name, expert, first, shape), values in stream:
        p = params[name].data
        p = p if expert is None else p[expert]
        p.narrow(0, first, shape[0]).copy_(values)


def memory_case(shapes: Shapes, pool: Pool, scheme: str, shuffled: bool, device: torch.device, budget=None) -> dict:
    """One load: bytes of the device above what is resident after it, and what waited on the host."""
    shards = list(shapes.shards)
    if shuffled:
        random.Random(0).shuffle(shards)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    with fk.LayerwiseLoader(shapes.model, scheme, device=device, staging_budget=budget) as loader:
        load(shapes.model, pool.stream(shards))
    report = loader.report
    result = {
        "scheme": scheme,
        "shuffled": shuffled,
        "shards": report.shards,
        "bytes_in": report.bytes_in,
        "seconds": round(report.seconds, 2),
        "peak_staging": report.peak_staging_bytes,
        "spills": report.spills,
        "spilled_bytes": report.spilled_bytes,
        "budget": budget or max(256 * MIB, 2 * loader.plan.largest_unit),
    }
    if device.type == "cuda":
        result |= {
            "resident": report.resident,
            "allocated_above": report.peak_allocated - report.resident,
            "reserved_above": report.peak_reserved - report.resident,
        }
    return result


def memory(device: torch.device, layers: int, scale_down: int) -> list[dict]:
    """All loads of the bars."""
    pool = Pool(qwen_moe(1, scale_down).size(151936) * max(2048 // scale_down, 1))
    warm_up = qwen_moe(1, 32)
    for scheme in ("per_channel", "per_tensor", "per_block"):  # kernels load, the allocator wakes
        memory_case(warm_up, pool, scheme, True, device)
        warm_up = qwen_moe(1, 32)
    results = []
    for scheme in ("per_channel", "per_tensor"):
        for shuffled in (False, True):
            shapes = qwen_moe(layers, scale_down)
            results.append({"model": "qwen", **memory_case(shapes, pool, scheme, shuffled, device)})
            _free(shapes)
    for scheme in ("per_channel", "per_tensor", "per_block"):
        shapes = deepseek_layer(scale_down)
        results.append({"model": "deepseek layer", **memory_case(shapes, pool, scheme, False, device)})
        _free(shapes)
    return results


def host(device: torch.device, sweep: tuple[int, ...] = SWEEP, scale_down: int = 1, rounds: int = 9) -> dict:
    """Microseconds a shard, of the loader above plain parameters on the same device."""
    found: dict = {"experts": {}, "sweep": {}}
    rows, cols = max(1408 // scale_down, 1), max(2048 // scale_down, 1)
    kinds = {"pageable": lambda t: t}
    if device.type == "cuda":
        kinds |= {"pinned": torch.Tensor.pin_memory, "device": lambda t: t.to(device)}
    for kind, place in kinds.items():
        found["experts"][kind] = _above(device, 60, place(torch.randn(rows, cols).bfloat16()), rounds)
    shard = torch.randn(SMALL[0] // 2, SMALL[1]).bfloat16()
    for count in sweep:
        repeats = rounds if count <= 1_000 else 3 if count <= 10_000 else 1
        found["sweep"][str(count)] = _above(device, count // 2, shard, repeats)
    return found


def _above(device, num_experts, shard, rounds):
    """Medians over rounds of plain parameters and ours in turns, and what is above plain ones."""
    times: dict[str, list[float]] = {"None": [], "per_channel": [], "per_tensor": []}
    for i in range(rounds + 1):
        for scheme, each in times.items():
            count = num_experts if i else min(num_experts, 60)  # the first round loads kernels and wakes the allocator
            seconds = _timed(device, None if scheme == "None" else scheme, count, shard)
            each += [seconds] if i else []
    medians = {name: round(statistics.median(each), 2) for name, each in times.items()}
    plain = medians.pop("None")
    return {"plain": plain, **{name: {"us": us, "above": round(us - plain, 2)} for name, us in medians.items()}}


def _timed(device, scheme, num_experts, shard):
    """Microseconds a shard, the mean over experts of two equal shards."""
    module = nn.Module()
    module.experts = nn.Module()
    shape = (num_experts, 2 * shard.shape[0], shard.shape[1])
    where = device if scheme is None else "meta"
    module.experts.w13 = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=where), requires_grad=False)
    if scheme is None:
        return _write(module.experts.w13, shard, device)
    with fk.LayerwiseLoader(module, scheme, device=device) as loader:
        microseconds = _write(module.experts.w13, shard, device)
    assert loader.report.quantized_units == num_experts
    return microseconds


def _write(p, shard, device):
    """The first burst of a load, which also makes its result and page-locks memory, is not counted."""
    rows = shard.shape[0]
    gc.collect()
    gc.disable()
    seconds = []
    for start in range(0, p.shape[0], BURST):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for e in range(start, min(start + BURST, p.shape[0])):
            p.data[e].narrow(0, 0, rows).copy_(shard, non_blocking=True)
            p.data[e].narrow(0, rows, rows).copy_(shard, non_blocking=True)
        seconds.append(time.perf_counter() - began)
    gc.enable()
    counted = seconds[1:] or seconds
    return sum(counted) / (2 * (p.shape[0] - (len(counted) < len(seconds)) * BURST)) * 1e6


def _free(shapes):
    for module in shapes.model.modules():
        module._parameters.clear()


def bars(result: dict) -> list[str]:
    """One line for each bar that the measurement is about."""
    lines = []
    for case in result.get("memory", ()):
        if "resident" not in case:
            continue
        name = f"{case['model']}, {case['scheme']}, {'shuffled' if case['shuffled'] else 'in order'}"
        above = {"allocated": case["allocated_above"], "reserved": case["reserved_above"]}
        if case["shuffled"]:
            limits = dict.fromkeys(above, case["budget"] + SHUFFLED_BAR)
        elif case["model"] == "qwen":
            limits = dict(zip(above, IN_ORDER_BARS, strict=True))
        else:
            limits = dict.fromkeys(above, LAYER_BAR)
        for what, seen in above.items():
            verdict = "met" if seen <= limits[what] else "MISSED"
            lines.append(f"{name}: {what} {size_text(seen)} above resident, bar {size_text(limits[what])}: {verdict}")
    for part, cases in result.get("host", {}).items():
        for name, case in cases.items():
            for scheme in ("per_channel", "per_tensor"):
                above = case[scheme]["above"]
                verdict = "met" if above <= HOST_BAR else "MISSED"
                what = f"6 MB shards, {name} source" if part == "experts" else f"{name} small shards"
                lines.append(f"host, {what}, {scheme}: {above:.1f} us above {case['plain']:.1f}, bar 50: {verdict}")
    return lines


def summary(result: dict) -> str:
    """Markdown: how many bars were met, and each that was not."""
    lines = bars(result)
    missed = [line for line in lines if line.endswith("MISSED")]
    return "\n".join([f"- {len(lines) - len(missed)} of {len(lines)} bars met.", *(f"- {line}" for line in missed)])


def table(result: dict) -> str:
    """Markdown."""
    lines = []
    if result.get("memory"):
        lines += [
            "| model | scheme | order | shards | seconds | resident | allocated above | reserved above | spills |"
        ]
        lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for c in result["memory"]:
            sizes = [size_text(c[k]) if k in c else "-" for k in ("resident", "allocated_above", "reserved_above")]
            spills = f"{c['spills']} ({size_text(c['spilled_bytes'])})" if c["spills"] else "0"
            order = "shuffled" if c["shuffled"] else "in order"
            cells = [c["model"], c["scheme"], order, str(c["shards"]), f"{c['seconds']:.2f}", *sizes, spills]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if result.get("host"):
        lines += ["| shards | plain, us | per_channel, above | per_tensor, above |", "| --- | ---: | ---: | ---: |"]
        for part, cases in result["host"].items():
            for name, c in cases.items():
                what = f"6 MB, {name}" if part == "experts" else f"{name} small"
                above = " | ".join(f"{c[s]['above']:.1f}" for s in ("per_channel", "per_tensor"))
                lines.append(f"| {what} | {c['plain']:.1f} | {above} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", action="store_true", help="only the memory of loads")
    parser.add_argument("--host", action="store_true", help="only the host time of shards")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=24, help="of the Qwen model")
    parser.add_argument("--scale-down", type=int, default=1, help="divide every extent by this")
    parser.add_argument("--max-shards", type=int, default=SWEEP[-1], help="of the sweep over counts")
    parser.add_argument("--save", metavar="FOLDER", nargs="?", const=str(RESULTS), help="write the JSON there")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(1)  # a copy on several threads would hide, or add, what the host's one thread does
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result: dict = {"device": name, "torch": torch.__version__, "layers": args.layers, "scale_down": args.scale_down}
    if args.host or not args.memory:
        sweep = tuple(count for count in SWEEP if count <= args.max_shards)
        result["host"] = host(device, sweep, args.scale_down)
    if args.memory or not args.host:
        result["memory"] = memory(device, args.layers, args.scale_down)
    print(table(result), *bars(result), sep="\n")
    if args.save:
        path = Path(args.save) / f"loader_{name.lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
