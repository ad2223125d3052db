"""How fast are the kernels, beside everybody else's? Measures on a CUDA GPU, saves JSON, prints tables.

    python -m bench.kernels [--shapes 4096x4096 128x1536x2048 ...] [--schemes per_tensor cast ...]
                            [--backends cuda triton] [--peers DIR] [--json FILE] [--budget SECONDS] [--quick] [--warm]
    python -m bench.kernels --table FILE    # the tables of results saved before, with --shapes every peer on those

Per weight, kind of call and implementation, each with the L2 cache flushed:

    graph   GPU time of one replay of the call captured in a CUDA graph: no host in it
    call    from an idle GPU: host time from before the call until its result is there
    host    the part of `call` after which the host is free again
    event   per_tensor: one plain call between two events, the host's gaps included

First what calls cost the host (`bench.host`); after the weights that have bars a sweep over sizes, then the other
weights and slow peers: with --budget the run stops cleanly and says what it left out. With --warm, processes side by
side compile before what Triton would else compile between the measurements. Every result is compared with the weight
that it came from; an implementation that is wrong is no one's rival. The exit code is 2 without a GPU, 1 where one of
our own backends failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

import fp8_kernels as fk
from bench import host, peers
from bench.bars import bars_table
from bench.measure import Budget, Clock, count_launches, give_back, is_lost, machine
from bench.tables import CASES, DEFAULT_CASES, QUANTIZE, SCHEME_OF, is_right, line_of, peer_table, report
from fp8_kernels import reference
from fp8_kernels.schemes import as_scheme

RESULTS = Path(__file__).parent / "results"
SHAPES = (
    (4096, 4096),
    (128, 1536, 2048),
    (28672, 8192),
    (60, 2816, 2048),
    (14336, 4096),
    (6144, 4096),
    (64, 2048, 2048),
    (128, 768, 2048),
    (64, 4096, 7168),
    (256, 512, 2048),
    (57344, 8192),
    (128, 2048, 768),
    # No bar names the following.
    (28672, 4096),
    (8, 28672, 4096),
    (256, 4096, 7168),
)
# Made of torch operations: many times slower, so on two weights only, and last, since compiling takes seconds a case.
SLOW_PEERS = ("torch", "transformers", peers.COMPILED)
SLOW_SHAPES = SHAPES[:2]
SWEEP_BEFORE = (28672, 4096)
SWEEP_CASES = ("per_tensor", "per_channel", "per_block", "per_group")
SWEEP_COLS = 4096
SWEEP_BYTES = [int(2 ** (i / 2)) for i in range(32, 65)]  # of bf16: 64 KB to 4 GB in steps of sqrt(2)
SWEEP_PEERS_TO = 1 << 30

# Our own backends, in the form of the peers.


def ours(case: str, backend: str):
    """`bind(w) -> run` of one of our backends, writing into outputs allocated in advance."""
    scheme = as_scheme(SCHEME_OF[case])

    def bind(w):
        if case == "copy_amax":
            staged, slot = torch.empty_like(w), torch.zeros(scheme.scale_shape(w.shape), device=w.device)
            return lambda: fk.copy_amax(w, staged, slot, scheme, backend=backend)
        q = torch.empty_like(w, dtype=torch.float8_e4m3fn)
        scale = torch.empty(scheme.scale_shape(w.shape), dtype=scheme.scale_dtype, device=w.device)
        if case == "amax":
            return lambda: fk.amax(w, scheme, out=scale, backend=backend)
        if case == "cast":
            found = fk.amax(w, scheme, backend=backend)
            return lambda: fk.quantize(w, scheme, out=(q, scale), amax=found, backend=backend)
        if case == "dequantize":
            fk.quantize(w, scheme, out=(q, scale), backend=backend)
            back = torch.empty_like(w)
            return lambda: fk.dequantize(q, scale, scheme=scheme, out=back, backend=backend)
        return lambda: fk.quantize(w, scheme, out=(q, scale), backend=backend)

    return bind


def relative_error(case: str, w: torch.Tensor, result) -> float | None:
    """How far a call's result is from the weight; None where its layout is not one that we can read.

    `|w - q * scale| / |w|`, the larger of that over the first and the last expert; of amax and dequantize the same
    for what they return.
    """
    scheme = as_scheme(SCHEME_OF[case])
    ends = slice(None, None, max(len(w) - 1, 1))  # the first expert and the last
    experts = w[ends] if w.ndim == 3 else [w]
    if isinstance(result, list):
        parts = result[ends]
    elif case in ("amax", "copy_amax", "dequantize"):
        parts = result.reshape(len(w), -1)[ends] if w.ndim == 3 else [result]
    else:
        q, scale = result
        shape = scheme.scale_shape(w.shape)
        if scale.numel() != torch.Size(shape).numel():
            return None
        q, scale = q.reshape(w.shape), scale.reshape(shape)
        parts = list(zip(q[ends], scale[ends], strict=True)) if w.ndim == 3 else [(q, scale)]
    worst = 0.0
    for expert, part in zip(experts, parts, strict=True):
        wanted = expert.abs().amax().float() if case == "amax" else expert.float()
        if case in QUANTIZE or case == "cast":
            q, scale = part
            units = q[None], scale.reshape(1, *(scheme.scale_shape(expert.shape) or (1, 1)))
            part = reference.dequantize(*units, torch.float32, *scheme.block)[0]
        got = part.float().reshape(wanted.shape)
        worst = max(worst, ((got - wanted).norm() / wanted.norm()).item())
    return worst


def measure(row: dict, clock: Clock, w: torch.Tensor, bind):
    """Fill in one row; what fails is recorded as the row's error, and whatever was measured before it stays."""
    try:
        began = time.perf_counter()
        run = bind(w)
        result = run()
        torch.cuda.synchronize()
        row["prepare_s"] = round(time.perf_counter() - began, 2)
        row["relative_error"] = relative_error(row["case"], w, result)
        del result
        for _ in range(2):
            run()
        row["call_us"], row["host_us"] = clock.call(run)
        row["graph_us"] = clock.graph(run)
        if row["case"] == "per_tensor":
            row["event_us"] = clock.event(run)
        if row["ours"]:
            row["launches"] = count_launches(run)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        row["error"] = f"{type(error).__name__}: {first_line}"[:300]


def run_all(args, save) -> dict:
    """Measure everything asked for; `save(results)` after each weight, so that a crash costs one weight."""
    found, absent = peers.load(args.peers)
    clock, budget = Clock(5 if args.quick else 20), Budget(args.budget)
    results = {
        "machine": machine(),
        "repeats": clock.repeats,
        "copy_tb_per_s": round(clock.copy_rate(), 3),
        "absent": absent,
        "rows": [],
    }
    if not args.quick:
        results["host"] = host.measure(clock, args.peers)
    slow = {name for name in SLOW_PEERS if name != peers.COMPILED or not args.quick}
    split = args.shapes.index(SWEEP_BEFORE) if SWEEP_BEFORE in args.shapes else len(args.shapes)
    for shapes in (args.shapes[:split], args.shapes[split:]):
        for shape in shapes:
            measure_weight(results, clock, budget, shape, args, found, set(SLOW_PEERS))
            save(results)
        if "sweep" not in results and not args.quick:
            results["sweep"] = sweep(clock, budget, args, found)
            save(results)
    for shape in args.shapes if len(args.shapes) <= len(SLOW_SHAPES) else SLOW_SHAPES:
        everyone_else = {name for by_name in found.values() for name in by_name} - slow
        measure_weight(results, clock, budget, shape, args, found, everyone_else, own=False)
        save(results)
    results["left_out"] = budget.left_out
    save(results)
    return results


def measure_weight(results, clock, budget, shape, args, found, without, own=True):
    """All rows of one weight, but for the peers `without`."""
    size = "x".join(map(str, shape))
    if not budget.allows(size):
        return
    torch.manual_seed(0)
    w = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    for case in args.schemes:
        binds = {backend: ours(case, backend) for backend in args.backends} if own else {}
        binds |= {name: bind for name, bind in found.get(case, {}).items() if name not in without}
        for name, bind in binds.items():
            if not budget.allows(f"{size} {case} {name}"):
                continue
            row = {"shape": list(shape), "case": case, "name": name, "ours": name in args.backends}
            measure(row, clock, w, bind)
            results["rows"].append(row)
            print(line_of(row), file=sys.stderr, flush=True)
            if "error" in row and is_lost():
                return budget.spend(f"{size} after {case} {name}, which lost the GPU")
            if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory // 3:
                give_back()


def sweep(clock, budget, args, found) -> list[dict]:
    """Graph times over sizes; of peers at every fourth size."""
    rows = []
    for i, num_bytes in enumerate(SWEEP_BYTES):
        num_rows = max(1, num_bytes // (2 * SWEEP_COLS))
        if not budget.allows(f"sweep from {num_bytes >> 10} KB"):
            return rows
        w = torch.empty((num_rows, SWEEP_COLS), dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        for case in SWEEP_CASES:
            binds = {backend: ours(case, backend) for backend in args.backends}
            if i % 4 == 0 and num_bytes <= SWEEP_PEERS_TO:
                binds |= {n: bind for n, bind in found.get(case, {}).items() if n not in SLOW_PEERS}
            for name, bind in binds.items():
                row = {"bytes": w.numel() * 2, "case": case, "name": name, "ours": name in args.backends}
                try:
                    run = bind(w)
                    run()
                    run()
                    row["graph_us"] = clock.graph(run)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:200]
                rows.append(row)
                run = None
        del w
    give_back()
    return rows


def warm_all(args):
    """Run each case once, in a process for each length of rows: what it compiles stays in the compilers' caches."""
    smallest = {}
    for shape in sorted(args.shapes, key=math.prod):
        smallest.setdefault(shape[-1], shape)
    command = [sys.executable, "-m", "bench.kernels", "--only-warm", "--schemes", *args.schemes]
    command += ["--backends", *args.backends] + (["--peers", args.peers] if args.peers else [])
    shapes = ["x".join(map(str, shape)) for shape in smallest.values()]
    for process in [subprocess.Popen([*command, "--shapes", shape]) for shape in shapes]:
        process.wait()


def warm(args):
    """Run each case once."""
    found, _ = peers.load(args.peers)
    w = torch.empty(args.shapes[0], dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    for case in args.schemes:
        binds = {backend: ours(case, backend) for backend in args.backends} | found.get(case, {})
        for name, bind in binds.items():
            if name not in SLOW_PEERS:
                # What cannot run is reported where it is measured.
                with contextlib.suppress(Exception):
                    bind(w)()


# Command line.


def _shape(text):
    if not re.fullmatch(r"\d+x\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"a shape must be NxK or ExNxK, got {text!r}")
    return tuple(map(int, text.split("x")))


def results_file(gpu: str) -> Path:
    """Where results of that GPU go by default."""
    return RESULTS / f"kernels_{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="SHAPE", help="NxK or ExNxK")
    parser.add_argument(
        "--schemes", nargs="+", choices=CASES, default=DEFAULT_CASES, metavar="SCHEME", help=", ".join(CASES)
    )
    parser.add_argument("--backends", nargs="+", choices=("cuda", "triton"), help="default: those that are there")
    parser.add_argument("--peers", metavar="DIR", help="shared libraries of peers that are not installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/kernels_<GPU>.json")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop starting measurements after that")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no torch.compile, no sweep")
    parser.add_argument("--warm", action="store_true", help="compile everything first, on many processors")
    parser.add_argument("--only-warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of saved results, measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        saved = json.loads(args.table.read_text())
        print(report(saved), bars_table(saved), *(peer_table(saved, shape) for shape in args.shapes or ()), sep="\n\n")
        return 0
    if not torch.cuda.is_available():
        print("bench.kernels needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    args.shapes = args.shapes or SHAPES
    args.backends = args.backends or [b for b in ("cuda", "triton") if b in fk.available_backends("cuda")]
    if args.only_warm:
        warm(args)
        return 0
    if args.warm:
        warm_all(args)
    path = args.json or results_file(torch.cuda.get_device_name())

    def save(results):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")

    results = run_all(args, save)
    print(report(results), bars_table(results), sep="\n\n")
    print(f"\nsaved in {path}")
    return int(any(row["ours"] and not is_right(row) for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
