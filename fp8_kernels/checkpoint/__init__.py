"""Hugging Face checkpoint folders: read, quantize to FP8, verify."""

from .formats import FORMATS
from .plan import plan_checkpoint
from .quantize import quantize_checkpoint
from .reader import Checkpoint, TensorInfo, open_checkpoint
from .safetensors_file import SafetensorsWriter
from .verify import VerifyReport, verify_checkpoint

__all__ = [
    "FORMATS",
    "Checkpoint",
    "SafetensorsWriter",
    "TensorInfo",
    "VerifyReport",
    "open_checkpoint",
    "plan_checkpoint",
    "quantize_checkpoint",
    "verify_checkpoint",
]
