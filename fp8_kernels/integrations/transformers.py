"""`from_pretrained(..., quantization_config=Fp8KernelsConfig(...))`: transformers models become FP8 while they load.

transformers decides what it always does: which files, which class, which device, and which tensor of the checkpoint
belongs to which of the model. When it wants the first of them, `Load` fills the whole model through `LayerwiseLoader`,
in the order of the files, so that high-precision weights take a bounded buffer of the device, merged experts included.
What remains is transformers' own again: buffers that no checkpoint holds, ties, weights of a new head.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping

import torch
import transformers
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..buffers import keep_precision
from ..errors import LoadError
from ..loading.report import Report
from ..loading.rules import Rules
from ..modules import checked_activation
from ..ops import FP8_DTYPES
from ..schemes import Scheme, as_scheme, dtype_name, scheme_name
from .compressed import compressed_state
from .takeover import Load

METHOD = "fp8_kernels"
OLDEST = (5, 17)


@register_quantization_config(METHOD)
class Fp8KernelsConfig(QuantizationConfigMixin):
    """What `from_pretrained` is to make of a model's weights.

    Args:
        scheme, ignore, include, schemes: which weights become FP8 and how, see `Rules`; in the model's names. As for
            `load_checkpoint`, a folder that holds FP8 weights is taken as it is where none of them is given.
        activation: "dynamic" or None, see `Fp8Linear`.
        dtype: of the codes.

    Raises:
        ValueError, TypeError: a scheme, activation or dtype that does not exist.
    """

    def __init__(
        self,
        scheme: str | Scheme | None = None,
        *,
        ignore: Iterable[str] = (),
        include: Iterable[str] = (),
        schemes: Mapping[str, str | Scheme] | None = None,
        activation: str | None = "dynamic",
        dtype: torch.dtype = torch.float8_e4m3fn,
    ):
        self.quant_method = METHOD
        self.scheme = None if scheme is None else as_scheme(scheme)
        chosen = Rules(ignore=ignore, include=include)
        self.ignore, self.include = chosen.ignore, chosen.include
        self.schemes = {pattern: as_scheme(each) for pattern, each in (schemes or {}).items()}
        self.activation = checked_activation(activation)
        if dtype not in FP8_DTYPES:
            raise TypeError(f"`dtype` must be one of {FP8_DTYPES}, got {dtype}")
        self.dtype = dtype
        self.stored: dict | None = None  # what the config.json of the folder says of its weights
        self.saved: dict | None = None  # what that of a saved folder has to say

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """What `to_dict` made, from a config.json."""
        arguments = {key: value for key, value in config_dict.items() if key != "quant_method"}
        if isinstance(arguments.get("dtype"), str):
            arguments["dtype"] = getattr(torch, arguments["dtype"])
        return super().from_dict(arguments, return_unused_kwargs, **kwargs)

    @property
    def is_default(self) -> bool:
        """Does it say nothing of what becomes FP8?"""
        return self.scheme is None and not (self.ignore or self.include or self.schemes)

    @property
    def rules(self) -> dict:
        """For `make_plan` and those that call it."""
        scheme = "per_channel" if self.scheme is None else self.scheme
        return {"scheme": scheme, "ignore": self.ignore, "include": self.include, "schemes": self.schemes}

    def to_dict(self) -> dict:
        """For config.json; of a saved model, the layout that its readers have to know."""
        if self.saved is not None:
            return copy.deepcopy(self.saved)
        return {
            "quant_method": METHOD,
            "scheme": None if self.scheme is None else scheme_name(self.scheme),
            "ignore": list(self.ignore),
            "include": list(self.include),
            "schemes": {pattern: scheme_name(each) for pattern, each in self.schemes.items()},
            "activation": self.activation,
            "dtype": dtype_name(self.dtype),
        }


@register_quantizer(METHOD)
class Fp8KernelsQuantizer(HfQuantizer):
    """What transformers calls on its way.

    Attributes:
        report: of the load, once it is done.
    """

    quantization_config: Fp8KernelsConfig

    def __init__(self, quantization_config: Fp8KernelsConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False  # also where the folder is: what is to be prepared for that is prepared here
        self.report: Report | None = None
        self._device = torch.device("cpu")
        self._load: Load | None = None
        self._conversions: list = []

    def validate_environment(self, *args, **kwargs):
        """Raises ImportError where transformers is too old."""
        version = transformers.__version__
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
            raise ImportError(
                f"Fp8KernelsConfig needs transformers {'.'.join(map(str, OLDEST))} or newer, got {version}"
            )

    def update_device_map(self, device_map):
        """The one device of the model; "auto" is the current GPU, or the CPU where there is none.

        Raises:
            ValueError: several devices, or the disk.
        """
        if isinstance(device_map, str):  # the name of a device has become a map before
            has_gpu = torch.cuda.is_available()
            device_map = {"": torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")}
        devices = {str(device) for device in (device_map or {"": "cpu"}).values()}
        if len(devices) != 1 or "disk" in devices:
            raise ValueError(f"`device_map` must name one device for the whole model, got {', '.join(sorted(devices))}")
        (device,) = devices
        self._device = torch.device("cuda", int(device)) if device.isdigit() else torch.device(device)
        return device_map

    def param_element_size(self, model, param_name, param) -> float:
        """Bytes an element that transformers is to claim beforehand: none, since the load asks for its memory itself,
        and what is claimed and does not fit exactly would stay beside that."""
        return 0

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        keep_precision(model)
        self._load = Load(model, self.quantization_config, self._device, checkpoint_files)

    def update_weight_conversions(self, weight_conversions, model=None):
        """Put a `Collector` in the place of each converter, and one last for what no converter takes."""
        if self._load is None:  # asked about names alone
            return weight_conversions
        return self._load.collectors(weight_conversions)

    def _process_model_after_weight_loading(self, model, **kwargs):
        load, self._load = self._load, None
        if load.report is None:
            raise LoadError(f"transformers {transformers.__version__} asked for no tensor: the model is not loaded")
        self.report = load.report
        model._weight_conversions = self._conversions = load.used_conversions()
        return model

    def get_state_dict_and_metadata(self, model):
        """The model in the layout of "compressed-tensors", see `compressed_state`."""
        state, self.quantization_config.saved = compressed_state(model, self._conversions)
        model._weight_conversions = []  # these names are final
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _read_folders_that_are_fp8():
    """Let `Fp8KernelsConfig` read folders whose config.json names another method, which transformers refuses."""
    stock = AutoHfQuantizer.merge_quantization_configs.__func__

    def merge_quantization_configs(cls, quantization_config, quantization_config_from_args):
        if not isinstance(quantization_config_from_args, Fp8KernelsConfig):
            return stock(cls, quantization_config, quantization_config_from_args)
        stored = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        given = copy.deepcopy(quantization_config_from_args)
        given.stored = stored
        return given

    AutoHfQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)


_read_folders_that_are_fp8()
