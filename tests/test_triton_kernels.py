"""triton_kernels.py without a GPU: what it would launch is compiled to machine code, and run by the interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fp8_kernels import reference, triton_kernels  # noqa: E402
from fp8_kernels.schemes import SCHEMES, WHOLE, grid  # noqa: E402

HERE = Path(__file__)
E4M3, E5M2, *FNUZ = reference.FP8_MAX
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32"}

# Every architecture that is named to users, and one (Ampere) that has no FP8 conversions.
NVIDIA = {"sm_80": GPUTarget("cuda", 80, 32), **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (89, 90, 100)}}


@pytest.fixture
def launches(monkeypatch):
    """What the ops would launch, instead of launching it: (kernel, programs, arguments, constants)."""
    recorded = []

    def record(kernel, num_programs, w, *args, **constants):
        recorded.append((kernel, num_programs, args, constants))

    monkeypatch.setattr(triton_kernels, "_launch", record)
    return recorded


def empty(*shape, dtype=torch.bfloat16):
    """A tensor without memory; Triton takes its address, 0, for aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


def quantize(
    w, block_n, block_k, fp8_dtype=E4M3, scale_dtype=torch.float32, amax=False, pow2=False, q=None, numerics=0
):
    groups = w.shape[0], *grid(*w.shape[1:], block_n, block_k)
    found = empty(*groups, dtype=torch.float32) if amax else None
    q = empty(*w.shape, dtype=fp8_dtype) if q is None else q
    triton_kernels.quantize_out(w, found, q, empty(*groups, dtype=scale_dtype), block_n, block_k, pow2, numerics)


def dequantize(q, dtype, block_n, block_k, scale_dtype=torch.float32):
    scale = empty(q.shape[0], *grid(*q.shape[1:], block_n, block_k), dtype=scale_dtype)
    triton_kernels.dequantize_out(q, scale, empty(*q.shape, dtype=dtype), block_n, block_k)


def amax(w, block_n, block_k, accumulate=False):
    groups = w.shape[0], *grid(*w.shape[1:], block_n, block_k)
    triton_kernels.amax_out(w, empty(*groups, dtype=torch.float32), block_n, block_k, accumulate)


def copy_amax(w, block_n, block_k):
    groups = w.shape[0], *grid(*w.shape[1:], block_n, block_k)
    triton_kernels.copy_amax_out(w, torch.empty_like(w), empty(*groups, dtype=torch.float32), block_n, block_k)


def compile_launch(kernel, args, constants, target):
    """The kernel as a launch with these arguments would compile it, specialized on the same of them."""
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps")}
    names = [param.name for param in kernel.params]
    signature, constexprs, attrs = dict.fromkeys(constants, "constexpr"), {}, {}
    for name, value in constants.items():
        constexprs[(names.index(name),)] = value
    for i, value in enumerate(args):
        plain, unaligned = kernel.params[i].do_not_specialize, kernel.params[i].do_not_specialize_on_alignment
        if isinstance(value, torch.Tensor):
            signature[names[i]] = f"*{TYPES[value.dtype]}"
            aligned = value.data_ptr() % 16 == 0
        elif value == 1 and not plain:
            signature[names[i]], constexprs[(i,)], aligned = "constexpr", 1, False
        else:
            signature[names[i]] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and not plain and not unaligned
        if aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in names}
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options)


# What really launches: the schemes on aligned weights, other dtypes, given amaxes, both conversions of a scale,
# long rows (read in pieces), views that are not aligned or not contiguous, and the whole of the other two ops.
VARIANTS = {
    "per_tensor": lambda: quantize(empty(2, 512, 2048), WHOLE, WHOLE),
    "per_tensor strided": lambda: quantize(empty(2, 512, 4096)[:, :, ::2], WHOLE, WHOLE),
    "per_tensor amax": lambda: quantize(empty(2, 512, 2048), WHOLE, WHOLE, amax=True),
    "per_channel": lambda: quantize(empty(2, 512, 2048), 1, WHOLE),
    "per_channel fp32 e5m2": lambda: quantize(empty(2, 512, 2048, dtype=torch.float32), 1, WHOLE, E5M2),
    "per_channel fp16 amax": lambda: quantize(empty(1, 512, 2048, dtype=torch.float16), 1, WHOLE, amax=True),
    "per_channel long": lambda: quantize(empty(1, 512, 18432), 1, WHOLE),
    "per_channel odd": lambda: quantize(empty(1, 577, 1025), 1, WHOLE),
    "per_channel tiny": lambda: quantize(empty(1, 1, 1), 1, WHOLE),
    "per_block": lambda: quantize(empty(1, 576, 1536), 128, 128),
    "per_block fp32": lambda: quantize(empty(1, 576, 1536, dtype=torch.float32), 128, 128),
    "per_block bf16 scale": lambda: quantize(empty(1, 576, 1536), 128, 128, scale_dtype=torch.bfloat16),
    "per_group pow2": lambda: quantize(empty(1, 512, 2048), 1, 128, pow2=True),
    "mxfp8": lambda: quantize(empty(1, 512, 2048), 1, 32, scale_dtype=torch.float8_e8m0fnu, pow2=True),
    "per_tensor vllm": lambda: quantize(empty(2, 512, 2048), WHOLE, WHOLE, numerics=1),
    "per_block vllm": lambda: quantize(empty(1, 576, 1536), 128, 128, numerics=1),
    "transposed": lambda: quantize(empty(1, 2048, 512).mT, 16, 16, q=empty(1, 512, 2048, dtype=E5M2)),
    "beyond 2^31": lambda: quantize(empty(1, 70000, 40000), WHOLE, WHOLE),
    "amax": lambda: amax(empty(2, 512, 2048), WHOLE, WHOLE, True),
    "amax fp32": lambda: amax(empty(1, 512, 2048, dtype=torch.float32), 1, WHOLE, True),
    "copy_amax": lambda: copy_amax(empty(2, 512, 2048), WHOLE, WHOLE),
    "copy_amax fp32": lambda: copy_amax(empty(1, 512, 2048, dtype=torch.float32), 1, WHOLE),
    "dequantize": lambda: dequantize(empty(1, 512, 2048, dtype=E4M3), torch.bfloat16, 128, 128),
    "dequantize e5m2": lambda: dequantize(empty(1, 512, 2048, dtype=E5M2), torch.float16, 1, WHOLE),
    "dequantize mx": lambda: dequantize(empty(1, 512, 2048, dtype=E4M3), torch.float32, 1, 32, torch.float8_e8m0fnu),
}


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_to_exact_machine_code(launches, monkeypatch, variant, arch):
    """To a cubin, with IEEE division, no flushing of subnormals, no maximum that drops NaN, and the FP8
    conversion of the hardware exactly where there is one."""
    native = arch != "sm_80"
    monkeypatch.setattr(triton_kernels, "_converts_fp8", lambda device: native)
    VARIANTS[variant]()
    for kernel, _, args, constants in launches:
        compiled = compile_launch(kernel, args, constants, NVIDIA[arch])
        assert compiled.asm["cubin"].startswith(b"\x7fELF")
        ptx = compiled.asm["ptx"]
        assert not re.findall(r"\S*(?:div\.full|div\.approx|rcp\.approx|\.ftz|(?:max|min)\.f32)\S*", ptx)
        assert "div.rn.f32" in ptx or kernel is not triton_kernels._quantize_kernel
        conversions = set(re.findall(r"cvt\S*\.(?:e4m3|e5m2)\S*", ptx))
        name = "e5m2" if constants.get("FP8_MAX") == 57344 else "e4m3"
        expected = {f"cvt.rn.satfinite.{name}x2.f32"} if native and "FP8_MAX" in constants else set()
        assert conversions == expected


@pytest.mark.parametrize("variant", ["per_tensor", "per_channel", "per_block", "mxfp8", "per_channel fp32 e5m2"])
def test_contiguous_aligned_weights_are_read_and_written_16_bytes_at_a_time(launches, monkeypatch, variant):
    """The fast path is one: a mask or an index that Triton cannot see through would make it read single elements."""
    monkeypatch.setattr(triton_kernels, "_converts_fp8", lambda device: True)
    VARIANTS[variant]()
    for kernel, _, args, constants in launches:
        ptx = compile_launch(kernel, args, constants, NVIDIA["sm_90"]).asm["ptx"]
        loads = re.findall(r"ld\.global\S*", ptx)
        elements = constants["R"] * constants["G"] * constants["C"] // (32 * constants["num_warps"])
        sweeps = 3 if constants.get("LOOP") else 1
        assert loads.count("ld.global.v4.b32") == sweeps * elements * args[0].element_size() // 16
        if kernel is triton_kernels._quantize_kernel:
            assert "st.global.v4.b32" in re.findall(r"st\.global\S*", ptx)


def test_compiles_for_amd(launches, monkeypatch):
    """The same kernels serve gfx942, whose own FP8 is another format: by integers."""
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton was built without its AMD backend")
    monkeypatch.setattr(triton_kernels, "_converts_fp8", lambda device: False)
    for variant in ("per_tensor", "per_channel", "per_block", "mxfp8", "amax fp32", "copy_amax", "dequantize"):
        VARIANTS[variant]()
    for fp8_dtype in FNUZ:
        quantize(empty(1, 512, 2048), 1, WHOLE, fp8_dtype)
        quantize(empty(2, 512, 2048), WHOLE, WHOLE, fp8_dtype)
        dequantize(empty(1, 512, 2048, dtype=fp8_dtype), torch.bfloat16, 128, 128)
    quantize(empty(1, 512, 2048), 128, 128, FNUZ[0], numerics=1)
    for kernel, _, args, constants in launches:
        assert compile_launch(kernel, args, constants, GPUTarget("hip", "gfx942", 64)).asm["hsaco"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_launch_where_one_read_suffices(launches, scheme):
    """Experts share a launch; only weights that one scale covers, and that are large, take two."""
    block = SCHEMES[scheme].block
    w = empty(8, 2048, 4096)
    quantize(w, *block, scale_dtype=SCHEMES[scheme].scale_dtype, pow2=SCHEMES[scheme].pow2)
    assert len(launches) == (2 if block == (WHOLE, WHOLE) else 1)
    launches.clear()
    quantize(w, *block, amax=True)
    dequantize(empty(8, 2048, 4096, dtype=E4M3), torch.bfloat16, *block)
    assert len(launches) == 2
    launches.clear()
    quantize(empty(8, 60, 60), *block)
    assert len(launches) == 1


@pytest.mark.parametrize("block", [(WHOLE, WHOLE), (1, WHOLE), (128, 128), (1, 32), (2, WHOLE), (WHOLE, 4), (1, 1)])
@pytest.mark.parametrize(
    "shape", [(1, 4096, 14336), (128, 1536, 2048), (1, 2**31 + 1, 1), (1, 1, 2**31 + 1), (3, 5, 7)]
)
def test_launches_are_within_the_limits_of_a_grid(launches, shape, block):
    """Enough programs to cover the weight, fewer than 2^31, with tiles that fit in registers."""
    w = empty(*shape)
    quantize(w, *block)
    amax(w, *block)
    dequantize(empty(*shape, dtype=E4M3), torch.bfloat16, *block)
    for kernel, num_programs, _, constants in launches:
        tile = constants["R"] * constants["G"] * constants["C"]
        assert 0 < num_programs < 2**31
        assert tile <= 16384 and tile <= max(128 * 32 * constants["num_warps"], 1024)
        if kernel is triton_kernels._dequantize_kernel:
            assert num_programs * tile >= w.numel()


def test_equals_the_reference_under_the_interpreter():
    """Every byte of every op, in a process of its own: see `triton_interpreted.py`."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE.with_name("triton_interpreted.py")]
    result = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]
    assert "passed" in result.stdout and "skipped" not in result.stdout
