"""What tests of FP8 kernels and loaders need, here and in the projects that use them.

`bits` and `assert_same_bits` compare tensors by bits. `loader_cases` is a conformance kit for loaders that quantize:
what engines' loaders do to each other, as data that any such loader can be run against (docs/conformance.md).
"""

from .bits import assert_same_bits, bits
from .case import Do, Load, LoaderCase, Refused, Write
from .layerwise import LayerwiseAdapter
from .rows import loader_cases
from .runner import Adapter, NotOffered, Outcome, as_table, run_case, run_cases
from .session import Session

__all__ = [
    "Adapter",
    "Do",
    "LayerwiseAdapter",
    "Load",
    "LoaderCase",
    "NotOffered",
    "Outcome",
    "Refused",
    "Session",
    "Write",
    "as_table",
    "assert_same_bits",
    "bits",
    "loader_cases",
    "run_case",
    "run_cases",
]
