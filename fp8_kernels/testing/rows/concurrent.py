"""Threads, ranks and streams that load at the same time."""

from __future__ import annotations

import functools
import random
import threading

import torch

from ..bits import assert_same_bits
from ..case import Do, Load, Refused, Write, values
from ..ranks import rank_case, run_on_ranks
from .registry import Draft, build_one, row
from .too_early import rows_of


@row("E", "further threads load; one that never said so is found out, not silently lost")
def worker_threads(scheme):
    w = {f"fc{i}": values(6, 36) for i in range(4)}
    shapes = {name: (6, 36) for name in w}
    holds = {f"{name}.weight": x for name, x in w.items()}
    parts = [[Write(f"{name}.weight", x)] for name, x in w.items()]
    steps = [Do("four threads, a weight each", lambda s: s.in_threads(parts))]
    yield Draft("", shapes, Load(steps, holds), {"threads"})

    def forgotten(session):
        thread = threading.Thread(target=lambda: session.params["fc0.weight"].data.copy_(w["fc0"]))
        thread.start()
        thread.join()

    steps = [*parts[1], *parts[2], *parts[3], Do("a thread that has not said so", forgotten)]
    yield Draft("forgotten", shapes, Load(steps, refused=Refused("incomplete", ("fc0.weight",))), {"threads"})


@row("E", "one finishes it, and no shard is lost")
def concurrent_shards_of_one_unit(scheme):
    num_rows, num_threads = 64, 4
    w, experts = values(num_rows, 36), values(4, 16, 36)
    shards = [Write("fc.weight", w[i : i + 1], rows_of(i, i + 1)) for i in range(num_rows)]
    shards += [
        Write("experts.weight", experts[e, i], lambda p, source, e=e, i=i: p.data[e, i].copy_(source))
        for e in range(4)
        for i in range(16)
    ]
    for seed in range(4):
        order = list(shards)
        random.Random(seed).shuffle(order)
        parts = [order[i::num_threads] for i in range(num_threads)]
        steps = [Do("four threads, interleaved shards", lambda s, parts=parts: s.in_threads(parts))]
        load = Load(steps, {"fc.weight": w, "experts.weight": experts})
        yield Draft(f"order_{seed}", {"fc": (num_rows, 36), "experts": (4, 16, 36)}, load, {"threads"})


@row("E", "the loader works on its own device, whatever the thread's current one is")
def thread_without_current_device(scheme):
    w = values(6, 36)

    def elsewhere(session):
        def in_thread(inner):
            last = torch.cuda.device_count() - 1
            with torch.cuda.device(last):
                inner.write("fc.weight", w, lambda p, source: p.data.copy_(source))

        session.in_thread([Do("copy, another device being current", in_thread)])

    load = Load([Do("load in a thread", elsewhere)], {"fc.weight": w})
    yield Draft("", {"fc": (6, 36)}, load, {"threads", "cuda"})


@row(
    "E",
    "a copy that was asked not to wait is in the order of its stream: after an event its source may be written again",
)
def async_copy_and_buffer_reuse(scheme):
    w = values(48, 1024)

    def stream(session):
        on_gpu = session.adapter.device.type == "cuda"
        buffers = [torch.empty(8, 1024, dtype=torch.bfloat16, pin_memory=on_gpu) for _ in range(2)]
        events = [torch.cuda.Event() for _ in buffers] if on_gpu else []
        for i in range(8):
            if on_gpu:
                events[i % 2].synchronize()
            buffer = buffers[i % 2]
            if i >= 6:
                buffer.fill_(float("nan"))
                continue
            buffer.copy_(w[8 * i : 8 * i + 8])
            session.write(
                "fc.weight",
                buffer,
                lambda p, source, i=i: p.data[8 * i : 8 * i + 8].copy_(source, non_blocking=True),
            )
            if on_gpu:
                events[i % 2].record()

    load = Load([Do("six shards through two buffers", stream)], {"fc.weight": w})
    yield Draft("", {"fc": (48, 1024)}, load)


# Ranks. Half of each weight is on rank 0, the other half on rank 1: rows of `column`, columns of `row`.

SHAPES = {"column": (8, 48), "row": (12, 24)}


def _on_ranks(name, scheme, needs):
    scheme = scheme if scheme in ("per_tensor", "per_channel") else "per_tensor"  # whose scales can span ranks
    return Draft("", None, run=functools.partial(run_on_ranks, name=name, scheme=scheme), needs=needs)


def _halves(rank, seed=0):
    """The whole weights, and the parts of this rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = {"column": values(16, 48), "row": values(12, 48)}
    parts = {"column": whole["column"][8 * rank :][:8], "row": whole["row"][:, 24 * rank :][:, :24]}
    return whole, {name: part.contiguous() for name, part in parts.items()}


def _writes(parts, rank):
    """Row by row, each rank in an order of its own, both weights open at the same time."""
    shards = [(name, i) for name, w in parts.items() for i in range(len(w))]
    random.Random(rank).shuffle(shards)
    return [Write(f"{name}.weight", parts[name][i : i + 1], rows_of(i, i + 1)) for name, i in shards]


@row("C", "on request, scales equal those of the whole weight; never by a collective while weights arrive")
def tensor_parallel_scale(scheme):
    yield _on_ranks("unsharded_scales", scheme, {"ranks", "scale_group"})


@rank_case
def unsharded_scales(rank, scheme):
    whole, parts = _halves(rank)

    def equal(session):
        for name, w in whole.items():
            q, scale = session.adapter.result(session.model, f"{name}.weight")
            wanted, wanted_scale = session.adapter.expected(w, scheme)
            wanted = wanted[8 * rank :][:8] if name == "column" else wanted[:, 24 * rank :][:, :24]
            if name == "column" and scheme == "per_channel":
                wanted_scale = wanted_scale[8 * rank :][:8]
            assert_same_bits(q.detach().cpu(), wanted.contiguous(), f"{name}.weight of rank {rank}")
            assert_same_bits(scale.detach().cpu(), wanted_scale.contiguous(), f"{name}.weight_scale of rank {rank}")

    spanning = ["column", "row"] if scheme == "per_tensor" else ["row"]  # a row of `column` is on one rank
    load = Load(_writes(parts, rank), check=equal, facts={"scale_group": spanning})
    return build_one(SHAPES, load, scheme)


@row("E", "each rank completes weights in its own order: nothing waits for another rank in between")
def unordered_completion(scheme):
    yield _on_ranks("local_scales", scheme, {"ranks"})


@rank_case
def local_scales(rank, scheme):
    _, parts = _halves(rank)
    load = Load(_writes(parts, rank), {f"{name}.weight": w for name, w in parts.items()})
    return build_one(SHAPES, load, scheme)


@row("E", "the outcome is agreed before anyone commits: no rank serves what another one lacks")
def one_rank_fails(scheme):
    yield _on_ranks("agreed_outcome", scheme, {"ranks", "scale_group"})


@rank_case
def agreed_outcome(rank, scheme):
    _, parts = _halves(rank)

    def fail(session):
        if rank == 1:
            raise OSError("the disk is gone")

    facts = {"scale_group": ["row"]}
    writes = _writes(parts, rank)
    refused = Refused(OSError if rank == 1 else "load", restored=True)
    broken = Load([*writes, Do("one rank's disk fails", fail)], refused=refused, facts=facts)
    incomplete = Load(
        writes[:-1] if rank == 1 else writes,
        refused=Refused("incomplete" if rank == 1 else "load", restored=True),
        facts=facts,
    )
    return build_one(SHAPES, [broken, incomplete, Load(writes, facts=facts)], scheme)
