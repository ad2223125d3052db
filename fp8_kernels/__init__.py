"""Quantize a model to FP8 while its weights load."""

from .ops import amax, available_backends, dequantize, quantize
from .schemes import PerBlock, PerChannel, PerGroup, PerTensor, Scheme, mxfp8

__version__ = "0.1.0"

__all__ = [
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Scheme",
    "amax",
    "available_backends",
    "dequantize",
    "mxfp8",
    "quantize",
]
