"""One line from the user: `quantization="fp8_kernels"` brings its load format with it.

vLLM chooses the loader by `load_format` alone, and the place where both are known is `EngineArgs.create_load_config`.
"""

from __future__ import annotations

import functools

from . import NAME, compat

_OURS = "_fp8_kernels_chooses_load_format"


def choose_load_format() -> None:
    """Let `EngineArgs.create_load_config` give `load_format="fp8_kernels"` where the quantization is ours.

    The format that the user asked for becomes the option `load_format`. Without effect on any other quantization.
    """
    from vllm.engine.arg_utils import EngineArgs

    problem = compat.why_not_engine_args(EngineArgs)
    if problem is not None:
        compat.logger().warning("%s; give load_format=%r with quantization=%r", problem, NAME, NAME)
        return
    original = EngineArgs.create_load_config
    if hasattr(original, _OURS):
        return

    @functools.wraps(original)
    def create_load_config(self):
        config = original(self)
        if self.quantization == NAME and config.load_format != NAME:
            asked = {"load_format": config.load_format}
            config.model_loader_extra_config = asked | config.model_loader_extra_config
            config.load_format = NAME
        return config

    setattr(create_load_config, _OURS, True)
    EngineArgs.create_load_config = create_load_config
