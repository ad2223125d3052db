"""Formats: where experts lie in a checkpoint, what files it is made of, and none at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ..bits import assert_same_bits
from ..case import Do, Load, Weights, Write, values
from .memory import SMALL, UNIT, Linears
from .registry import Draft, row

NUM, HIDDEN, INNER = 3, 40, 24  # experts, and an inner size that is no multiple of a block


@row("G", "no checkpoint: the same plan, kernels and peak, with generated values")
def dummy_load(scheme):
    shapes = {f"fc{i}": (256, 1024) for i in range(8)} | {"experts": (12, 256, 1024)}

    def filled(session):
        for name in shapes:
            q, scale = session.adapter.result(session.model, f"{name}.weight")
            assert q.dtype == torch.float8_e4m3fn and tuple(q.shape) == shapes[name], f"{name} is not FP8"
            assert bool(scale.float().isfinite().all()) and bool((q.float() != 0).any()), f"{name} holds nothing"

    load = Load([Do("fill", lambda s: s.adapter.fill_dummy(s))], check=filled, excess_bytes=5 * UNIT + SMALL)
    yield Draft("", shapes, load, {"dummy"})


def _gate_up_down(num=NUM):
    return values(num, INNER, HIDDEN), values(num, INNER, HIDDEN), values(num, HIDDEN, INNER)


class _Experts(torch.nn.Module):
    """`w13` `[E, 2I, H]` (`[E, I, H]` without a gate) and `w2` `[E, H, I]`, on meta."""

    def __init__(self, gated=True):
        super().__init__()
        rows = 2 * INNER if gated else INNER
        self.experts = torch.nn.Module()
        for name, shape in (("w13", (NUM, rows, HIDDEN)), ("w2", (NUM, HIDDEN, INNER))):
            weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            setattr(self.experts, name, torch.nn.Parameter(weight))


@row("G", "experts in one tensor, also transposed or with gate and up interleaved: sliced per expert")
def fused_3d_expert_checkpoint(scheme):
    gate, up, down = _gate_up_down()
    w13 = torch.cat([gate, up], dim=1)
    holds = {"experts.w13": w13, "experts.w2": down}
    ways = {
        "whole": (w13, down, lambda p, source: p.data.copy_(source)),
        "transposed": (w13.mT.contiguous(), down.mT.contiguous(), lambda p, source: p.data.copy_(source.mT)),
        "transposed_into": (w13.mT.contiguous(), down.mT.contiguous(), lambda p, source: p.data.mT.copy_(source)),
        "by_expert": (w13, down, lambda p, source: [p.data[e].copy_(source[e]) for e in range(NUM)]),
        "by_transposed_expert": (
            w13.mT.contiguous(),
            down.mT.contiguous(),
            lambda p, source: [p.data[e].t().copy_(source[e]) for e in range(NUM)],
        ),
    }
    for variant, (first, second, how) in ways.items():
        writes = [Write("experts.w13", first, how), Write("experts.w2", second, how)]
        yield Draft(variant, _Experts, Load(writes, holds))
    interleaved = torch.stack([gate, up], dim=2).reshape(NUM, 2 * INNER, HIDDEN)

    def into_halves(p, source):  # the checkpoint's rows alternate, the model's do not
        for half in range(2):
            p.data[:, half * INNER : (half + 1) * INNER].copy_(source[:, half::2])

    writes = [Write("experts.w13", interleaved, into_halves), Write("experts.w2", down)]
    yield Draft("interleaved_source", _Experts, Load(writes, holds))
    writes = [
        Write("experts.w13", part[e], lambda p, source, e=e, half=half: p.data[e, half::2].copy_(source))
        for e in range(NUM)
        for half, part in enumerate((gate, up))
    ]
    writes.append(Write("experts.w2", down))
    yield Draft("interleaved", _Experts, Load(writes, {"experts.w13": interleaved, "experts.w2": down}))


@row("G", "a tensor for each expert and projection, in any order: stacked")
def per_expert_checkpoint(scheme):
    gate, up, down = _gate_up_down()
    shards = []
    for e in range(NUM):
        for half, part in enumerate((gate, up)):
            rows = slice(half * INNER, (half + 1) * INNER)
            shards.append(
                Write(
                    "experts.w13", lambda w=part[e]: w, lambda p, source, e=e, rows=rows: p.data[e, rows].copy_(source)
                )
            )
        shards.append(Write("experts.w2", lambda w=down[e]: w, lambda p, source, e=e: p.data[e].copy_(source)))
    holds = {"experts.w13": torch.cat([gate, up], dim=1), "experts.w2": down}
    by_projection = [*shards[0::3], *shards[2::3], *shards[1::3]]  # every gate, every down, every up
    for variant, writes in (("expert_by_expert", shards), ("projection_by_projection", by_projection)):
        yield Draft(variant, _Experts, Load(writes, holds, retained_bytes=0))


@row("G", "w13 has one shard, and is complete with it")
def non_gated_moe(scheme):
    _, up, down = _gate_up_down()
    writes = []
    for e in range(NUM):
        writes.append(Write("experts.w13", up[e], lambda p, source, e=e: p.data[e].copy_(source)))
        writes.append(Write("experts.w2", down[e], lambda p, source, e=e: p.data[e].copy_(source)))
    load = Load(writes, {"experts.w13": up, "experts.w2": down})
    yield Draft("", lambda: _Experts(gated=False), load)


@row("G", "quantized, and then on the CPU")
def cpu_offloaded_parameter(scheme):
    w, other = values(7, 36), values(3, 5)

    def placed(session):
        for tensor in session.adapter.result(session.model, "fc.weight"):
            assert tensor.device.type == "cpu", f"an offloaded weight is on {tensor.device}"

    writes = [Write("fc.weight", w), Write("fc2.weight", other)]
    load = Load(writes, {"fc.weight": w, "fc2.weight": other}, facts={"offload": ["fc.weight"]}, check=placed)
    yield Draft("", {"fc": (7, 36), "fc2": (3, 5)}, load)


def _from_folder(variant, save: Callable[[Path, dict], None], scheme):
    """Load a folder that `save` wrote, and compare every weight."""
    weights = {f"fc{i}.weight": values(7, 36) for i in range(3)}

    def run(adapter):
        model = Linears({name.partition(".")[0]: tuple(w.shape) for name, w in weights.items()})
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text("{}")
            save(Path(folder), weights)
            adapter.load_checkpoint(model, Path(folder), scheme)
        for name, w in weights.items():
            q, scale = adapter.result(model, name)
            wanted, wanted_scale = adapter.expected(w, scheme)
            assert_same_bits(q.detach().cpu(), wanted, name)
            assert_same_bits(scale.detach().cpu().reshape(wanted_scale.shape), wanted_scale, f"{name}_scale")

    return Draft(variant, None, run=run, needs={"checkpoint"})


@row("G", "one safetensors file")
def single_file(scheme):
    from safetensors.torch import save_file

    yield _from_folder("", lambda folder, weights: save_file(weights, folder / "model.safetensors"), scheme)


@row("G", "several files and an index")
def sharded_with_index(scheme):
    from safetensors.torch import save_file

    def save(folder, weights):
        files = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(weights)}
        for file in set(files.values()):
            save_file({name: w for name, w in weights.items() if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    yield _from_folder("", save, scheme)


class _Malicious:
    """A pickle that would call a function."""

    def __reduce__(self):
        return print, ("a pickle has run code",)


@row("G", "pickles: read as tensors alone, whatever else they would do")
def pickled_bin(scheme):
    yield _from_folder("", lambda folder, weights: torch.save(weights, folder / "pytorch_model.bin"), scheme)

    def run(adapter):
        model = Weights(fc=(3, 5))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text("{}")
            torch.save({"fc.weight": _Malicious()}, Path(folder) / "pytorch_model.bin")
            try:
                adapter.load_checkpoint(model, Path(folder), scheme)
            except Exception:
                return
        raise AssertionError("a pickle that calls functions was loaded without an error")

    yield Draft("refused", None, run=run, needs={"checkpoint"})
