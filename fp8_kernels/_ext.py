"""The compiled extensions: are they there, and loading them.

Loading a library registers its kernels for its dispatch key. A library that was not built is normal (Triton, or plain
PyTorch, serves then); one that is there and does not load is an error, never a silent fallback.
"""

from pathlib import Path

import torch

LIBRARIES = {"cuda": "_C.abi3.so", "cpu": "_cpu.abi3.so"}
_INSTEAD = {"cuda": "triton", "cpu": "reference"}


def path(kind: str) -> Path | None:
    """Where the library for that kind of device is, or None where it was not built."""
    candidate = Path(__file__).with_name(LIBRARIES[kind])
    return candidate if candidate.exists() else None


def load(kind: str) -> bool:
    """Load the library for that kind of device; False where there is none to load.

    Raises:
        RuntimeError: the library is there but this torch cannot load it.
    """
    library = path(kind)
    if library is None or (kind == "cuda" and torch.version.cuda is None):
        return False  # a CPU torch has no use for the one for CUDA, and lacks the symbols that it needs
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise RuntimeError(
            f"{library} does not load in torch {torch.__version__}; rebuild it with "
            f"`pip install --no-build-isolation .`, or set FP8_KERNELS_BACKEND={_INSTEAD[kind]}: {error}"
        ) from error
    return True
