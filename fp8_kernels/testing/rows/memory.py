"""The memory bound broken: more high precision is held than what is being filled."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import torch

from ..case import Do, Load, Write, values
from ..memory import Excess
from .registry import Draft, row
from .too_early import rows_of

SHAPE = (256, 1024)
UNIT = 256 * 1024 * 2  # bytes of such a weight in bf16
TOGETHER = 16 << 20  # experts that arrive together may be quantized together: bytes of as many
SMALL = 4 << 20  # what a load may need beside units: records, and the fp32 temporaries of a piece on the CPU


def _many(num):
    """Weights of one size by name."""
    return {f"fc{i}": values(*SHAPE) for i in range(num)}


def _holds(weights):
    return {f"{name}.weight": w for name, w in weights.items()}


@row("D", "tracked weights cost nothing, whoever holds them, and stay the engine's own objects")
def held_references(scheme):
    weights = _many(8)

    def hold_and_load(session):
        kept = session.notes.setdefault("kept", [])
        for name, w in weights.items():
            p = session.params[f"{name}.weight"]
            kept.append((p, p.data, p.data[3:5], p.data.t()))
            session.write(f"{name}.weight", lambda w=w: w, lambda p, source: p.data.copy_(source))

    def same(session):
        for name, p in session.params.items():
            assert session.model.get_parameter(name) is p, f"{name} is another object than the engine holds"

    load = Load(
        [Do("load, holding every weight and views of it", hold_and_load)],
        _holds(weights),
        check=same,
        retained_bytes=0,
        excess_bytes=3 * UNIT + SMALL,
    )
    yield Draft("", {name: SHAPE for name in weights}, load)


@row("D", "shards in any order stay within a budget")
def out_of_order_checkpoint(scheme):
    weights = _many(12)
    shards = [(name, start) for name in weights for start in range(0, 256, 32)]
    random.Random(0).shuffle(shards)
    writes = [
        Write(f"{name}.weight", lambda w=weights[name], a=start: w[a : a + 32], rows_of(start, start + 32))
        for name, start in shards
    ]
    load = Load(
        writes,
        _holds(weights),
        facts={"staging_budget": 3 * UNIT},
        staged_bytes=3 * UNIT,
        retained_bytes=0,
    )
    yield Draft("", {name: SHAPE for name in weights}, load)


@row("D", "only the narrowed copy is held")
def full_tensor_held(scheme):
    whole = [values(4 * 256, 1024) for _ in range(4)]  # a quarter belongs to this rank
    writes = [
        Write(f"fc{i}.weight", lambda w=w: w, lambda p, source: p.data.copy_(source.narrow(0, 256, 256)))
        for i, w in enumerate(whole)
    ]
    holds = {f"fc{i}.weight": w[256:512].clone() for i, w in enumerate(whole)}
    load = Load(writes, holds, retained_bytes=0, excess_bytes=3 * UNIT + SMALL)
    yield Draft("", {f"fc{i}": SHAPE for i in range(4)}, load)


@row("D", "expert by expert, not layer by layer")
def whole_layer_moe_unit(scheme):
    w = values(16, *SHAPE)
    writes = [
        Write("experts.weight", lambda e=e: w[e], lambda p, source, e=e: p.data[e].copy_(source)) for e in range(16)
    ]
    limits = {"retained_bytes": 0, "excess_bytes": 3 * UNIT + SMALL}
    yield Draft("", {"experts": (16, *SHAPE)}, Load(writes, {"experts.weight": w}, **limits))
    together = values(48, *SHAPE)
    limits["excess_bytes"] = TOGETHER + SMALL
    load = Load([Write("experts.weight", lambda: together)], {"experts.weight": together}, **limits)
    yield Draft("in_one_copy", {"experts": (48, *SHAPE)}, load)


@row("D", "none as large as a weight: peers need up to 15 bytes an element")
def fp32_temporaries(scheme):
    w = values(4096, 2048)
    load = Load([Write("fc.weight", w)], {"fc.weight": w}, excess_bytes=w.nbytes + 3 * SMALL)
    yield Draft("", {"fc": (4096, 2048)}, load)


@row("D", "reading ahead is bounded by bytes")
def prefetch_outruns_quantization(scheme):
    weights = _many(16)

    def run(adapter):
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), {f"{name}.weight": w for name, w in weights.items()})
            model = Linears({name: SHAPE for name in weights})
            with Excess(adapter.device, model) as excess:
                adapter.load_checkpoint(model, Path(folder), scheme)
        mapped = len(weights) * UNIT if adapter.device.type == "cpu" else 0  # a mapped file counts as allocated there
        limit = mapped + 4 * UNIT + SMALL
        assert excess.allocated <= limit, f"{excess.allocated} bytes beyond the model, at most {limit} may be needed"

    yield Draft("", None, run=run, needs={"checkpoint"})


@row("D", "what the allocator keeps is bounded too")
def reserved_not_allocated(scheme):
    weights = _many(16)
    writes = [Write(f"{name}.weight", lambda w=w: w) for name, w in weights.items()]
    load = Load(writes, _holds(weights), reserved_bytes=64 << 20)
    yield Draft("", {name: SHAPE for name in weights}, load, {"cuda"})


@row("D", "measured from before the first write until everything is in place, padded weights included")
def peak_measured_too_soon(scheme):
    weights = {f"fc{i}": values(200, 1024) for i in range(8)}
    writes = [Write(f"{name}.weight", lambda w=w: w, rows_of(0, 200)) for name, w in weights.items()]
    padding = torch.zeros(56, 1024).bfloat16()
    holds = {f"{name}.weight": torch.cat([w, padding]) for name, w in weights.items()}
    facts = {"logical_shapes": {name: (200, 1024) for name in weights}}
    load = Load(writes, holds, facts=facts, excess_bytes=3 * UNIT + SMALL, retained_bytes=0)
    yield Draft("", {name: SHAPE for name in weights}, load)


@row("D", "a stream is consumed one tensor at a time")
def iterator_turned_into_list(scheme):
    weights = _many(6)

    def engine(session):
        def stream():
            for name, w in weights.items():
                alive = session.retained_bytes()
                assert alive <= UNIT, f"{alive} bytes of earlier tensors are alive when the next is asked for"
                yield f"{name}.weight", session.given(lambda w=w: w)

        for name, w in stream():
            session.adapter.write(session, name, w, lambda p, source: p.data.copy_(source))

    load = Load([Do("load from a generator", engine)], _holds(weights))
    yield Draft("", {name: SHAPE for name in weights}, load)


@row("D", "the work for a shard does not grow with the shards before it")
def accounting_cost(scheme):
    # Rows from the bottom up and every other one first: the order that costs most to keep track of.
    num = 1024
    w = values(num, 128)
    order = [*range(num - 1, -1, -2), *range(num - 2, -1, -2)]

    def count(session):
        calls = 0

        def seen(frame, event, arg):
            nonlocal calls
            calls += event in ("call", "c_call")

        counts = []
        for line in order:
            calls = 0
            sys.setprofile(seen)
            try:
                session.adapter.write(session, "fc.weight", w[line : line + 1], rows_of(line, line + 1))
            finally:
                sys.setprofile(None)
            counts.append(calls)
        early, late = sum(counts[32:96]), sum(counts[num // 2 - 64 : num // 2])
        assert late <= 1.5 * early, f"a shard costs {late / 64:.0f} calls after {num // 2}, {early / 64:.0f} at first"

    load = Load([Do("count the calls that a shard takes", count)], {"fc.weight": w})
    yield Draft("", {"fc": (num, 128)}, load)


# Checkpoint folders, for loaders that read them.


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]):
    """One safetensors file."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


class Linears(torch.nn.Module):
    """Linear modules without bias by name, on meta, in bf16."""

    def __init__(self, shapes: dict[str, tuple[int, int]]):
        super().__init__()
        for name, (num_rows, num_cols) in shapes.items():
            linear = torch.nn.Linear(num_cols, num_rows, bias=False, device="meta", dtype=torch.bfloat16)
            self.add_module(name, linear)


def load_folder(adapter, tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]], scheme: str):
    """The model that the adapter loads from a folder of these tensors."""
    model = Linears(shapes)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), tensors)
        adapter.load_checkpoint(model, Path(folder), scheme)
    return model
