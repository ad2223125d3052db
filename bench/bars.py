"""What the kernels are held to, read from saved results: pure functions, printed by `bench.kernels`."""

from __future__ import annotations

import math

from bench.tables import case_rows, floor_us, is_right, median

ONE_READ = ("per_channel", "per_block", "per_group", "cast")
NEIGHBOURS_FROM = 16 << 20  # bytes


def bars(results: dict, backend: str = "cuda") -> list[tuple[str, float, float, bool]]:
    """(what, figure, bar, whether more is better) for all that was measured.

    Args:
        backend: whose figures; Triton is held against CUDA besides.
    """
    rows = []

    def bar(what, figures, limit, more=True):
        figures = [figure for figure in figures if figure is not None]
        if figures:
            rows.append((what, (min if more else max)(figures), limit, more))

    here = {(tuple(row["shape"]), row["case"]) for row in results["rows"] if row["name"] == backend and is_right(row)}
    large = [key for key in here if math.prod(key[0]) >= 100_000_000 and key[1] in ONE_READ]
    bar(
        "one-read schemes, 100M elements and more: of copy bandwidth",
        [_of_floor(results, *k, backend) for k in large],
        0.95,
    )
    bar("the same: of the best peer's speed", [_times(results, *k, backend) for k in large], 1.00)
    square = (4096, 4096)
    bar(
        "one-read schemes, 4096x4096: of the best peer's speed",
        [_times(results, square, c, backend) for c in ONE_READ],
        1.10,
    )
    for shape, limit in [
        ((4096, 4096), 1.40),
        ((6144, 4096), 1.40),
        ((14336, 4096), 1.15),
        ((28672, 8192), 1.0),
        ((57344, 8192), 1.0),
    ]:
        bar(
            f"per_tensor {_size(shape)}: of the best peer's speed",
            [_times(results, shape, "per_tensor", backend)],
            limit,
        )
        bar(
            f"per_tensor {_size(shape)}: the same by calls between events",
            [_times(results, shape, "per_tensor", backend, part="event_us")],
            limit,
        )
    for shape in [(28672, 8192), (57344, 8192), (64, 4096, 7168)]:
        bar(
            f"per_tensor {_size(shape)}: of its 5-byte floor",
            [_of_floor(results, shape, "per_tensor", backend, 2)],
            0.97,
        )
    experts = {(60, 2816, 2048): 0.90, (64, 2048, 2048): 0.90, (128, 1536, 2048): 0.85}
    experts |= dict.fromkeys([(128, 768, 2048), (128, 2048, 768), (256, 512, 2048)], 0.75)
    for shape, limit in experts.items():
        bar(
            f"per_tensor {_size(shape)}: of the 3-byte floor", [_of_floor(results, shape, "per_tensor", backend)], limit
        )
    for shape, limit in [((60, 2816, 2048), 5.5), ((64, 2048, 2048), 5.5), ((128, 1536, 2048), 9.0)]:
        loop = _times(results, shape, "per_tensor", backend, "vLLM online")
        bar(f"per_tensor {_size(shape)}: times vLLM's loop", [loop], limit)
        loop = _times(results, shape, "per_tensor", backend, "vLLM online", "event_us")
        bar(f"per_tensor {_size(shape)}: the same by calls between events", [loop], limit)
    bar("sweep above 16 MB: largest step of time per element", [_steps(results, backend)], 1.15, more=False)
    for name, limit in [("out=", 15), ("allocating", 30)]:
        calls = [
            t["median"]
            for call, t in results.get("host", {}).items()
            if call.startswith("quantize per") and call.endswith(name)
        ]
        bar(f"host time of quantize, {name}, us", [max(calls)] if calls else [], limit, more=False)
    counts = [row["launches"] for row in results["rows"] if row["name"] == backend and "launches" in row]
    bar("launches an op", counts, 1, more=False)
    both = [(shape, case) for shape, case in here if _row(results, shape, case, "triton")]
    against = [_us(results, *k, backend) / _us(results, *k, "triton") for k in both if k[1] in ONE_READ]
    bar("Triton, one-read schemes: of our CUDA's speed", against, 0.90)
    twice = [
        _of_floor(results, *k, "triton", 2) for k in both if k[1] == "per_tensor" and math.prod(k[0]) >= 100_000_000
    ]
    bar("Triton, per_tensor, 100M elements and more: of the 5-byte floor", twice, 0.95)
    return rows


def bars_table(results: dict) -> str:
    """Markdown; empty where nothing that has a bar was measured."""
    rows = bars(results)
    if not rows:
        return ""
    lines = ["| what (the worst case) | measured | bar | |", "| --- | ---: | ---: | --- |"]
    for what, figure, limit, more in rows:
        met = figure >= limit if more else figure <= limit
        lines.append(
            f"| {what} | {figure:.2f} | {'at least' if more else 'at most'} {limit:.2f} | {'' if met else 'missed'} |"
        )
    return "\n".join(lines)


def _size(shape):
    return "x".join(map(str, shape))


def _row(results, shape, case, name):
    return next((r for r in case_rows(results, shape, case) if r["name"] == name and is_right(r)), None)


def _us(results, shape, case, name, part="graph_us"):
    row = _row(results, shape, case, name)
    return None if row is None else median(row, part)


def _of_floor(results, shape, case, name, reads=1):
    us = _us(results, shape, case, name)
    return None if us is None else floor_us(case, shape, results["copy_tb_per_s"], reads) / us


def _times(results, shape, case, name, rival=None, part="graph_us"):
    """How many of ours fit into the rival's time, the fastest's where none is named."""
    us = _us(results, shape, case, name, part)
    rivals = [
        r
        for r in case_rows(results, shape, case)
        if not r["ours"] and is_right(r) and part in r and rival in (None, r["name"])
    ]
    if us is None or not rivals:
        return None
    return min(median(r, part) for r in rivals) / us


def _steps(results, name):
    """The largest ratio of times per element between neighbouring sizes, of any case."""
    worst = None
    for case in {row["case"] for row in results.get("sweep", ())}:
        line = [r for r in results["sweep"] if r["case"] == case and r["name"] == name and "graph_us" in r]
        line = sorted((r["bytes"], median(r, "graph_us") / r["bytes"]) for r in line if r["bytes"] >= NEIGHBOURS_FROM)
        for (_, a), (_, b) in zip(line, line[1:], strict=False):
            worst = max(worst or 0, a / b, b / a)
    return worst
