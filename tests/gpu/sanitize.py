"""Every kernel path of the CUDA extension on small odd weights, under compute-sanitizer.

    python -m tests.gpu.sanitize [memcheck racecheck initcheck synccheck]    # by default all four
    python -m tests.gpu.sanitize --run                                       # the calls alone

Inputs come from the CPU by copies, and torch's allocator is told not to reuse memory, so that what a kernel reads
beyond a tensor, or before anyone has written it, is seen.
"""

import os
import subprocess
import sys

import torch

import fp8_kernels as fk
from fp8_kernels.testing import assert_same_bits

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SCHEMES = ["per_tensor", "per_channel", "per_block", "per_group", "mxfp8", fk.PerBlock(3, 5), fk.PerBlock(300, 8000)]
# One element; odd; rows of 16-byte vectors; rows past a thread block; experts that exceed one; a weight that does.
SHAPES = [(1, 1), (7, 13), (33, 256), (2, 33000), (3, 257, 520), (300, 1024), (5, 64, 128)]


def run():
    """All calls; each result is compared with the CPU's."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            host = torch.randn(shape).to(dtype)
            w = host.cuda()
            for scheme in SCHEMES:
                check(w, host, scheme)
        check(host.half().cuda(), host.half(), "per_tensor", torch.float8_e5m2)
        check(w[..., 1:], host[..., 1:], "per_channel")
        check(w.mT, host.mT, "per_tensor")
        check(w.mT, host.mT, "per_block")
    large = torch.randn(7000, 4000).bfloat16()  # more than a chip's shared memory and registers hold
    same(fk.quantize(large.cuda(), "per_tensor", backend="cuda"), fk.quantize(large, "per_tensor"))
    many = [torch.randn(shape).bfloat16() for shape in SHAPES]
    for scheme in SCHEMES:
        for pair, host in zip(fk.quantize_many([w.cuda() for w in many], scheme, backend="cuda"), many, strict=True):
            same(pair, fk.quantize(host, scheme))
    torch.cuda.synchronize()


def check(w, host, scheme, dtype=torch.float8_e4m3fn):
    want = fk.quantize(host, scheme, dtype=dtype)
    same(fk.quantize(w, scheme, dtype=dtype, backend="cuda"), want)
    amax = fk.amax(w, scheme, backend="cuda")
    same([amax], [fk.amax(host, scheme)])
    fk.amax(w, scheme, out=amax, accumulate=True, backend="cuda")
    q, scale = fk.quantize(w, scheme, dtype=dtype, amax=amax, backend="cuda")
    same((q, scale), want)
    slot, copy = torch.zeros(amax.shape).cuda(), torch.empty_like(w)
    same([fk.copy_amax(w, copy, slot, scheme, backend="cuda"), slot], [host, amax.cpu()])
    same([fk.dequantize(q, scale, w.dtype, scheme, backend="cuda")], [fk.dequantize(*want, host.dtype, scheme)])


def same(got, want):
    for actual, expected in zip(got, want, strict=True):
        assert_same_bits(actual.cpu(), expected)


def main() -> int:
    """The number of tools that found something."""
    if sys.argv[1:] == ["--run"]:
        run()
        return 0
    failed = 0
    for tool in sys.argv[1:] or TOOLS:
        # Only our kernels, by a part of their names; but initcheck must see who else writes.
        only = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=fp8_kernels"]
        command = ["compute-sanitizer", "--tool", tool, *only, "--error-exitcode", "9"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(
            [*command, sys.executable, "-m", "tests.gpu.sanitize", "--run"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        failed += done.returncode != 0
        shown = done.stdout.splitlines()[-3 if done.returncode == 0 else -40 :]
        print(f"{tool}: exit code {done.returncode}", *shown, sep="\n  ")
    return failed


if __name__ == "__main__":
    sys.exit(main())
