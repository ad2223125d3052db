"""Time on the current GPU, and what the numbers depend on."""

from __future__ import annotations

import datetime
import statistics
import subprocess
import time

import torch

import fp8_kernels as fk

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
ENOUGH_S = 0.1  # of repetitions; calls that take long are repeated less, but at least five times
# Of the copies whose fastest stands for the memory's bandwidth. Several, since some sizes
# copy a fifth slower than others: on an H100 those where source and target lay a power of two apart.
CEILING_NUMELS = (28672 * 8192, 500_000_000, 600_000_256)
CLEARING_S = 0.2  # more than 16 GB need
HOST_CALLS = 300  # between two synchronizations: fewer than the GPU's queue holds


class Clock:
    """Times calls on the current GPU."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self._cache = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._sink = torch.empty((), dtype=torch.int32, device="cuda")
        self._capturing = torch.cuda.Stream()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def flush(self):
        """Fill the L2 cache by reading: written lines would go to memory at the expense of the call that follows."""
        torch.amax(self._cache, 0, out=self._sink)

    def _rounds(self):
        began = time.perf_counter()
        for i in range(self.repeats):
            if i >= 5 and time.perf_counter() - began > ENOUGH_S:
                return
            yield i

    def graph(self, run) -> dict:
        """Microseconds of a replay on the GPU."""
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which gives cached memory back first: see give_back.
        torch.cuda.synchronize()
        with torch.cuda.stream(self._capturing):
            graph.capture_begin()
            try:
                result = run()
            finally:
                graph.capture_end()
        graph.replay()
        start, end = self._events
        times = []
        for _ in self._rounds():
            self.flush()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        del result
        return summary(times)

    def event(self, run) -> dict:
        """Microseconds of one plain call between two events, the host's gaps included, after *writing* 256 MiB.

        How the figures that the bars for one scale name were taken. The host queues the call while the L2 cache is
        being filled, and what was written there goes to memory during the call.
        """
        start, end = self._events
        times = []
        for _ in self._rounds():
            self._cache.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return summary(times)

    def call(self, run) -> tuple[dict, dict]:
        """Microseconds of a plain call until its result is there, and until the host is free."""
        whole, host = [], []
        for _ in self._rounds():
            self.flush()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            free = time.perf_counter()
            torch.cuda.synchronize()
            whole.append((time.perf_counter() - start) * 1e6)
            host.append((free - start) * 1e6)
        return summary(whole), summary(host)

    def host(self, run) -> dict:
        """Microseconds of the host for each of many calls in a row, of work so small that the GPU keeps up."""
        for _ in range(HOST_CALLS):
            run()
        times = []
        for _ in range(self.repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                run()
            times.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
        return summary(times)

    def copy_rate(self) -> float:
        """TB/s, read and written, of the fastest copy of a large tensor to another."""
        rates = []
        for numel in CEILING_NUMELS:
            source = torch.empty(numel, dtype=torch.bfloat16, device="cuda").normal_()
            target = torch.empty_like(source)
            rates.append(4 * numel / self.graph(lambda s=source, t=target: t.copy_(s))["median"] / 1e6)
        return max(rates)


def summary(times: list[float]) -> dict:
    """Median, and the range that holds the middle eight tenths."""
    times = sorted(times)
    cut = len(times) // 10
    return {
        "median": round(statistics.median(times), 2),
        "low": round(times[cut], 2),
        "high": round(times[-1 - cut], 2),
    }


def give_back():
    """Give cached memory back to the driver, and wait until it is cleared: kernels beside that take a sixth longer."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    time.sleep(CLEARING_S)


def is_lost() -> bool:
    """Whether a kernel's fault ended this process's use of the GPU: every later call would report the same error."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def count_launches(run) -> int:
    """How many kernels, copies and fills a call runs on the GPU, as the profiler saw them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


class Budget:
    """Seconds that a run may take, and what was left out when they were spent."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.perf_counter() + seconds
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        """Whether there is time left; where not, `what` is noted."""
        if self._end is None or time.perf_counter() < self._end:
            return True
        if what not in self.left_out:
            self.left_out.append(what)
        return False

    def spend(self, what: str):
        """Nothing more is started; `what` is noted."""
        self._end = 0.0
        self.left_out.append(what)


def machine() -> dict:
    """What the numbers depend on."""
    import triton

    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fp8_kernels": fk.__version__,
        "date": datetime.date.today().isoformat(),
    }
