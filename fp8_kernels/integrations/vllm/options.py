"""What users give through vLLM's `model_loader_extra_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ...schemes import as_scheme

_QUANTIZING = ("scheme", "ignore", "include", "schemes")
_WRITING_THROUGH = ("shared_scales", "staging_budget")


@dataclass(frozen=True)
class Options:
    """Args:
    scheme, ignore, include, schemes: with quantization="fp8_kernels": which weights become FP8 and how, see `Rules`.
        Patterns are of the checkpoint's names.
    shared_scales: with vLLM's own schemes: scales of a weight that is cut across ranks are those of the whole weight,
        as vLLM makes them. False: each rank has scales of its own and none waits for another.
    staging_budget: with vLLM's own schemes: see `LayerwiseLoader`.
    load_format: how vLLM reads the checkpoint's files: one of the formats of its `DefaultModelLoader`.
    """

    scheme: str = "per_channel"
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    schemes: Mapping[str, str] = field(default_factory=dict)
    shared_scales: bool = True
    staging_budget: int | None = None
    load_format: str = "auto"

    def __post_init__(self):
        for scheme in (self.scheme, *self.schemes.values()):
            as_scheme(scheme)

    @classmethod
    def split(cls, extra: Mapping) -> tuple[Options, dict]:
        """The options among the entries of an extra config, and the entries that are vLLM's.

        Raises:
            ValueError, TypeError: an option that cannot be.
        """
        ours = {option.name for option in fields(cls)}
        given = {key: value for key, value in extra.items() if key in ours}
        for key in ("ignore", "include"):
            if isinstance(given.get(key), str):
                raise TypeError(f"`{key}` must be a list of patterns, got the string {given[key]!r}")
            if key in given:
                given[key] = tuple(given[key])
        return cls(**given), {key: value for key, value in extra.items() if key not in ours}

    @property
    def selection(self) -> dict:
        """The arguments of `quantize_weights` and `quantization_config` among them."""
        return {name: getattr(self, name) for name in _QUANTIZING}

    def check_fits(self, quantization: str, ours: bool) -> None:
        """Raise ValueError for options that the quantization method has no use for.

        Args:
            quantization: its name.
            ours: is it quantization="fp8_kernels"?
        """
        default = Options()
        useless = _WRITING_THROUGH if ours else _QUANTIZING
        given = [name for name in useless if getattr(self, name) != getattr(default, name)]
        if given:
            other = "vLLM's own FP8 schemes" if ours else 'quantization="fp8_kernels"'
            raise ValueError(
                f"`model_loader_extra_config` must not hold {', '.join(given)} with quantization={quantization!r}: "
                f"that is for {other}"
            )
