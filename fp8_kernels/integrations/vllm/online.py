"""vLLM's own online FP8 schemes, with our kernels, and loaded without buffering and replay.

vLLM's methods keep every source tensor of a layer until it has counted as many elements as the layer has, run each
weight loader again on real memory, and then quantize the layer, experts one by one in a Python loop. Ours stand in for
them under the same names: the weights stay on the meta device, a `LayerwiseLoader` sees what vLLM's loaders write to
them, each expert or row is quantized when it is there, and the result is laid out as vLLM does it. The bits are vLLM's.

To be imported after `compat.check_online`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
from vllm.distributed import get_ep_group, get_tp_group
from vllm.model_executor.layers.quantization.online import fp8 as vllm_fp8
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    amax_for_moe_weight_quant,
    amax_for_tp_weight_quant,
)
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from ... import ops
from ...loading import LayerwiseLoader, Report
from ...schemes import PerBlock, PerChannel, PerTensor, Scheme
from .options import Options

_DONE = "_already_called_process_weights_after_loading"  # vLLM's mark on a layer


class WriteThroughConfig(OnlineQuantizationConfig):
    """vLLM's config of its online schemes, with our methods in the place of its FP8 ones."""

    def _get_method_cls(self, spec, table, layer_cls):
        method = super()._get_method_cls(spec, table, layer_cls)
        return STAND_INS.get(method, method)


class _StandIn:
    """What ours have in common.

    Attributes:
        scheme: of the weights, with vLLM's numerics.
        weights: the parameters of the layer that become FP8.
    """

    scheme: Scheme
    weights: tuple[str, ...]

    def create_weights(self, layer, *args, **kwargs):
        super().create_weights(layer, *args, **kwargs)
        for parameter in layer.parameters(recurse=False):
            parameter.weight_loader = _get_original_loader(parameter)
        get_layerwise_info(layer).reset()  # vLLM has nothing to wait for here

    def process_weights_after_loading(self, layer):
        """For weights that are in high precision: after a reload by vLLM, which buffers a layer and replays it."""
        if getattr(layer, _DONE, False):
            return
        results = []
        for leaf in self.weights:
            weight = getattr(layer, leaf)
            amax = None
            if self.cut_group(layer, leaf) is not None:
                amax = self._shared_amax(ops.amax(weight, self.scheme))
            results += ops.quantize(weight, self.scheme, dtype=current_platform.fp8_dtype(), amax=amax)
        self.place(layer, *results)
        setattr(layer, _DONE, True)

    def take(self, layer):
        """Lay out what a `LayerwiseLoader` has made of the layer's weights."""
        results = []
        for leaf in self.weights:
            results += getattr(layer, leaf).data, layer._parameters.pop(f"{leaf}_scale").data
        self.place(layer, *results)
        setattr(layer, _DONE, True)

    def cut_group(self, layer, leaf) -> torch.distributed.ProcessGroup | None:
        """The ranks that hold a part each of what one scale covers; None where this one holds all of it."""
        raise NotImplementedError


class _Linear(_StandIn):
    weights = ("weight",)

    def place(self, layer, q, scale):
        layer.input_scale = None
        self._replace(layer, q, scale)
        self.fp8_linear.process_weights_after_loading(layer)

    def _replace(self, layer, q, scale):
        replace_parameter(layer, "weight", q.t())
        replace_parameter(layer, "weight_scale", scale)

    def cut_group(self, layer, leaf):
        if isinstance(self.scheme, PerBlock):
            return None
        cut = vllm_fp8._is_tp_sharded(layer, reduces_output_dim=isinstance(self.scheme, PerTensor))
        return get_tp_group().device_group if cut else None

    def _shared_amax(self, amax):
        return amax_for_tp_weight_quant(amax, True)


class _PerTensorLinear(_Linear):
    scheme = PerTensor(numerics="vllm")

    def _replace(self, layer, q, scale):
        super()._replace(layer, q, scale.reshape(1))
        if self.use_marlin and hasattr(self.fp8_linear, "marlin_input_dtype"):
            self.fp8_linear.marlin_input_dtype = self.marlin_input_dtype


class _PerChannelLinear(_Linear):
    scheme = PerChannel(numerics="vllm")

    def place(self, layer, q, scale):
        super().place(layer, q, scale)
        vllm_fp8.expose_input_quant_key(layer, self.fp8_linear)


class _PerBlockLinear(_Linear):
    scheme = PerBlock(128, 128, numerics="vllm")

    def _replace(self, layer, q, scale):
        replace_parameter(layer, "weight", q)
        replace_parameter(layer, "weight_scale_inv", scale)


class _Moe(_StandIn):
    weights = ("w13_weight", "w2_weight")

    def process_weights_after_loading(self, layer):
        if not getattr(layer, _DONE, False):
            self._zero_padding(layer)
        super().process_weights_after_loading(layer)

    def place(self, layer, w13, w13_scale, w2, w2_scale):
        layer.w13_input_scale = layer.w2_input_scale = None
        if self.block_quant:
            layer.weight_block_size = self.weight_block_size
        self._setup_kernel(layer, w13, w2, w13_scale, w2_scale, w13_input_scale=None, w2_input_scale=None)

    def cut_group(self, layer, leaf):
        # A rank holds a part of each expert's intermediate size: of the rows of w13, of the columns of w2.
        reduced = isinstance(self.scheme, PerTensor) or (isinstance(self.scheme, PerChannel) and leaf == "w2_weight")
        return get_ep_group().device_group if reduced and self.moe.tp_size > 1 else None

    def _shared_amax(self, amax):
        return amax_for_moe_weight_quant(amax, self.moe.tp_size)

    def logical_shapes(self, layer) -> dict[str, tuple[int, ...]]:
        """Name of a padded weight -> the part of it that vLLM's loaders write, or may have zeros for."""
        config, shapes = layer.moe_config, {}
        hidden, inner = config.hidden_dim_unpadded, config.intermediate_size_per_partition_unpadded
        num_experts, num_rows, _ = layer.w13_weight.shape
        shards = self.moe.w13_num_shards
        shapes["w13_weight"] = (num_experts, num_rows - num_rows // shards + inner, hidden)
        shapes["w2_weight"] = (num_experts, hidden, inner)
        return {leaf: shape for leaf, shape in shapes.items() if shape != tuple(getattr(layer, leaf).shape)}

    def write_padding(self, layer):
        """Padding that is no corner of its weight, and that of biases, has to be written: it is zero, as in vLLM."""
        config, shards = layer.moe_config, self.moe.w13_num_shards
        inner, hidden = config.intermediate_size_per_partition_unpadded, config.hidden_dim_unpadded
        num_rows = layer.w13_weight.shape[1] // shards
        w13_bias, w2_bias = getattr(layer, "w13_bias", None), getattr(layer, "w2_bias", None)
        for shard in range(shards) if inner < num_rows else ():
            padding = slice(shard * num_rows + inner, (shard + 1) * num_rows)
            if shard < shards - 1:
                layer.w13_weight.data[:, padding, :hidden].zero_()
            if w13_bias is not None:
                w13_bias.data[:, padding].zero_()
        if w2_bias is not None and hidden < w2_bias.shape[1]:
            w2_bias.data[:, hidden:].zero_()


class _PerTensorMoe(_Moe):
    scheme = PerTensor(numerics="vllm")


class _PerChannelMoe(_Moe):
    scheme = PerChannel(numerics="vllm")


class _PerBlockMoe(_Moe):
    scheme = PerBlock(128, 128, numerics="vllm")


def _stand_in(ours, theirs):
    # vLLM's layers choose their weight loaders by the name of the method's class.
    return type(theirs.__name__, (ours, theirs), {"__module__": __name__})


STAND_INS = {
    theirs: _stand_in(ours, theirs)
    for ours, theirs in (
        (_PerTensorLinear, vllm_fp8.Fp8PerTensorOnlineLinearMethod),
        (_PerChannelLinear, vllm_fp8.Fp8PtpcOnlineLinearMethod),
        (_PerBlockLinear, vllm_fp8.Fp8PerBlockOnlineLinearMethod),
        (_PerTensorMoe, vllm_fp8.Fp8PerTensorOnlineMoEMethod),
        (_PerChannelMoe, vllm_fp8.Fp8PtpcOnlineMoEMethod),
        (_PerBlockMoe, vllm_fp8.Fp8PerBlockOnlineMoEMethod),
    )
}


@contextlib.contextmanager
def write_through(model: torch.nn.Module, options: Options | None = None) -> Iterator[Report]:
    """Inside, what vLLM's loaders write to the layers of our methods becomes FP8 as it arrives.

    Other layers are vLLM's alone: they are neither seen nor checked. Gives the report, complete when it is left.

    Args:
        model: built by vLLM with a `WriteThroughConfig`.
        options: `shared_scales` and `staging_budget` count.

    Raises:
        ValueError: no layer of the model has one of our methods.
        IncompleteLoadError, NonFiniteWeightError, ConflictingShardError, LoadError: as `LayerwiseLoader`.
    """
    options = options or Options()
    layers = {name: module for name, module in model.named_modules() if _is_ours(module)}
    if not layers:
        raise ValueError("the model must have layers of vLLM's FP8 schemes, got none: leave out load_format")
    loader = LayerwiseLoader(
        _Layers(layers),
        device=next((p.device for p in model.parameters() if not p.is_meta), None),
        dtype=current_platform.fp8_dtype(),
        staging_budget=options.staging_budget,
        **_what_becomes_fp8(layers),
        scale_group=_groups(layers) if options.shared_scales else None,
    )
    with loader:
        for layer in layers.values():
            if isinstance(layer.quant_method, _Moe):
                layer.quant_method.write_padding(layer)
        yield loader.report
    # At the end, and not when a layer is complete: until then vLLM's loaders must find weights as they know them, for a
    # shard that comes twice too. Nothing else holds the codes then: where a kernel wants them in another layout, they
    # are there twice for one layer at a time.
    del loader
    for layer in layers.values():
        layer.quant_method.take(layer)


class _Layers(torch.nn.Module):
    """Some layers of a model under the names that they have in it."""

    def __init__(self, layers):
        super().__init__()
        self._modules.update(layers)  # `add_module` takes no names with dots


def _is_ours(module):
    method = getattr(module, "quant_method", None)
    return isinstance(method, _StandIn) and method.uses_meta_device


def _what_becomes_fp8(layers):
    """The arguments of `LayerwiseLoader` that say it."""
    by_scheme: dict[Scheme, list[str]] = {}
    others, logical_shapes = [], {}
    for name, layer in layers.items():
        method = layer.quant_method
        by_scheme.setdefault(method.scheme, []).extend(f"{name}.{leaf}" for leaf in method.weights)
        others += [f"{name}.{leaf}" for leaf, _ in layer.named_parameters() if leaf not in method.weights]
        if isinstance(method, _Moe):
            logical_shapes |= {f"{name}.{leaf}": shape for leaf, shape in method.logical_shapes(layer).items()}
    return {
        "include": [_exactly(names) for names in by_scheme.values()],
        "schemes": {_exactly(names): scheme for scheme, names in by_scheme.items()},
        "optional": [_exactly(others)] if others else [],  # biases: vLLM does not ask for what a checkpoint lacks
        "logical_shapes": logical_shapes,
    }


def _groups(layers):
    """Pattern -> group of all weights whose scales are the whole weight's; None if there are none.

    Raises:
        ValueError: they span different ranks, linear layers those of the tensor parallelism, experts more.
    """
    group_of, names = {}, []
    for name, layer in layers.items():
        for leaf in layer.quant_method.weights:
            group = layer.quant_method.cut_group(layer, leaf)
            if group is not None:
                group_of[tuple(torch.distributed.get_process_group_ranks(group))] = group
                names.append(f"{name}.{leaf}")
    if len(group_of) > 1:
        raise ValueError(
            "linear layers and experts must be cut across the same ranks to share scales, got "
            f"{' and '.join(str(list(ranks)) for ranks in group_of)}; model_loader_extra_config={{'shared_scales': "
            "False}} gives each rank scales of its own"
        )
    return {_exactly(names): group for group in group_of.values()} or None


def _exactly(names: Iterable[str]) -> str:
    """One pattern for all of these names: a list of patterns would be tried one by one for each name."""
    return f"re:^(?:{'|'.join(map(re.escape, names))})$"
