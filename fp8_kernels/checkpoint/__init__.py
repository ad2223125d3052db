"""Hugging Face checkpoint folders: read, quantize to FP8, verify; streams of their tensors."""

from .amax import read_amax, write_amax
from .formats import FORMATS
from .plan import plan_checkpoint
from .quantize import quantize_checkpoint
from .reader import Checkpoint, TensorInfo, open_checkpoint
from .safetensors_file import SafetensorsWriter
from .stream import QuantizedWeights, quantization_config, quantize_weights
from .verify import VerifyReport, verify_checkpoint

__all__ = [
    "FORMATS",
    "Checkpoint",
    "QuantizedWeights",
    "SafetensorsWriter",
    "TensorInfo",
    "VerifyReport",
    "open_checkpoint",
    "plan_checkpoint",
    "quantization_config",
    "quantize_checkpoint",
    "quantize_weights",
    "read_amax",
    "verify_checkpoint",
    "write_amax",
]
