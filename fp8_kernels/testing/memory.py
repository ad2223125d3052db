"""How much memory a piece of code needed beyond what it leaves behind."""

from __future__ import annotations

import itertools

import torch


class Excess:
    """A context that measures the peak of allocated bytes, minus what is allocated when it ends, on one device.

    On CUDA from the allocator's statistics, whose peaks entering it resets; on the CPU from every allocation that
    torch makes, as its profiler sees them.

    Attributes:
        allocated: bytes; None until the context is left.
        reserved: bytes that the allocator held at most, minus the same end; None on the CPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.allocated: int | None = None
        self.reserved: int | None = None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            )
            self._profile.__enter__()
        return self

    def __exit__(self, *exc):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            resident = torch.cuda.memory_allocated(self.device)
            self.allocated = torch.cuda.max_memory_allocated(self.device) - resident
            self.reserved = torch.cuda.max_memory_reserved(self.device) - resident
            return
        self._profile.__exit__(*exc)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        levels = [0, *itertools.accumulate(e.nbytes() for e in events)]
        self.allocated = max(levels) - levels[-1]
