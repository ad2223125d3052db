"""Writes the tables of saved results into bench/README.md, each between its two marks: kernels, the cost of loads,
whole loads, and models inside transformers.

python -m bench.readme
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench import engine_tables, load_tables, loader
from bench.bars import bars_table
from bench.host import table as host_table
from bench.kernels import RESULTS
from bench.tables import peer_table, report

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
COST_BEGIN, COST_END = "<!-- loads -->\n", "<!-- end of loads -->\n"
MODELS_BEGIN, MODELS_END = "<!-- models -->\n", "<!-- end of models -->\n"
LOAD_BEGIN, LOAD_END = "<!-- checkpoints -->\n", "<!-- end of checkpoints -->\n"
SHOWN = (128, 1536, 2048)  # where every implementation is listed


def block() -> str:
    """Markdown of everything saved."""
    parts = []
    for file in sorted(RESULTS.glob("kernels_*.json")):
        results = json.loads(file.read_text())
        parts += [report(results), "### Bars", bars_table(results)]
        if "host" in results:
            parts += ["### Host time of a call", host_table(results["host"])]
        for plot in sorted(RESULTS.glob(f"{file.stem}_*.svg")):
            parts.append(f"![{plot.stem}](results/{plot.name})")
        parts += [f"### Every implementation on {'x'.join(map(str, SHOWN))}", peer_table(results, SHOWN)]
    return "\n" + "\n\n".join(parts) + "\n\n"


def cost_block() -> str:
    """Markdown of every saved run of `bench.loader`."""
    parts = []
    for file in sorted(RESULTS.glob("loader_*.json")):
        result = json.loads(file.read_text())
        parts += [f"{result['device']} ([results](results/{file.name})):", loader.table(result), loader.summary(result)]
    return "\n" + "".join(f"{part}\n\n" for part in parts)


def load_block() -> str:
    """Markdown of every saved run of `bench.load`."""
    parts = []
    for file in sorted(RESULTS.glob("load_*.json")):
        results = json.loads(file.read_text())
        parts += [f"{results['machine']['name']} ([results](results/{file.name})):", load_tables.table(results)]
        parts.append("\n".join(f"- {line}" for line in load_tables.bars(results)))
        for plot in sorted(RESULTS.glob(f"{file.stem}_*.svg")):
            parts.append(f"![{plot.stem}](results/{plot.name})")
    return "\n" + "".join(f"{part}\n\n" for part in parts)


def models_block() -> str:
    """Markdown of every saved run of `bench.engines`."""
    parts = []
    for file in sorted(RESULTS.glob("engines_*.json")):
        result = json.loads(file.read_text())
        parts.append(f"{result['device']}, transformers {result['transformers']} ([results](results/{file.name})):")
        parts += [engine_tables.table(result), "\n".join(f"- {line}" for line in engine_tables.bars(result))]
    return "\n" + "".join(f"{part}\n\n" for part in parts)


def shown(begin: str = BEGIN, end: str = END) -> str:
    """What stands between two marks now."""
    return README.read_text().partition(begin)[2].partition(end)[0]


def main() -> int:
    text = README.read_text()
    for begin, end, made in (
        (BEGIN, END, block()),
        (COST_BEGIN, COST_END, cost_block()),
        (LOAD_BEGIN, LOAD_END, load_block()),
        (MODELS_BEGIN, MODELS_END, models_block()),
    ):
        before, _, rest = text.partition(begin)
        text = before + begin + made + end + rest.partition(end)[2]
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
