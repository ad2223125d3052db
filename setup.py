"""Builds the extensions that can be built; everything else about the package is in pyproject.toml.

With torch and a C++ compiler at hand (`pip install --no-build-isolation .`) the wheel holds `fp8_kernels/_cpu.abi3.so`,
with nvcc and a CUDA torch `_C.abi3.so` too; each serves every torch from 2.10 on. Otherwise it is pure Python.
FP8_KERNELS_BUILD_CPU and FP8_KERNELS_BUILD_CUDA: 0 never, 1 always, the CUDA one then also against a CPU torch.
CXX is the C++ compiler, TORCH_CUDA_ARCH_LIST ("9.0;10.0+PTX") picks the GPUs' architectures.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
DEFAULT_ARCHS = "8.9;9.0;10.0+PTX"
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of torch 2.10
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all", "-DUSE_CUDA", ABI]
# Nothing is contracted: a fused multiplication and addition has other bits. Nothing looks at errno or at floating-point
# traps, which would keep loops from becoming vector code.
CPU_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
CPU_FLAGS += ["-fno-trapping-math", ABI]
# The kernels are compiled once for each of these; csrc/cpu/ops.cpp chooses at run time.
CPU_LEVELS = {"kBaseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_LEVELS |= {"kAvx2": ["-march=x86-64-v3"], "kAvx512": ["-march=x86-64-v4"]}


def find_nvcc():
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (nvcc := Path(home, "bin", "nvcc")).exists():
            return str(nvcc)
    return shutil.which("nvcc")


def find_cxx():
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def find_torch():
    try:
        import torch  # absent in an isolated build
    except ImportError:
        return None
    return torch


def wants_cuda():
    forced = os.environ.get("FP8_KERNELS_BUILD_CUDA", "")
    if forced:
        return forced != "0"
    torch = find_torch()
    return torch is not None and torch.version.cuda is not None and find_nvcc() is not None


def wants_cpu():
    forced = os.environ.get("FP8_KERNELS_BUILD_CPU", "")
    if forced:
        return forced != "0"
    return os.name == "posix" and find_torch() is not None and find_cxx() is not None


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


class BuildNative(build_ext):
    """Compilers called by hand: torch's CUDAExtension refuses a CPU torch, which is all that is needed to build, and
    setuptools would compile each source once, with one set of flags."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [*(file for file in (ROOT / "csrc").rglob("*") if file.is_file()), ROOT / "setup.py"]
        if not self.force and target.exists() and target.stat().st_mtime > max(f.stat().st_mtime for f in inputs):
            return
        objects = Path(self.build_temp, ext.name)
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        (self.build_cuda if ext.name == CUDA else self.build_cpu)(
            ext, target, objects, Path(find_torch().__file__).parent
        )

    def build_cpu(self, ext, target, objects, torch_root):
        cxx = find_cxx()
        if cxx is None:
            raise RuntimeError("FP8_KERNELS_BUILD_CPU=1 needs a C++ compiler: put g++ or clang++ on PATH or set CXX")
        units = [(source, []) for source in ext.sources if not source.endswith("kernels.cpp")]
        kernels = next(source for source in ext.sources if source.endswith("kernels.cpp"))
        units += [(kernels, [f"-DKERNELS={level}", *flags]) for level, flags in CPU_LEVELS.items()]
        outputs = [objects / f"{i}.o" for i in range(len(units))]

        def compile_one(unit, output):
            source, flags = unit
            call(cxx, *CPU_FLAGS, *flags, f"-I{torch_root / 'include'}", "-c", ROOT / source, "-o", output)

        compile_all(compile_one, units, outputs)
        libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lpthread", "-ldl"]
        call(cxx, "-shared", "-o", target, *outputs, *libraries)

    def build_cuda(self, ext, target, objects, torch_root):
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("FP8_KERNELS_BUILD_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME")
        outputs = [objects / f"{Path(source).name}.o" for source in ext.sources]

        def compile_one(source, output):
            call(nvcc, *CUDA_FLAGS, *arch_flags(), f"-I{torch_root / 'include'}", "-c", ROOT / source, "-o", output)

        compile_all(compile_one, ext.sources, outputs)
        libraries = torch_root / "lib"
        if not (libraries / "libtorch_cuda.so").exists():
            # The library must ask for libtorch_cuda.so, or its symbols are not found where torch has it.
            stub = objects / "libtorch_cuda.so"
            call(nvcc, "-shared", "-Xlinker=-soname=libtorch_cuda.so", "-o", stub, "-x", "cu", os.devnull)
        link = ["-Xlinker=--no-as-needed", f"-L{libraries}", f"-L{objects}", "-ltorch_cuda", "-ltorch_cpu", "-ltorch"]
        call(nvcc, "-shared", "-cudart=static", "-o", target, *outputs, *link)


def compile_all(compile_one, *arguments):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, *arguments))


def sources(folder):
    return sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.c[up]*") if path.suffix in (".cu", ".cpp"))


CUDA, CPU = "fp8_kernels._C", "fp8_kernels._cpu"
extensions = [Extension(CPU, sources(ROOT / "csrc" / "cpu"), py_limited_api=True)] if wants_cpu() else []
extensions += [Extension(CUDA, sources(ROOT / "csrc"), py_limited_api=True)] if wants_cuda() else []
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
