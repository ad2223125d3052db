"""What `bench.kernels` counts and prints: pure functions of shapes and saved results."""

from __future__ import annotations

import math

from fp8_kernels.schemes import as_scheme

# What is timed: quantize by scheme; its two halves for per_tensor; a copy with the amax; the way back.
QUANTIZE = ("per_tensor", "per_channel", "per_block", "per_group", "mxfp8")
CASES = (*QUANTIZE, "cast", "amax", "copy_amax", "dequantize")
DEFAULT_CASES = tuple(case for case in CASES if case != "mxfp8")
SCHEME_OF = {
    **{case: case for case in QUANTIZE},
    "cast": "per_tensor",
    "amax": "per_tensor",
    "copy_amax": "per_tensor",
    "dequantize": "per_channel",
}
MAX_ERROR = 0.05  # relative, of quantized normal numbers; e4m3 gives 0.026


def must_move(case: str, shape: tuple[int, ...], reads: int = 1) -> int:
    """Bytes that no implementation can avoid for a bf16 weight of that shape.

    Args:
        reads: how often the weight is read; twice is the least for one scale over more than a chip holds.
    """
    scheme = as_scheme(SCHEME_OF[case])
    numel, scales = math.prod(shape), math.prod(scheme.scale_shape(shape)) * scheme.scale_dtype.itemsize
    if case == "amax":
        return 2 * numel * reads + scales
    if case == "copy_amax":
        return 2 * numel * reads + 2 * numel + scales
    if case == "dequantize":
        return numel + scales + 2 * numel
    given = scales if case == "cast" else 0
    return 2 * numel * reads + given + numel + scales


def table(results: dict) -> str:
    """Markdown: one row a weight and case, our backends beside the fastest of the others."""
    rows = results["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows if row["ours"]))
    header = ["weight", "what", "floor", *names, "of floor", "TB/s", "fastest other", "its time", "times"]
    header += [f"{name} {part}" for name in names for part in ("call", "host")]
    counted = any("launches" in row for row in rows)
    header += ["launches"] if counted else []
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    lines[1][header.index("fastest other")] = "---"
    for shape, case in dict.fromkeys((tuple(row["shape"]), row["case"]) for row in rows):
        here = case_rows(results, shape, case)
        own = {row["name"]: row for row in here if row["ours"]}
        measured = [median(row, "graph_us") for row in own.values()]
        best = min((us for us in measured if us is not None), default=None)
        rivals = [row for row in here if not row["ours"] and is_right(row)]
        rival = min(rivals, key=lambda row: median(row, "graph_us"), default=None)
        floor = floor_us(case, shape, results["copy_tb_per_s"])
        of_floor = "" if best is None else f"{floor / best:.2f}"
        if best is not None and case == "per_tensor":
            of_floor += f" ({floor_us(case, shape, results['copy_tb_per_s'], reads=2) / best:.2f})"
        lines.append(
            [
                _size(shape),
                case,
                _number(floor),
                *(_number(median(own.get(name, {}), "graph_us")) for name in names),
                of_floor,
                "" if best is None else f"{must_move(case, shape) / best / 1e6:.2f}",
                "" if rival is None else rival["name"],
                "" if rival is None else _number(median(rival, "graph_us")),
                "" if rival is None or best is None else f"{median(rival, 'graph_us') / best:.2f}",
                *(_number(median(own.get(name, {}), part)) for name in names for part in ("call_us", "host_us")),
                *([" / ".join(str(own.get(name, {}).get("launches", "-")) for name in names)] if counted else ()),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def event_table(results: dict) -> str:
    """Markdown: per_tensor by plain calls between two events, ours beside the fastest of the others; may be empty."""
    lines = [
        ["weight", "cuda", "triton", "fastest other", "its time", "times"],
        ["---", "---:", "---:", "---", "---:", "---:"],
    ]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in results["rows"] if "event_us" in row):
        here = [row for row in case_rows(results, shape, "per_tensor") if is_right(row) and "event_us" in row]
        own = {row["name"]: median(row, "event_us") for row in here if row["ours"]}
        rival = min((r for r in here if not r["ours"]), key=lambda r: median(r, "event_us"), default=None)
        line = [_size(shape), _number(own.get("cuda")), _number(own.get("triton"))]
        if rival is None or not own:
            lines.append([*line, "", "", ""])
        else:
            us = median(rival, "event_us")
            lines.append([*line, rival["name"], _number(us), f"{us / min(own.values()):.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if len(lines) > 2 else ""


def sweep_table(results: dict) -> str:
    """Markdown: microseconds and TB/s of our first backend, by size of the weight."""
    rows = results["sweep"]
    name = next((r["name"] for r in rows if r["ours"]), None)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = [["bf16 weight", *(f"{case}, {name}" for case in cases)], ["---:"] * (1 + len(cases))]
    for size in dict.fromkeys(row["bytes"] for row in rows):
        cells = []
        for case in cases:
            mine = (r for r in rows if (r["bytes"], r["case"], r["name"]) == (size, case, name))
            us = median(next(mine, {}), "graph_us")
            cells.append("-" if us is None else f"{_number(us)} ({1.5 * size / us / 1e6:.2f})")
        lines.append([f"{size / 2**20:.2f} MiB", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peer_table(results: dict, shape: tuple[int, ...]) -> str:
    """Markdown: everything measured on one weight, the fastest first in each case."""
    lines = [["what", "name", "graph", "middle 80%", "TB/s", "call", "host"], ["---"] * 2 + ["---:"] * 5]
    rows = [row for row in results["rows"] if tuple(row["shape"]) == tuple(shape)]
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        for row in sorted(here, key=lambda row: median(row, "graph_us") or float("inf")):
            graph = row.get("graph_us")
            if graph is None:
                note = row.get("error", "not measured")
            else:
                note = f"{_number(graph['low'])} to {_number(graph['high'])}"
            rate = "" if graph is None else f"{must_move(case, shape) / graph['median'] / 1e6:.2f}"
            name = row["name"] if is_right(row) or graph is None else f"{row['name']} (wrong result)"
            values = [_number(median(row, part)) for part in ("graph_us", "call_us", "host_us")]
            lines.append([case, name, values[0], note, rate, *values[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(results: dict) -> str:
    """Markdown: the machine, the table, what is missing."""
    about = results["machine"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("driver", "torch", "triton", "fp8_kernels"))
    parts = [
        f"{about['gpu']}, {versions}, {about['date']}. Device-to-device copy: {results['copy_tb_per_s']:.2f} TB/s. "
        f"Microseconds, medians of {results['repeats']}.",
        table(results),
    ]
    if events := event_table(results):
        parts += ["per_tensor, one plain call between two events:", events]
    if "sweep" in results:
        parts.append(sweep_table(results))
    failed = [line_of(row) for row in results["rows"] if "error" in row]
    absent = [f"{library}: {reason}" for library, reason in results["absent"].items()]
    unmeasured = results.get("left_out", [])
    for title, lines in (("Failed", failed), ("Left out", unmeasured), ("Not here", absent)):
        if lines:
            parts.append("\n".join([f"{title}:", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts)


def case_rows(results: dict, shape: tuple[int, ...], case: str) -> list[dict]:
    """All that was measured of one weight and case."""
    return [row for row in results["rows"] if tuple(row["shape"]) == tuple(shape) and row["case"] == case]


def floor_us(case: str, shape: tuple[int, ...], copy_tb_per_s: float, reads: int = 1) -> float:
    """Microseconds that the bytes which must move take at the bandwidth of a copy."""
    return must_move(case, shape, reads) / copy_tb_per_s / 1e6


def median(row, part):
    return row.get(part, {}).get("median")


def is_right(row):
    """Measured, and not known to be wrong."""
    error = row.get("relative_error")
    return "graph_us" in row and (error is None or error <= MAX_ERROR)


def _number(us):
    if us is None:
        return "-"
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _size(shape):
    return "x".join(map(str, shape))


def line_of(row: dict) -> str:
    """One measurement, or why there is none."""
    what = f"{_size(row['shape'])} {row['case']} {row['name']}:"
    if "error" in row:
        return f"{what} {row['error']}"
    graph, call = row["graph_us"]["median"], row["call_us"]["median"]
    return f"{what} graph {graph} us, call {call} us, ready in {row['prepare_s']} s"
