"""quantization="fp8_kernels": the model is built as for the FP8 checkpoint that its bf16 one becomes on the way in."""

from __future__ import annotations

from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

from . import NAME


class Fp8KernelsConfig(CompressedTensorsConfig):
    """vLLM's config of a compressed-tensors checkpoint, for one that is not written anywhere.

    vLLM makes it without arguments, long before it knows the checkpoint. `Fp8KernelsLoader` gives it its content, from
    the checkpoint's headers, before the model is built.
    """

    def __init__(self):
        super().__init__(target_scheme_map={}, ignore=[], quant_format="")

    def read(self, quantization_config: dict) -> None:
        """Become the config that vLLM makes of a config.json with this `quantization_config`."""
        read = CompressedTensorsConfig.from_config(quantization_config)
        kept = {"packed_modules_mapping": self.packed_modules_mapping}  # the model's own dict, by reference
        vars(self).update(vars(read) | kept)

    @property
    def is_read(self) -> bool:
        return self.config is not None

    @classmethod
    def from_config(cls, config):
        """For config.json's own `quantization_config`, which says that the checkpoint is quantized already."""
        raise ValueError(
            f"quantization={NAME!r} takes checkpoints in high precision, got one that is quantized already"
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        self._check_read()
        super().apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer, prefix):
        self._check_read()
        return super().get_quant_method(layer, prefix)

    def _check_read(self):
        if self.is_read:
            return
        current = get_current_vllm_config_or_none()
        load_format = None if current is None else current.load_config.load_format
        raise ValueError(
            f"quantization={NAME!r} must come with load_format={NAME!r}, which quantizes the checkpoint while it is "
            f"read, got {load_format!r}"
        )
