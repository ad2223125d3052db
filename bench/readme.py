"""Writes the tables of saved kernel results into bench/README.md, between its two marks.

python -m bench.readme
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.bars import bars_table
from bench.host import table as host_table
from bench.kernels import RESULTS
from bench.tables import peer_table, report

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
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


def shown() -> str:
    """What stands between the marks now."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> int:
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + block() + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
