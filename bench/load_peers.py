"""Other loaders of the same checkpoint folders, for `bench.load`: `load(folder, device)` returns what stays in memory.

Their seconds are of everything that their one call does, building the model included; one that is not here, or cannot
load on this device, is left out with the reason.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import warnings
from pathlib import Path

import torch


class Absent(Exception):
    """The loader cannot be measured here; the message says why."""


def bf16(folder: Path, device: torch.device):
    """transformers, no quantization."""
    return _from_pretrained(folder, device, None)


def finegrained_fp8(folder: Path, device: torch.device):
    """transformers' FineGrainedFP8: 128 x 128 blocks."""
    if device.type != "cuda":
        raise Absent("FineGrainedFP8 quantizes on a GPU")
    import transformers

    return _from_pretrained(folder, device, transformers.FineGrainedFP8Config())


def torchao(folder: Path, device: torch.device):
    """torchao's float8 weights, a scale a row, through transformers."""
    if importlib.util.find_spec("torchao") is None:
        raise Absent("torchao is not installed")
    import transformers

    try:
        from torchao.quantization import Float8WeightOnlyConfig

        config = transformers.TorchAoConfig(Float8WeightOnlyConfig())
    except (ImportError, ValueError) as error:
        raise Absent(f"transformers cannot use this torchao: {error}") from error
    return _from_pretrained(folder, device, config)


def vllm(folder: Path, device: torch.device):
    """vLLM's online FP8; its engine's start around the load is in its seconds."""
    if importlib.util.find_spec("vllm") is None:
        raise Absent("vLLM is not installed")
    from vllm import LLM

    options = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 256}
    return LLM(str(folder), quantization="fp8", **options)


PEERS = {
    "transformers bf16": bf16,
    "transformers FineGrainedFP8": finegrained_fp8,
    "torchao through transformers": torchao,
    "vLLM online fp8": vllm,
}


def _from_pretrained(folder, device, config):
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    options = {} if config is None else {"quantization_config": config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map={"": device}, **options
            )
        except Exception as error:  # anything may go wrong in there, and our own figures are still wanted
            gc.collect()
            raise Absent(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
