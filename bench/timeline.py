"""When one load copies, computes and keeps the host busy, as torch's profiler saw it; `bench.plot` draws it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

BINS = 400
LANES = ("host to device", "kernels", "device to device", "host waits")
_WAITS = ("Synchronize", "cudaMemcpyAsync", "cudaMemcpy", "cudaEventQuery", "cudaMalloc", "cudaHost", "cudaFree")


def record(run: Callable[[], object]) -> dict:
    """`{"seconds", "lanes": {name: share of each of BINS equal parts in which it was busy}}` of one call.

    The host is busy from beginning to end, but for what it waits in CUDA's own calls.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    spans: dict[str, list[tuple[float, float]]] = {lane: [] for lane in LANES}
    for event in profiler.events():
        lane = _lane(event)
        if lane is not None:
            spans[lane].append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    starts = [start for lane in spans.values() for start, _ in lane]
    if not starts:
        raise RuntimeError("the profiler saw no work on the GPU")
    return {"seconds": seconds, "lanes": {lane: shares(each, min(starts), seconds) for lane, each in spans.items()}}


def _lane(event):
    name = event.name
    if event.device_type != torch.autograd.DeviceType.CUDA:
        return "host waits" if any(word in name for word in _WAITS) else None
    if name.startswith("Memset"):
        return None
    if name.startswith("Memcpy"):
        return "host to device" if "HtoD" in name else "device to device" if "DtoD" in name else None
    return "kernels"


def shares(spans: Iterable[tuple[float, float]], start: float, seconds: float, bins: int = BINS) -> list[float]:
    """The share of each of `bins` equal parts of `seconds` from `start` on that one span or more covers."""
    width, covered, reached = seconds / bins, [0.0] * bins, start
    for begin, end in sorted(spans):
        begin, end = max(begin, reached), min(end, start + seconds)
        reached = max(reached, end)
        while begin < end:
            part = min(int((begin - start) / width), bins - 1)
            stop = min(end, start + (part + 1) * width) if part < bins - 1 else end
            if stop <= begin:  # rounding has put the border behind us
                stop = min(end, begin + width)
            covered[part] += stop - begin
            begin = stop
    return [round(min(each / width, 1.0), 3) for each in covered]
