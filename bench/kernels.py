"""How fast are the kernels, beside everybody else's? Measures on a CUDA GPU, saves JSON, prints a table.

    python -m bench.kernels [--shapes 4096x4096 128x1536x2048 ...] [--schemes per_tensor cast ...]
                            [--backends cuda triton] [--peers DIR] [--json FILE] [--quick]
    python -m bench.kernels --table FILE    # the table of results saved before, with --shapes every peer on those

Per weight, kind of call and implementation, each with the L2 cache flushed:

    graph   GPU time of one replay of the call captured in a CUDA graph: no host in it
    call    from an idle GPU: host time from before the call until its result is there
    host    the part of `call` after which the host is free again

Every result is compared with the weight that it came from; an implementation that is wrong is no one's rival.
The exit code is 2 without a GPU, 1 where one of our own backends failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import fp8_kernels as fk
from bench import peers
from bench.tables import CASES, DEFAULT_CASES, QUANTIZE, SCHEME_OF, is_right, line_of, peer_table, report
from fp8_kernels.schemes import as_scheme

RESULTS = Path(__file__).parent / "results"
SHAPES = (
    (4096, 4096),
    (14336, 4096),
    (28672, 8192),
    (128, 1536, 2048),
    (60, 2816, 2048),
    (64, 2048, 2048),
    (8, 28672, 4096),
)
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
# Of the copies whose fastest stands for the memory's bandwidth. Several, since some sizes
# copy a fifth slower than others: on an H100 those where source and target lay a power of two apart.
CEILING_NUMELS = (28672 * 8192, 500_000_000, 600_000_256)

# Our own backends, in the form of the peers.


def ours(case: str, backend: str):
    """`bind(w) -> run` of one of our backends, writing into outputs allocated in advance."""
    scheme = as_scheme(SCHEME_OF[case])

    def bind(w):
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
    elif case in ("amax", "dequantize"):
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
            scale = scale.reshape(scheme.scale_shape(expert.shape))
            part = fk.dequantize(q.contiguous(), scale.contiguous(), torch.float32, scheme, backend="reference")
        got = part.float().reshape(wanted.shape)
        worst = max(worst, ((got - wanted).norm() / wanted.norm()).item())
    return worst


# Time.


class Clock:
    """Times calls on the current GPU."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self._cache = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._sink = torch.empty((), dtype=torch.int32, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def flush(self):
        """Fill the L2 cache by reading: written lines would go to memory at the expense of the call that follows."""
        torch.amax(self._cache, 0, out=self._sink)

    def graph(self, run) -> dict:
        """Microseconds of a replay on the GPU."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        graph.replay()
        start, end = self._events
        times = []
        for _ in range(self.repeats):
            self.flush()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        del result
        return summary(times)

    def call(self, run) -> tuple[dict, dict]:
        """Microseconds of a plain call until its result is there, and until the host is free."""
        whole, host = [], []
        for _ in range(self.repeats):
            self.flush()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            free = time.perf_counter()
            torch.cuda.synchronize()
            whole.append((time.perf_counter() - start) * 1e6)
            host.append((free - start) * 1e6)
        return summary(whole), summary(host)


def summary(times: list[float]) -> dict:
    """Median, and the range that holds the middle eight tenths."""
    times = sorted(times)
    cut = len(times) // 10
    return {
        "median": round(statistics.median(times), 2),
        "low": round(times[cut], 2),
        "high": round(times[-1 - cut], 2),
    }


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
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        row["error"] = f"{type(error).__name__}: {first_line}"[:300]


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


def copy_rate(clock: Clock, numel: int) -> float:
    """TB/s, read and written, of a copy of that many bf16 elements."""
    source = torch.empty(numel, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 4 * numel / clock.graph(lambda: target.copy_(source))["median"] / 1e6


def run_all(args, save) -> dict:
    """Measure everything asked for; `save(results)` after each weight, so that a crash costs one weight."""
    found, absent = peers.load(args.peers)
    clock = Clock(5 if args.quick else 20)
    copy_tb_per_s = max(copy_rate(clock, numel) for numel in CEILING_NUMELS)
    results = {
        "machine": machine(),
        "repeats": clock.repeats,
        "copy_tb_per_s": round(copy_tb_per_s, 3),
        "absent": absent,
        "rows": [],
    }
    for compiled in (False,) if args.quick else (False, True):
        for shape in args.shapes:
            torch.manual_seed(0)
            w = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
            for case in args.schemes:
                rivals = {n: bind for n, bind in found.get(case, {}).items() if (n == peers.COMPILED) == compiled}
                own = {} if compiled else {backend: ours(case, backend) for backend in args.backends}
                for name, bind in {**own, **rivals}.items():
                    row = {"shape": list(shape), "case": case, "name": name, "ours": name in own}
                    measure(row, clock, w, bind)
                    results["rows"].append(row)
                    print(line_of(row), file=sys.stderr, flush=True)
                    torch.cuda.empty_cache()
            save(results)
    return results


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
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no torch.compile")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of saved results, measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        saved = json.loads(args.table.read_text())
        print(report(saved), *(peer_table(saved, shape) for shape in args.shapes or ()), sep="\n\n")
        return 0
    if not torch.cuda.is_available():
        print("bench.kernels needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    args.shapes = args.shapes or SHAPES
    args.backends = args.backends or [b for b in ("cuda", "triton") if b in fk.available_backends("cuda")]
    path = args.json or results_file(torch.cuda.get_device_name())

    def save(results):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")

    results = run_all(args, save)
    print(report(results))
    print(f"\nsaved in {path}")
    return int(any(row["ours"] and not is_right(row) for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
