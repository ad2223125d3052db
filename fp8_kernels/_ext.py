"""The CUDA extension: is it there, and loading it.

Loading the library registers its kernels for the CUDA dispatch key. A library that was not built is normal
(Triton serves then); one that is there and does not load is an error, never a silent fallback.
"""

from pathlib import Path

import torch

LIBRARY = "_C.abi3.so"


def path() -> Path | None:
    """Where the compiled library is, or None where it was not built."""
    candidate = Path(__file__).with_name(LIBRARY)
    return candidate if candidate.exists() else None


def load() -> bool:
    """Load the library; False where there is none to load.

    Raises:
        RuntimeError: the library is there but this torch cannot load it.
    """
    library = path()
    if library is None or torch.version.cuda is None:
        return False  # a CPU torch has no use for it, and lacks the symbols that it needs
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise RuntimeError(
            f"{library} does not load in torch {torch.__version__}; rebuild it with "
            f"`pip install --no-build-isolation .`, or set FP8_KERNELS_BACKEND=triton: {error}"
        ) from error
    return True
