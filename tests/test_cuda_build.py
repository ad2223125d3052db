"""What can be known about the CUDA extension without a GPU: it builds, spills nothing, asks torch only for its
stable interface, and its numerics, run on the host, are the reference's.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8_kernels import reference
from fp8_kernels.schemes import WHOLE
from fp8_kernels.testing import assert_same_bits

ROOT = Path(__file__).parents[1]
SCALE_TYPES = [torch.float32, torch.bfloat16, torch.float8_e8m0fnu]  # in the order of ScaleType
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, **options)
    assert done.returncode == 0, done.stdout.decode()[-4000:] + done.stderr.decode()[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(library, compiler's report) of the very build that `pip install` runs, for two architectures."""
    folder = tmp_path_factory.mktemp("build")
    environment = os.environ | {
        "FP8_KERNELS_BUILD_CUDA": "1",
        "FP8_KERNELS_BUILD_CPU": "0",
        "TORCH_CUDA_ARCH_LIST": "8.9;9.0+PTX",
        "NVCC_APPEND_FLAGS": "-Xptxas=-v",
    }
    command = ["setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    report = run(sys.executable, *command, cwd=ROOT, env=environment).decode()
    return folder / "lib" / "fp8_kernels" / "_C.abi3.so", report


@pytest.fixture(scope="module")
def fp8_host(tmp_path_factory):
    """The program fp8_host.cu, compiled."""
    program = tmp_path_factory.mktemp("host") / "fp8_host"
    # Without -march=native fmaf is a slow library call; contraction would fuse what the source keeps apart.
    flags = ["-std=c++17", "-O3", "-Xcompiler=-march=native,-ffp-contract=off", "-I", ROOT / "csrc"]
    run("nvcc", *flags, ROOT / "tests" / "fp8_host.cu", "-o", program)
    return program


@pytest.mark.slow
def test_every_source_compiles_and_no_kernel_spills(build):
    """Each kernel of each family, on both architectures, keeps everything in registers."""
    _, report = build
    # "Function properties for NAME" is followed by "B bytes stack frame, S bytes spill stores, L bytes spill loads".
    kernels = re.findall(r"Function properties for (\S*_kernel\S*)\s+(\d+) bytes stack frame, (\d+) bytes sp", report)
    names = " ".join(name for name, *_ in kernels)
    for family in (
        "quantize_blocks",
        "quantize_groups",
        "quantize_ring",
        "quantize_runs",
        "quantize_split",
        "cast_runs",
        "quantize_whole",
        "cast_split",
        "amax",
        "amax_split",
        "amax_whole",
        "copy_amax",
        "dequantize",
        "dequantize_vecs",
    ):
        assert f"{family}_kernel" in names
    assert not [kernel for kernel in kernels if kernel[1:] != ("0", "0")]
    assert not re.search("warning", report), report


@pytest.mark.slow
def test_the_library_needs_only_torchs_stable_interface(build):
    """C functions alone, none newer than torch 2.10: so one binary serves all torches from there on."""
    library, _ = build
    undefined = run("nm", "-D", "--undefined-only", library).decode()
    needed = {line.split()[-1] for line in undefined.splitlines()}
    of_torch = {name for name in needed if re.match(r"aoti_|torch_|_ZNK?(5torch|2at|3c10)", name)}
    assert of_torch <= {
        "aoti_torch_abi_version",
        "aoti_torch_create_device_guard",
        "aoti_torch_delete_device_guard",
        "aoti_torch_delete_library_object",
        "aoti_torch_delete_tensor_object",
        "aoti_torch_device_type_cuda",
        "aoti_torch_dtype_element_size",
        "aoti_torch_dtype_int32",
        "aoti_torch_empty_strided",
        "aoti_torch_get_current_cuda_stream",
        "aoti_torch_get_data_ptr",
        "aoti_torch_get_device_index",
        "aoti_torch_get_device_type",
        "aoti_torch_get_dim",
        "aoti_torch_get_dtype",
        "aoti_torch_get_size",
        "aoti_torch_get_stride",
        "aoti_torch_library_init_impl",
        "torch_delete_list",
        "torch_library_impl",
        "torch_list_get_item",
        "torch_list_size",
    }
    # The CUDA runtime is inside, so that the library does not ask for the version that torch happens to bring.
    assert not any(name.startswith("cuda") for name in needed)
    dependencies = run("readelf", "-d", library).decode()
    assert "libtorch_cuda.so" in dependencies and "libcudart" not in dependencies


@pytest.mark.slow
def test_the_hoisted_division_gives_the_codes_of_ieee_division(fp8_host):
    """Every significand of a scale, against every boundary between FP8 codes: a proof, see fp8_host.cu."""
    assert run(fp8_host, "boundaries").decode() == "1207959552 tried, 0 failed\n"


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 11], ids=["bfloat16", "float16"])
def test_the_division_in_two_operations_gives_the_codes_of_ieee_division(fp8_host, bits):
    """The same for the x of bf16 and fp16, every significand of a scale."""
    assert run(fp8_host, "short", bits).decode() == "536870912 tried, 0 failed\n"


def amaxes():
    """Random bit patterns of every exponent, and the values where the rule has a corner."""
    fp8_max = [448.0, 57344.0]
    corners = [0.0, 2.0**-149, 2.0**-126, 3.4e38, float("inf"), float("nan"), -1.0, -0.0]
    corners += [m * 2.0**e for m in fp8_max for e in (-126, -127, 0, 1)]
    near = torch.tensor(corners).view(torch.int32)
    random = torch.randint(0, 0x7FFFFFFF, (100_000,), dtype=torch.int32)
    # Not below the smallest nor above the largest pattern of their sign.
    return torch.cat([near, near[8:] - 1, near[8:] + 1, random]).view(torch.float32)


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("scale_type", SCALE_TYPES, ids=str)
def test_the_scale_rule_is_the_references(fp8_host, scale_type, pow2, fp8):
    """Stored bits of scales, of every type, for amaxes of every exponent."""
    amax = amaxes()
    arguments = [SCALE_TYPES.index(scale_type), int(pow2), FP8.index(fp8), 0, reference.TINY, 0]
    out = run(fp8_host, "scale", *arguments, input=amax.numpy().tobytes())
    stored = torch.frombuffer(bytearray(out), dtype=torch.int32)
    narrow = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[scale_type.itemsize]
    assert_same_bits(
        stored.to(narrow).view(scale_type), reference.scale_from_amax(amax, reference.rule(fp8), pow2, scale_type)
    )


@pytest.mark.parametrize("block", [(WHOLE, WHOLE), (1, WHOLE), (128, 128), (1, 128)])
def test_the_scale_rules_of_vllm_are_the_references(fp8_host, block):
    """The same for the rules that csrc/ops.cu chooses for `numerics="vllm"`; which it chooses tests/gpu shows."""
    amax = amaxes()
    rule = reference.rule(FP8[0], 1, *block)
    arguments = [0, 0, 0, repr(rule.min_amax), repr(rule.min_scale), int(rule.reciprocal_max)]
    out = run(fp8_host, "scale", *arguments, input=amax.numpy().tobytes())
    stored = torch.frombuffer(bytearray(out), dtype=torch.float32)
    assert_same_bits(stored, reference.scale_from_amax(amax, rule, False))


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_the_cast_is_the_references(fp8_host, fp8, reciprocal):
    """Codes for any x over any scale: quotients in range, far above, far below, and not finite."""
    x = torch.randint(-(2**31), 2**31 - 1, (300_000,)).int().view(torch.float32)
    scale = torch.randint(0 if reciprocal else 0x00800000, 0x7F800001, x.shape).int().view(torch.float32)
    # Half of the quotients in the range of FP8, where rounding decides.
    scale[::2] = (x[::2].abs() * torch.rand(x[::2].shape).exp2() / 32).clamp(min=reference.TINY)
    corners = torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-127), 1.0, 448.0, -3.4e38, float("inf"), float("nan")])
    scales = torch.tensor(
        [0.0, 2.0**-140, 2.0**-128, 1.3 * 2.0**-128] * reciprocal
        + [2.0**-126, 1.7 * 2.0**-126, 2.0**-80, 1.0, 2.0**119, float("inf"), float("nan")]
    )
    x = torch.cat([x, corners.repeat_interleave(len(scales))])
    scale = torch.cat([scale, scales.repeat(len(corners))])
    rule = reference.rule(fp8)._replace(reciprocal=reciprocal)
    out = run(fp8_host, "cast", FP8.index(fp8), int(reciprocal), input=torch.stack([x, scale], 1).numpy().tobytes())
    codes = torch.frombuffer(bytearray(out), dtype=torch.uint8).view(fp8)
    assert_same_bits(codes, reference.cast(x[None, :, None], scale[None, :, None], fp8, 1, 1, rule)[0, :, 0])
