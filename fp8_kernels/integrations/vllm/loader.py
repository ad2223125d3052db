"""load_format="fp8_kernels": vLLM's default loader, with weights that become FP8 on the way in."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as LOADERS
from vllm.model_executor.model_loader import DefaultModelLoader

from ...checkpoint.formats import as_format, module_of
from ...checkpoint.reader import Checkpoint, read_json
from ...checkpoint.stream import quantization_config, quantize_weights
from ...errors import UnsupportedLayoutError
from ...schemes import PerTensor
from . import NAME, compat
from .config import Fp8KernelsConfig
from .options import Options

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


class Fp8KernelsLoader(DefaultModelLoader):
    """What it does depends on the quantization method.

    quantization="fp8_kernels": the stream of weights is wrapped by `quantize_weights`, and vLLM loads what looks like
    the FP8 checkpoint that `fp8-kernels quantize` would have written.

    quantization="fp8_per_tensor", "fp8_per_channel", "fp8_per_block": vLLM's own online methods, with our kernels,
    loaded through a `LayerwiseLoader`, see `online`.

    Args:
        load_config: its `model_loader_extra_config` may hold `Options`.
    """

    def __init__(self, load_config):
        self.options, extra = Options.split(load_config.model_loader_extra_config)
        read_by = LOADERS.get(self.options.load_format)
        if read_by is not DefaultModelLoader:
            known = sorted(name for name, loader in LOADERS.items() if loader is DefaultModelLoader)
            raise ValueError(
                f"`load_format` of `model_loader_extra_config` must be one of {known}, got {self.options.load_format!r}"
            )
        # The base class chooses files by the format, and knows nothing of ours.
        super().__init__(replace(load_config, load_format=self.options.load_format, model_loader_extra_config=extra))
        self.report = None
        self._writes_through = False

    def load_model(self, vllm_config, model_config, prefix=""):
        """Load a model.

        Raises:
            ValueError: a quantization method that this load format does nothing for, or options that it has no use for.
            UnsupportedVllmError: one of vLLM's own, in a vLLM that we do not know.
            CheckpointError, UnsupportedLayoutError, UnmatchedPatternError: as `quantization_config`.
        """
        config, method = vllm_config.quant_config, model_config.quantization
        ours = isinstance(config, Fp8KernelsConfig)
        if ours:
            self.options.check_fits(method, ours)
            config.read(self._quantization_config(model_config))
            # The graph depends on the scheme, which vLLM's key of compiled graphs does not hold otherwise.
            if isinstance(vllm_config.additional_config, dict):
                vllm_config.additional_config = {**vllm_config.additional_config, NAME: repr(self.options)}
        elif type(config) is OnlineQuantizationConfig:
            self.options.check_fits(method, ours)
            compat.check_online()
            from .online import WriteThroughConfig

            vllm_config.quant_config = WriteThroughConfig(config.args)
            self._writes_through = True
        elif model_config.runner_type != "draft":  # a draft model has a quantization of its own, and our load format
            raise ValueError(
                f"load_format={NAME!r} must come with quantization={NAME!r}, 'fp8_per_tensor', 'fp8_per_channel' or "
                f"'fp8_per_block', got {method!r}"
            )
        return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model, model_config):
        started = time.perf_counter()
        if not self._writes_through:
            super().load_weights(model, model_config)
        else:
            from .online import write_through

            with write_through(model, self.options) as self.report:
                super().load_weights(model, model_config)
        if self.report is not None:
            compat.logger().info("%.2f s, FP8 by fp8_kernels:\n%s", time.perf_counter() - started, self.report)

    def get_all_weights(self, model_config, model):
        """(name, tensor) as vLLM's loader gives them; with quantization="fp8_kernels" as FP8."""
        weights = super().get_all_weights(model_config, model)
        if model_config.quantization != NAME:
            return weights
        if getattr(model, "secondary_weights", ()):
            raise ValueError(
                f"quantization={NAME!r} must be given a model of one checkpoint, got {type(model).__name__}, which "
                "reads several"
            )
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        names = self._open_checkpoint(model_config).metadata()
        stream = quantize_weights(weights, device=device, names=names, **self.options.selection)
        self.report = stream.report
        return stream

    def _quantization_config(self, model_config):
        checkpoint = self._open_checkpoint(model_config)
        try:
            content = quantization_config(checkpoint, **self.options.selection)
        except UnsupportedLayoutError as error:
            raise UnsupportedLayoutError(
                f"{error}. vLLM's own schemes (quantization='fp8_per_block', say) have other limits, and take "
                f"load_format={NAME!r} too"
            ) from error
        _check_experts(checkpoint.metadata(), content)
        return content

    def _open_checkpoint(self, model_config):
        """The headers of the files that vLLM's loader reads."""
        folder, files, _, _ = self._prepare_weights(
            model_config.model,
            subfolder=None,
            revision=model_config.revision,
            fall_back_to_pt=True,
            allow_patterns_overrides=None,
        )
        folder = Path(folder)
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        return Checkpoint(folder, sorted(Path(file).name for file in files), config)


def _check_experts(names, content):
    """vLLM has no kernel for experts with a scale a weight beside one a token, and says so with a bare assertion."""
    fmt = as_format("compressed-tensors")
    for name in names:
        module = module_of(name)
        if not _ONE_EXPERT.search(name) or fmt.keeps(content, module):
            continue
        if isinstance(fmt.scheme_of(content, module), PerTensor):
            raise UnsupportedLayoutError(
                f"`{name}` must not be per_tensor: vLLM's experts take per_channel with quantization={NAME!r}; "
                "quantization='fp8_per_tensor' has them per_tensor"
            )
