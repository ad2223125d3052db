"""How much memory a load needed beyond the model that it leaves behind."""

from __future__ import annotations

import itertools

import torch


class Excess:
    """A context that measures the peak of allocated bytes on one device, minus those by which the model has grown.

    On CUDA from the allocator's statistics, whose peaks entering it resets; on the CPU from every allocation that
    torch makes, as its profiler sees them.

    Attributes:
        allocated: bytes; None until the context is left.
        reserved: likewise, of what the allocator held; None on the CPU.
    """

    def __init__(self, device: torch.device, model: torch.nn.Module):
        self.device, self._model = device, model
        self.allocated: int | None = None
        self.reserved: int | None = None

    def __enter__(self):
        self._before = self._model_bytes()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            )
            self._profile.__enter__()
        return self

    def __exit__(self, *exc):
        grown = self._model_bytes() - self._before
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.allocated = torch.cuda.max_memory_allocated(self.device) - self._start[0] - grown
            self.reserved = torch.cuda.max_memory_reserved(self.device) - self._start[1] - grown
            return
        self._profile.__exit__(*exc)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        self.allocated = max(itertools.accumulate((e.nbytes() for e in events), initial=0)) - grown

    def _model_bytes(self):
        """Of the storages on the device that the model's tensors are in, each once."""
        tensors = itertools.chain(self._model.parameters(), self._model.buffers())
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if self._is_here(t)}
        return sum(storages.values())

    def _is_here(self, t):
        return t.device.type == self.device.type
