"""Quantize a model to FP8 while its weights load."""

from .backends import available_backends
from .checkpoint import (
    open_checkpoint,
    quantization_config,
    quantize_checkpoint,
    quantize_weights,
    verify_checkpoint,
)
from .errors import (
    CheckpointError,
    ConflictingShardError,
    IncompleteLoadError,
    LoadError,
    NonFiniteWeightError,
    PoisonedModelError,
    UnmatchedPatternError,
    UnsupportedLayoutError,
)
from .load import load_checkpoint, load_model
from .loading import LayerwiseLoader, Plan, Report, make_plan
from .modules import Fp8Experts, Fp8Linear, make_runnable
from .ops import amax, copy_amax, dequantize, quantize, quantize_many
from .schemes import PerBlock, PerChannel, PerGroup, PerTensor, Scheme, mxfp8

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConflictingShardError",
    "Fp8Experts",
    "Fp8Linear",
    "IncompleteLoadError",
    "LayerwiseLoader",
    "LoadError",
    "NonFiniteWeightError",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Plan",
    "PoisonedModelError",
    "Report",
    "Scheme",
    "UnmatchedPatternError",
    "UnsupportedLayoutError",
    "amax",
    "available_backends",
    "copy_amax",
    "dequantize",
    "load_checkpoint",
    "load_model",
    "make_plan",
    "make_runnable",
    "mxfp8",
    "open_checkpoint",
    "quantization_config",
    "quantize",
    "quantize_checkpoint",
    "quantize_many",
    "quantize_weights",
    "verify_checkpoint",
]


def __getattr__(name):
    if name == "Fp8KernelsConfig":  # registers itself with transformers, which takes seconds to import
        from .integrations.transformers import Fp8KernelsConfig

        return Fp8KernelsConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
