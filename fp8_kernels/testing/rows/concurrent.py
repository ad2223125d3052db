"""Threads, ranks and streams that load at the same time."""

from __future__ import annotations

import random
import threading

import torch

from ..case import Do, Load, Refused, Write, values
from .registry import Draft, row
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


@row("E", "a copy that was asked to be asynchronous has read its source when the source is written again")
def async_copy_and_buffer_reuse(scheme):
    w = values(48, 1024)

    def stream(session):
        pinned = session.adapter.device.type == "cuda"
        buffers = [torch.empty(8, 1024, dtype=torch.bfloat16, pin_memory=pinned) for _ in range(2)]
        for i in range(6):
            buffer = buffers[i % 2]
            buffer.copy_(w[8 * i : 8 * i + 8])
            session.write(
                "fc.weight",
                buffer,
                lambda p, source, i=i: p.data[8 * i : 8 * i + 8].copy_(source, non_blocking=True),
            )
        for buffer in buffers:
            buffer.fill_(float("nan"))

    load = Load([Do("six shards through two buffers", stream)], {"fc.weight": w})
    yield Draft("", {"fc": (48, 1024)}, load)
