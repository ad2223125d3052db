"""How FP8 checkpoints are laid out: names and shapes of stored tensors, and the `quantization_config` JSON.

Two formats. "compressed-tensors" is read by transformers, vLLM and SGLang, for any shape. "fp8" is the layout of
the DeepSeek checkpoints: 128x128 blocks only. The JSON is written by hand, because engines pin their own version
of the compressed-tensors package, and it is nothing but JSON.

A layout that an engine would refuse, or worse, read wrongly, is refused here with the way out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..errors import UnsupportedLayoutError
from ..schemes import PerBlock, PerChannel, PerTensor, Scheme, dtype_name, scheme_name

# Shards that engines load into one fused weight: their scales meet there, so per_tensor gives them a common one,
# and they become FP8 together or not at all.
FUSED_FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)
_FAMILY_OF = {member: family for family in FUSED_FAMILIES for member in family}
# A head that is tied to the embedding is a Linear of the model without being a tensor of the checkpoint.
TIED_HEAD = "lm_head"
# Model types whose Linear weights are stored [K, N]: rows are not output channels there.
TRANSPOSED_MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_BLOCK = 128


@dataclass(frozen=True)
class Format:
    """What the formats have in common.

    Attributes:
        name: users give it.
        scale_suffix: a module's scales are stored as `<module>.<scale_suffix>`, fp32.
    """

    name: str
    scale_suffix: str

    def check(self, name: str, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
        """Raise UnsupportedLayoutError unless the format's engines load this weight."""
        if dtype != torch.float8_e4m3fn:
            raise UnsupportedLayoutError(
                f"format {self.name!r} must hold float8_e4m3fn, which its engines load, got {dtype_name(dtype)}"
            )
        if not name.endswith(".weight"):
            raise UnsupportedLayoutError(
                f"`{name}` must be the weight of a module: format {self.name!r} has no name for its scales; "
                f"keep it with ignore=[{name!r}]"
            )
        if scheme.segments:
            raise UnsupportedLayoutError(
                f"`{name}` must have a scale of its own in format {self.name!r}, which stores q, k and v (gate and up) "
                f"one by one, got {scheme_name(scheme)}"
            )
        if len(shape) != 2:
            raise UnsupportedLayoutError(
                f"`{name}` must be [N, K] in format {self.name!r}, whose engines read experts one by one, "
                f"got {list(shape)}; keep it with ignore=[{name!r}]"
            )

    def scale_name(self, name: str) -> str:
        """Name of the scales of the weight of that name."""
        return f"{module_of(name)}.{self.scale_suffix}"

    def scale_shape(self, shape: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
        """Shape of the stored scales: the scheme's, but [1] for a whole weight."""
        return scheme.scale_shape(shape) or (1,)

    def config(self, schemes: dict[str, Scheme], kept: list[str]) -> dict:
        """The `quantization_config` of config.json.

        Args:
            schemes: module -> scheme of every FP8 module.
            kept: modules that stay in high precision.
        """
        raise NotImplementedError

    def scheme_of(self, config: dict, module: str) -> Scheme | None:
        """The scheme that the config gives an FP8 module; None where it gives none that this library writes."""
        raise NotImplementedError

    def keeps(self, config: dict, module: str) -> bool:
        """Does the config leave this module in high precision?"""
        raise NotImplementedError


@dataclass(frozen=True)
class CompressedTensors(Format):
    name: str = "compressed-tensors"
    scale_suffix: str = "weight_scale"

    def check(self, name, shape, scheme, dtype):
        super().check(name, shape, scheme, dtype)
        if not isinstance(scheme, (PerTensor, PerChannel)) and not _is_128_blocks(scheme):
            raise UnsupportedLayoutError(
                f"`{name}`: format {self.name!r} must be per_tensor, per_channel or per_block(128, 128) for its "
                f"engines, got {scheme_name(scheme)}; scheme='per_channel' works"
            )
        if isinstance(scheme, PerBlock):
            _check_whole_blocks(self.name, name, shape)
            if _ONE_EXPERT.search(name):
                raise UnsupportedLayoutError(
                    f"`{name}`: transformers multiplies experts of format {self.name!r} by scales of [N, 1] or [1] "
                    "only; for experts scheme='per_channel' works, and so do blocks in format='fp8'"
                )

    def config(self, schemes, kept):
        groups: dict[tuple, list[str]] = {}
        for module, scheme in schemes.items():
            groups.setdefault(_quantizer_fields(scheme), []).append(module)
        # The most frequent scheme is that of every Linear; engines prefer an exact name over a class.
        ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
        return {
            "quant_method": self.name,
            "format": "float-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": kept,
            "config_groups": {
                f"group_{i}": {
                    "targets": ["Linear"] if i == 0 else sorted(modules),
                    "weights": _quantizer(dynamic=False, **dict(fields[0])),
                    "input_activations": _quantizer(dynamic=True, **dict(fields[1])),
                    "output_activations": None,
                }
                for i, (fields, modules) in enumerate(ordered)
            },
        }

    def scheme_of(self, config, module):
        found = None
        for group in config.get("config_groups", {}).values():
            targets = group.get("targets", ())
            if any(_names(target, module) for target in targets):
                found = group
                break
            if "Linear" in targets:
                found = found or group
        weights = (found or {}).get("weights") or {}
        if weights.get("num_bits") != 8 or weights.get("type") != "float":
            return None
        if weights.get("strategy") == "block":
            return _block_scheme(weights.get("block_structure"))
        return {"tensor": PerTensor(), "channel": PerChannel()}.get(weights.get("strategy"))

    def keeps(self, config, module):
        return any(_names(pattern, module) for pattern in config.get("ignore") or ())


@dataclass(frozen=True)
class FineGrained(Format):
    name: str = "fp8"
    scale_suffix: str = "weight_scale_inv"

    def check(self, name, shape, scheme, dtype):
        super().check(name, shape, scheme, dtype)
        if not _is_128_blocks(scheme):
            raise UnsupportedLayoutError(
                f"`{name}`: format {self.name!r} must be per_block(128, 128), got {scheme_name(scheme)}; "
                "use scheme='per_block', or format='compressed-tensors'"
            )
        _check_whole_blocks(self.name, name, shape)

    def config(self, schemes, kept):
        return {
            "quant_method": self.name,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
            "modules_to_not_convert": kept,
        }

    def scheme_of(self, config, module):
        return _block_scheme(config.get("weight_block_size"))

    def keeps(self, config, module):
        # Readers match each entry as a pattern from the start of the name to a dot, or as the end of the name.
        for entry in config.get("modules_to_not_convert") or ():
            if module.endswith(entry) or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module):
                return True
        return False


FORMATS = {format.name: format for format in (CompressedTensors(), FineGrained())}


def as_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in FORMATS:
        raise ValueError(f"`format` must be one of {sorted(FORMATS)}, got {name!r}")
    return FORMATS[name]


def module_of(name: str) -> str:
    """The module that owns the tensor of that name."""
    return name.rpartition(".")[0]


def family_of(name: str) -> list[str]:
    """Names of all weights that engines fuse with this one, itself included, in their fixed order."""
    parts = name.split(".")
    if len(parts) < 2 or parts[-2] not in _FAMILY_OF:
        return [name]
    return [".".join((*parts[:-2], member, parts[-1])) for member in _FAMILY_OF[parts[-2]]]


def check_treated_alike(name: str, scheme: Scheme | None, other: str, other_scheme: Scheme | None) -> None:
    """Raise UnsupportedLayoutError for two of a fused family that do not become the same."""
    if scheme != other_scheme:
        treated = [scheme_name(each) if each else "kept" for each in (scheme, other_scheme)]
        raise UnsupportedLayoutError(
            f"`{name}` ({treated[0]}) and `{other}` ({treated[1]}) must be treated alike, "
            "since engines load them into one weight"
        )


def _check_whole_blocks(format_name, name, shape):
    # transformers takes N / number of scales for the block size when it dequantizes, so 192 rows under two scales
    # would silently be read as blocks of 96; engines' block kernels quantize activations in whole groups of 128.
    if any(size % _BLOCK for size in shape):
        raise UnsupportedLayoutError(
            f"`{name}` must be a multiple of {_BLOCK} in both dimensions for blocks in format {format_name!r}, "
            f"got {list(shape)}; scheme='per_channel' with format='compressed-tensors' works for any shape, "
            f"and ignore=[{name!r}] keeps this weight as it is"
        )


def _block_scheme(block):
    is_pair = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    return PerBlock(*block) if is_pair else None


def _is_128_blocks(scheme):
    return isinstance(scheme, PerBlock) and scheme.block == (_BLOCK, _BLOCK)


def _quantizer_fields(scheme):
    """(weights, activations) as sorted pairs, so that schemes which engines treat alike share a group."""
    if isinstance(scheme, PerBlock):
        weights = {"strategy": "block", "block_structure": tuple(scheme.block)}
        return tuple(weights.items()), (("strategy", "group"), ("group_size", scheme.block[1]))
    strategy = "tensor" if isinstance(scheme, PerTensor) else "channel"
    return (("strategy", strategy),), (("strategy", "token"),)


def _quantizer(dynamic, strategy, **sizes):
    common = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic, "strategy": strategy}
    return common | {key: list(size) if isinstance(size, tuple) else size for key, size in sizes.items()}


def _names(pattern, module):
    """Does a target or ignore entry of a compressed-tensors config name this module?"""
    return re.match(pattern[3:], module) is not None if pattern.startswith("re:") else pattern == module
