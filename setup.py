"""Builds the CUDA extension where it can be built; everything else about the package is in pyproject.toml.

With nvcc and a CUDA torch at hand (`pip install --no-build-isolation .`) the wheel holds `fp8_kernels/_C.abi3.so`,
which serves every torch from 2.10 on; otherwise it is pure Python. FP8_KERNELS_BUILD_CUDA=1 builds it against a
CPU torch too, 0 never. TORCH_CUDA_ARCH_LIST ("9.0;10.0+PTX") picks the architectures.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
DEFAULT_ARCHS = "8.9;9.0;10.0+PTX"
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the ABI of torch 2.10
]


def find_nvcc():
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (nvcc := Path(home, "bin", "nvcc")).exists():
            return str(nvcc)
    return shutil.which("nvcc")


def wants_cuda():
    forced = os.environ.get("FP8_KERNELS_BUILD_CUDA", "")
    if forced:
        return forced != "0"
    try:
        import torch  # absent in an isolated build
    except ImportError:
        return False
    return torch.version.cuda is not None and find_nvcc() is not None


def arch_flags():
    """One -gencode an architecture; "+PTX" adds code that newer ones can compile."""
    flags = []
    for arch in (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def call(*command):
    """Run a command; its output comes as one piece, since several run side by side."""
    command = [str(word) for word in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(" ".join(command), done.stdout, sep="\n", end="", flush=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with exit code {done.returncode}, see above")


class BuildCuda(build_ext):
    """nvcc by hand: torch's CUDAExtension refuses a CPU torch, which is all that this library needs to build."""

    def build_extension(self, ext):
        import torch

        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("FP8_KERNELS_BUILD_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME")
        torch_root = Path(torch.__file__).parent
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [*(ROOT / "csrc").iterdir(), ROOT / "setup.py"]
        if not self.force and target.exists() and target.stat().st_mtime > max(f.stat().st_mtime for f in inputs):
            return
        objects = Path(self.build_temp, "fp8_kernels")
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{torch_root / 'include'}"]

        def compile_one(source):
            target = objects / f"{Path(source).name}.o"
            call(nvcc, *COMPILE_FLAGS, *arch_flags(), *includes, "-c", ROOT / source, "-o", target)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, ext.sources))

        libraries = torch_root / "lib"
        if not (libraries / "libtorch_cuda.so").exists():
            # The library must ask for libtorch_cuda.so, or its symbols are not found where torch has it.
            stub = objects / "libtorch_cuda.so"
            call(nvcc, "-shared", "-Xlinker=-soname=libtorch_cuda.so", "-o", stub, "-x", "cu", os.devnull)
        link = ["-Xlinker=--no-as-needed", f"-L{libraries}", f"-L{objects}", "-ltorch_cuda", "-ltorch_cpu", "-ltorch"]
        call(nvcc, "-shared", "-cudart=static", "-o", target, *compiled, *link)


sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.c[up]*") if path.suffix != ".cuh")
extension = Extension("fp8_kernels._C", sources, py_limited_api=True)
setup(
    ext_modules=[extension] if wants_cuda() else [],
    cmdclass={"build_ext": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if wants_cuda() else {},
)
