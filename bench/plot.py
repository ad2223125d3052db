"""Draws saved results as SVG beside the JSON: of `bench.kernels` a roofline and a sweep over sizes, of `bench.load`
the timeline of a load.

    python -m bench.plot [FILE ...]    # default: every bench/results/kernels_*.json and load_*.json

Needs matplotlib (`pip install fp8_kernels[bench]`).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from bench.kernels import RESULTS
from bench.tables import QUANTIZE, is_right, median, must_move

COLORS = {"cuda": "C0", "triton": "C1"}  # everybody else grey, by a marker each
MARKERS = "osD^vPX*<>"


def roofline(results: dict, axes):
    """TB/s of bytes that must move, over the size of the weight, under the bandwidth of a copy."""
    rivals = sorted({row["name"] for row in results["rows"] if not row["ours"]})
    seen = set()
    for row in results["rows"]:
        if row["case"] not in QUANTIZE or not is_right(row):
            continue
        name, size = row["name"], 2 * math.prod(row["shape"])
        rate = must_move(row["case"], tuple(row["shape"])) / median(row, "graph_us") / 1e6
        color = COLORS.get(name, "0.6")
        marker = "o" if row["ours"] else MARKERS[rivals.index(name) % len(MARKERS)]
        axes.scatter(
            size, rate, s=22, color=color, marker=marker, label=None if name in seen else name, zorder=2 + row["ours"]
        )
        seen.add(name)
    copy = results["copy_tb_per_s"]
    for reads, rate in [(1, copy), (2, copy * 3 / 5)]:
        axes.axhline(rate, color="k", linewidth=0.8, linestyle="-" if reads == 1 else ":")
        text = "copy" if reads == 1 else "copy, weight read twice"
        axes.annotate(text, (1, rate), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    _finish(axes, "quantize, all schemes: bytes that must move per second", "TB/s")


def sizes(results: dict, case: str, axes):
    """Picoseconds an element over the size of the weight; a cliff is a step in the line."""
    rows = [row for row in results["sweep"] if row["case"] == case and "graph_us" in row]
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        line = sorted((r["bytes"], median(r, "graph_us") * 2e6 / r["bytes"]) for r in rows if r["name"] == name)
        ours = name in COLORS
        style = {
            "color": COLORS.get(name, "0.6"),
            "marker": "." if ours else MARKERS[i % len(MARKERS)],
            "markersize": 4,
        }
        axes.plot(*zip(*line, strict=True), label=name, linewidth=1.2 if ours else 0.6, **style)
    axes.set_yscale("log")
    _finish(axes, case, "ps an element")


def load_timeline(found: dict, axes):
    """How busy the copies, the kernels and the host were in each moment of a load, one lane each."""
    width = found["seconds"] * 1e3 / len(next(iter(found["lanes"].values())))
    for lane, (name, shares) in enumerate(reversed(found["lanes"].items())):
        if name == "host waits":
            name, shares = "host, not waiting", [1 - share for share in shares]
        times = [i * width for i in range(len(shares) + 1)]
        tops = [lane + 0.9 * share for share in (*shares, shares[-1])]
        axes.fill_between(times, lane, tops, step="post", color=f"C{lane}", linewidth=0)
        axes.annotate(name, (0, lane + 0.92), fontsize=8, va="bottom")
    axes.set(xlabel="ms", yticks=[], ylim=(0, len(found["lanes"]) + 0.2))
    axes.set_title(f"{found['model']}, {found['scheme']}: how busy, moment by moment")


def _finish(axes, title, label):
    axes.set_xscale("log", base=2)
    axes.set(title=title, ylabel=label, xlabel="bytes of the bf16 weight")
    axes.legend(fontsize=7, frameon=False)


def draw(results: dict, stem: Path) -> list[Path]:
    """Write `<stem>_roofline.svg`, `<stem>_sizes.svg` and `<stem>_timeline.svg`, those that there are results for."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = stem.name  # the same file for the same results
    from matplotlib import pyplot

    figures = {}
    if "rows" in results:
        figures["roofline"] = pyplot.subplots(figsize=(8, 5), layout="constrained")
        roofline(results, figures["roofline"][1])
    if "timeline" in results:
        figures["timeline"] = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
        load_timeline(results["timeline"], figures["timeline"][1])
    cases = list(dict.fromkeys(row["case"] for row in results.get("sweep", ())))
    if cases:
        layout = {"figsize": (4 * len(cases), 4), "layout": "constrained"}
        figures["sizes"] = pyplot.subplots(1, len(cases), sharey=True, squeeze=False, **layout)
        for case, axes in zip(cases, figures["sizes"][1][0], strict=True):
            sizes(results, case, axes)
    written = []
    for name, (figure, _) in figures.items():
        figure.suptitle(f"{results['machine']['gpu']}, {results['machine']['date']}", fontsize=9)
        written.append(stem.with_name(f"{stem.name}_{name}.svg"))
        figure.savefig(written[-1], metadata={"Date": None})
        pyplot.close(figure)
    return written


def main(argv: list[str] | None = None) -> int:
    files = list(map(Path, sys.argv[1:] if argv is None else argv)) or sorted(
        file for name in ("kernels", "load") for file in RESULTS.glob(f"{name}_*.json")
    )
    if "-h" in map(str, files) or "--help" in map(str, files):
        print(__doc__)
        return 0
    for file in files:
        for path in draw(json.loads(file.read_text()), file.with_suffix("")):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
