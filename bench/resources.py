"""Registers, shared memory and spills of each family of CUDA kernels, from the compiler's report.

    python -m bench.resources [--arch 9.0] [--write]    # --write: into bench/README.md, between its two marks

Builds the extension anew in a temporary folder. Needs nvcc; no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- resources -->\n", "<!-- end of resources -->\n"
KERNEL = re.compile(
    r"Function properties for \w*?\d(?P<family>(?:quantize|cast|amax|copy|dequantize)[a-z_]*)_kernel\w*\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


def table(report: str) -> str:
    """Markdown of what `nvcc -Xptxas=-v` printed: a row a family, with ranges over its instances."""
    families = {}
    for match in KERNEL.finditer(report):
        numbers = {key: int(value or 0) for key, value in match.groupdict().items() if key != "family"}
        families.setdefault(match["family"], []).append(numbers)
    lines = ["| kernel | instances | registers | shared memory, bytes | stack and spills, bytes |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for family, found in sorted(families.items()):
        registers, shared = (_range([one[key] for one in found]) for key in ("registers", "shared"))
        spilled = max(one["stack"] + one["stores"] + one["loads"] for one in found)
        lines.append(f"| `{family}` | {len(found)} | {registers} | {shared} | {spilled} |")
    return "\n".join(lines)


def _range(values):
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def build_report(arch: str) -> str:
    """The compiler's report of a build of all kernels for one architecture."""
    switches = {"FP8_KERNELS_BUILD_CUDA": "1", "FP8_KERNELS_BUILD_CPU": "0", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    with tempfile.TemporaryDirectory() as folder:
        command = ["setup.py", "-q", "build_ext", "--build-lib", f"{folder}/lib", "--build-temp", f"{folder}/temp"]
        environment = os.environ | switches | {"TORCH_CUDA_ARCH_LIST": arch}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="9.0", help="as in TORCH_CUDA_ARCH_LIST")
    parser.add_argument("--write", action="store_true", help="into bench/README.md")
    args = parser.parse_args(argv)
    text = table(build_report(args.arch))
    print(text)
    if args.write:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + text + "\n" + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
