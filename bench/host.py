"""What does a call cost the host? Measures on a CUDA GPU, prints a table; `bench.kernels` saves the same.

    python -m bench.host [--peers DIR]

Each call works on a weight so small that the GPU finishes before the host has prepared the next one: the time of
many calls in a row is then the host's alone.
"""

from __future__ import annotations

import argparse
import sys

import torch

import fp8_kernels as fk
from bench import peers
from bench.measure import Clock

SHAPE = (64, 256)
MANY = 32


def calls(peers_folder=None) -> dict:
    """`{name: run}`."""
    w = torch.randn(SHAPE, device="cuda").bfloat16()
    q, channel = fk.quantize(w, "per_channel")
    _, tensor = fk.quantize(w, "per_tensor")
    many = [w.clone() for _ in range(MANY)]
    many_out = fk.quantize_many(many, "per_channel")
    slot, staged = torch.zeros((), device="cuda"), torch.empty_like(w)
    found = {
        "quantize per_channel, out=": lambda: fk.quantize(w, "per_channel", out=(q, channel)),
        "quantize per_tensor, out=": lambda: fk.quantize(w, "per_tensor", out=(q, tensor)),
        "quantize per_channel, allocating": lambda: fk.quantize(w, "per_channel"),
        "quantize per_tensor, allocating": lambda: fk.quantize(w, "per_tensor"),
        "quantize per_channel, out=, triton": lambda: fk.quantize(w, out=(q, channel), backend="triton"),
        "amax per_tensor, out=, accumulate": lambda: fk.amax(w, out=slot, accumulate=True),
        "copy_amax per_tensor": lambda: fk.copy_amax(w, staged, slot),
        "dequantize, out=": lambda: fk.dequantize(q, channel, out=staged),
        f"quantize_many of {MANY}, out=": lambda: fk.quantize_many(many, out=many_out),
        "the op alone": lambda: op(w, None, q, channel, 1, -1, False, 0),
        "two allocations": lambda: (torch.empty_like(q), torch.empty((64, 1), device="cuda")),
        "torch: out.copy_(w)": lambda: staged.copy_(w),
    }
    op = torch.ops.fp8_kernels.quantize_out.default
    try:
        vllm, one = peers.vllm_ops(peers_folder), torch.empty(1, device="cuda")
        found["vLLM: the dynamic op alone"] = lambda: vllm.dynamic_scaled_fp8_quant(q, w, one)
    except peers.Absent:
        pass
    return found


def measure(clock: Clock, peers_folder=None) -> dict:
    """`{name: {"median", "low", "high"}}`, microseconds a call."""
    return {name: clock.host(run) for name, run in calls(peers_folder).items()}


def table(host: dict) -> str:
    """Markdown."""
    lines = ["| call | host, us | middle 80% |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {t['median']:.1f} | {t['low']:.1f} to {t['high']:.1f} |" for name, t in host.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", metavar="DIR", help="shared libraries of peers that are not installed")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.host needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    print(table(measure(Clock(20), args.peers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
