"""Cases of several ranks: each rank is a process, and runs a case of its own."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD = 2
TIMEOUT = datetime.timedelta(seconds=60)

_CASES: dict[str, Callable] = {}  # name -> (rank, scheme) -> LoaderCase
_OUTCOMES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # adapter -> scheme -> name -> what ranks said


def rank_case(function: Callable) -> Callable:
    """Register what a rank runs: `function(rank, scheme)` gives its case."""
    _CASES[function.__name__] = function
    return function


def run_on_ranks(adapter, name: str, scheme: str):
    """Run that case on all ranks. Processes take seconds to start, so the first call runs the cases of all names.

    Raises:
        AssertionError: what a rank says.
    """
    by_scheme = _OUTCOMES.setdefault(adapter, {})
    if scheme not in by_scheme:
        by_scheme[scheme] = _run_all(adapter, scheme)
    said = by_scheme[scheme][name]
    assert all(text == "ok" for text in said), "; ".join(
        f"rank {rank}: {text.strip().splitlines()[-1]}" for rank, text in enumerate(said) if text != "ok"
    )


def _run_all(adapter, scheme):
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_run_rank, args=(rank, folder, adapter, scheme)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(3 * TIMEOUT.total_seconds())
            process.kill()
            process.join()
        files = {name: [Path(folder) / f"{name}.{rank}" for rank in range(WORLD)] for name in _CASES}
        return {name: [f.read_text() if f.exists() else "not reached" for f in fs] for name, fs in files.items()}


def _run_rank(rank, folder, adapter, scheme):
    """One process: every case, until one fails, since ranks are not in step after that."""
    from .runner import run_case

    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    for name, make in _CASES.items():
        try:
            run_case(adapter, make(rank, scheme))
        except BaseException:
            (Path(folder) / f"{name}.{rank}").write_text(traceback.format_exc())
            os._exit(1)  # what the other rank waits for ends with it
        (Path(folder) / f"{name}.{rank}").write_text("ok")
    dist.destroy_process_group()
