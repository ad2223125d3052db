"""vLLM: bf16 checkpoints become FP8 while vLLM loads them.

Installed beside vLLM this package is found by its entry point `vllm.general_plugins`; nothing has to be imported.

    LLM(model, quantization="fp8_kernels")                                 # as if the folder had been quantized before
    LLM(model, quantization="fp8_per_channel", load_format="fp8_kernels")  # vLLM's own scheme and bits, loaded by us

Both take options through `model_loader_extra_config`, see `options`. docs/engines.md says what happens.
"""

from __future__ import annotations

NAME = "fp8_kernels"  # of the quantization method and of the load format


def register() -> None:
    """Tell vLLM of our quantization method and our model loader. vLLM calls it in each of its processes.

    Any number of calls do what one does. Where the installed vLLM is not one that this package knows, what does not fit
    is left out, with a warning that says why.
    """
    from . import compat

    problem = compat.why_not_plugin()
    if problem is not None:
        compat.logger().warning("%s; quantization=%r is not there", problem, NAME)
        return
    from vllm.model_executor import model_loader
    from vllm.model_executor.layers import quantization

    from .config import Fp8KernelsConfig
    from .engine_args import choose_load_format
    from .loader import Fp8KernelsLoader

    if quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(NAME) is not Fp8KernelsConfig:
        quantization.register_quantization_config(NAME)(Fp8KernelsConfig)
    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(NAME) is not Fp8KernelsLoader:
        model_loader.register_model_loader(NAME)(Fp8KernelsLoader)
    choose_load_format()
