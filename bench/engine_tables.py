"""Tables and bars of `bench.engines`."""

from __future__ import annotations

from bench import running

GIB = 1 << 30
EXCESS_BAR, LOAD_BAR = 0.6 * GIB, 1.5
LOAD_HEAD = (
    "| way | first load, s | best, s | resident, GiB | allocated above | reserved above |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
)


def load_row(way: str, runs: list[dict]) -> str:
    best = min(runs, key=lambda run: run["seconds"])
    excess = [max(run[key] - run["resident"] for run in runs) / GIB for key in ("peak_allocated", "peak_reserved")]
    cells = [f"{x:.2f}" for x in (runs[0]["seconds"], best["seconds"], best["resident"] / GIB, *excess)]
    return f"| {' | '.join((way, *cells))} |"


def table(result: dict) -> str:
    """Markdown of saved results."""
    lines = [*LOAD_HEAD, *(load_row(way, runs) for way, runs in result["load"].items())]
    return "\n".join([*lines, "", *running.run_table(result["run"])])


def load_bars(found: dict) -> list[str]:
    """What was asked of the load, and whether it is so."""
    lines, stock = [], found.get("stock FineGrainedFP8")
    for way in ("Fp8KernelsConfig", "load_model"):
        if way in found:
            excess = max(run["peak_allocated"] - run["resident"] for run in found[way])
            verdict = "met" if excess <= EXCESS_BAR else "MISSED"
            lines.append(f"{way}: {excess / GIB:.2f} GiB above resident, bar {EXCESS_BAR / GIB:.1f}: {verdict}")
    if stock and "Fp8KernelsConfig" in found:
        times = [min(run["seconds"] for run in runs) for runs in (stock, found["Fp8KernelsConfig"])]
        verdict = "met" if times[0] / times[1] >= LOAD_BAR else "MISSED"
        lines.append(f"from_pretrained: {times[0] / times[1]:.2f} of stock's speed, bar {LOAD_BAR}: {verdict}")
    return lines


def bars(result: dict) -> list[str]:
    """All of them."""
    return [*load_bars(result["load"]), *running.run_bars(result["run"])]
