"""load_format="fp8_kernels" with vLLM's own schemes: its layers hold the bytes that its own loading gives them."""

import contextlib
import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .vllm_env import (  # isort: skip
    blocks_as_on_a_gpu,
    current,
    engine_config,
    load_model,
    make_model,
    needs_block_kernels,
    needs_kernels,
    tensors,
    without_compiled_ops,
)

from vllm.config.quantization import resolve_quantization_config
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.online import fp8 as vllm_fp8
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.model_loader.reload import layerwise

from fp8_kernels import ops
from fp8_kernels.errors import IncompleteLoadError
from fp8_kernels.integrations.vllm import NAME, compat
from fp8_kernels.integrations.vllm.online import STAND_INS, WriteThroughConfig, write_through
from fp8_kernels.integrations.vllm.options import Options
from fp8_kernels.testing import assert_same_bits

SCHEMES = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block")
HIDDEN, INNER, EXPERTS = 256, 384, 5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """vLLM's config of a model that has experts."""
    return engine_config(make_model(tmp_path_factory.mktemp("moe"), "qwen3_moe"))


@pytest.fixture
def no_kernels(monkeypatch):
    """The layers alone: what this machine has no kernels for is taken out, for vLLM's methods and for ours."""
    without_compiled_ops(monkeypatch)


def build(quant_config, name, inner=INNER, has_bias=False):
    """A module of each kind, as vLLM's models make them."""
    model = torch.nn.Module()
    common = {"quant_config": quant_config, "params_dtype": torch.bfloat16}
    model.qkv = QKVParallelLinear(HIDDEN, 64, 4, 2, bias=True, prefix=f"{name}.qkv", **common)
    model.gate_up = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False, prefix=f"{name}.gate_up", **common)
    model.down = RowParallelLinear(INNER, HIDDEN, bias=False, prefix=f"{name}.down", **common)
    sizes = {"num_experts": EXPERTS, "top_k": 2, "hidden_size": HIDDEN, "intermediate_size": inner}
    model.moe = FusedMoEFactory(**sizes, has_bias=has_bias, prefix=f"{name}.moe", **common)
    model.norm = torch.nn.Parameter(torch.ones(HIDDEN))
    return model


def shards(inner=INNER, seed=0, has_bias=False):
    """(path of the parameter, tensor, arguments of its weight loader): a checkpoint in its usual order."""
    generator = torch.Generator().manual_seed(seed)

    def w(*shape):
        rows = torch.randint(-12, 3, (shape[0], *(1 for _ in shape[1:])), generator=generator).float().exp2()
        return (torch.randn(*shape, generator=generator) * rows).to(torch.bfloat16)

    for shard, rows in (("q", 256), ("k", 128), ("v", 128)):
        yield "qkv.weight", w(rows, HIDDEN), (shard,)
        yield "qkv.bias", w(rows), (shard,)
    yield "gate_up.weight", w(INNER, HIDDEN), (0,)
    yield "gate_up.weight", w(INNER, HIDDEN), (1,)
    yield "down.weight", w(HIDDEN, INNER), ()
    for expert in range(EXPERTS):
        for shard, shape in (("w1", (inner, HIDDEN)), ("w2", (HIDDEN, inner)), ("w3", (inner, HIDDEN))):
            leaf = "w2_weight" if shard == "w2" else "w13_weight"
            yield f"moe.routed_experts.{leaf}", w(*shape), (f"experts.{leaf}", shard, expert)
            if has_bias:
                leaf = leaf.replace("weight", "bias")
                yield f"moe.routed_experts.{leaf}", w(shape[0]), (f"experts.{leaf}", shard, expert)
    yield "norm", w(HIDDEN), ()


def load(model, checkpoint):
    """What every `load_weights` of vLLM comes down to."""
    parameters = dict(model.named_parameters())
    for path, tensor, arguments in checkpoint:
        parameter = parameters[path]
        loader = getattr(parameter, "weight_loader", layerwise.default_weight_loader)
        loader(parameter, tensor, *arguments)


def loaded(config, scheme, ours, checkpoint=None, inner=INNER, has_bias=False, options=None):
    """The modules, loaded as vLLM does it or by us, and then processed as vLLM does in any case."""
    arguments = resolve_quantization_config(scheme, None)
    with current(config):
        quant_config = (WriteThroughConfig if ours else OnlineQuantizationConfig)(arguments)
        model = build(quant_config, f"m{torch.randint(1 << 60, ()).item()}", inner, has_bias)
        layerwise.record_metadata_for_reloading(model)
        with write_through(model, options) if ours else contextlib.nullcontext() as report:
            load(model, shards(inner, has_bias=has_bias) if checkpoint is None else checkpoint)
        layerwise.finalize_layerwise_processing(model, config.model_config)
        process(model)
    return model, report


def process(model):
    for module in model.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


def assert_same_layers(ours, theirs):
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert (ours[name].stride(), type(ours[name])) == (t.stride(), type(t)), name
        assert_same_bits(ours[name], t, name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_are_those_of_vllm(config, no_kernels, scheme):
    """Codes, scales, biases, layouts, classes: linear layers and experts, loaded once and seen as they are written."""
    theirs, _ = loaded(config, scheme, ours=False)
    ours, report = loaded(config, scheme, ours=True)
    assert_same_layers(ours, theirs)
    assert report.quantized_tensors == 5
    assert report.quantized_units == 3 + 2 * EXPERTS


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_are_called_once_a_weight(config, no_kernels, monkeypatch, scheme):
    """Experts of a layer that is in high precision become FP8 in one call, to the bits of vLLM's loop."""
    theirs, _ = loaded(config, scheme, ours=False)
    quantize, calls = ops.quantize, []
    monkeypatch.setattr(ops, "quantize", lambda w, *a, **k: calls.append(tuple(w.shape)) or quantize(w, *a, **k))
    with current(config):
        model = build(WriteThroughConfig(resolve_quantization_config(scheme, None)), f"{scheme}.once")
        for module in model.modules():
            layerwise.materialize_layer(module, layerwise.get_layerwise_info(module))
        load(model, shards())
        process(model)
    assert_same_layers(model, theirs)
    assert sorted(c for c in calls if len(c) == 3) == [(EXPERTS, HIDDEN, INNER), (EXPERTS, 2 * INNER, HIDDEN)]
    assert len(calls) == 5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_does_not_matter(config, no_kernels, scheme):
    """Shards in any order, some of them twice."""
    theirs, _ = loaded(config, scheme, ours=False)
    shuffled = list(shards())
    order = torch.randperm(len(shuffled)).tolist()
    again = [shuffled[i] for i in (*order, *order[:3])]
    ours, _ = loaded(config, scheme, ours=True, checkpoint=again)
    assert_same_layers(ours, theirs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_vllm_can_reload_what_we_loaded(config, no_kernels, scheme):
    """Its own in-place reload, which buffers and replays, meets our methods: new values at the old addresses."""
    model, _ = loaded(config, scheme, ours=True)
    pointers = {name: t.data_ptr() for name, t in model.named_parameters()}
    with current(config):
        layerwise.initialize_layerwise_reload(model)
        load(model, shards(seed=1))
        layerwise.finalize_layerwise_reload(model, config.model_config)
    theirs, _ = loaded(config, scheme, ours=False, checkpoint=shards(seed=1))
    assert_same_layers(model, theirs)
    assert pointers == {name: t.data_ptr() for name, t in model.named_parameters()}


@pytest.mark.parametrize("has_bias", [False, True])
def test_padded_experts_complete(config, no_kernels, has_bias):
    """vLLM pads the intermediate size of experts to whole blocks; padding is zero and keeps nothing waiting."""
    padded = {"inner": 200, "has_bias": has_bias}
    theirs, _ = loaded(config, "fp8_per_block", ours=False, **padded)
    ours, _ = loaded(config, "fp8_per_block", ours=True, **padded)
    assert ours.moe.routed_experts.w13_weight.shape[1] == 512
    assert_same_layers(ours, theirs)


def test_a_missing_shard_is_named(config, no_kernels):
    """vLLM would serve uninitialized memory."""
    checkpoint = [s for s in shards() if s[2] != ("experts.w13_weight", "w3", 2)]
    with pytest.raises(IncompleteLoadError, match=r"moe\.routed_experts\.w13_weight"):
        loaded(config, "fp8_per_channel", ours=True, checkpoint=checkpoint)


def test_a_bias_may_be_absent(config, no_kernels):
    """vLLM does not ask for what a checkpoint lacks."""
    checkpoint = [s for s in shards() if s[0] != "qkv.bias"]
    _, report = loaded(config, "fp8_per_channel", ours=True, checkpoint=checkpoint)
    assert report.defaulted == ["qkv.bias"]


def test_staging_is_an_expert_not_a_layer(config, no_kernels):
    """Under per_tensor an expert's two halves wait for each other, and nothing else does."""
    _, report = loaded(config, "fp8_per_tensor", ours=True)
    expert = 2 * INNER * HIDDEN * 2
    assert report.peak_staging_bytes <= 3 * expert < EXPERTS * expert


def test_kernels_layouts_are_made_one_after_the_other(config, no_kernels, monkeypatch):
    """A kernel that wants a copy of the codes: those of one layer are gone before the next one's are copied."""
    codes = []

    def process(layer):
        assert all(memory.expired() for memory in codes)
        codes.append(StorageWeakRef(layer.weight.untyped_storage()))
        layer.weight.data = layer.weight.data.clone()

    kernel = SimpleNamespace(process_weights_after_loading=process)
    monkeypatch.setattr(vllm_fp8, "init_fp8_linear_kernel", lambda **settings: kernel)
    loaded(config, "fp8_per_channel", ours=True)
    assert len(codes) == 3


@needs_kernels
@pytest.mark.parametrize(
    "kind, scheme",
    [
        ("llama", "fp8_per_channel"),
        pytest.param("llama", "fp8_per_block", marks=needs_block_kernels),
        ("qwen2", "fp8_per_channel"),
        pytest.param("qwen3_moe", "fp8_per_block", marks=needs_block_kernels),
    ],
)
def test_whole_models_with_real_kernels(tmp_path, monkeypatch, kind, scheme):
    """`LLM(folder, quantization="fp8_per_channel", load_format="fp8_kernels")`, with what vLLM has kernels for here."""
    blocks_as_on_a_gpu(monkeypatch)
    source = make_model(tmp_path / kind, kind)
    theirs = load_model(engine_config(source, quantization=scheme))
    assert_same_layers(load_model(engine_config(source, quantization=scheme, load_format=NAME)), theirs)


def test_options_reach_the_loader(config, no_kernels):
    """`staging_budget`, through `model_loader_extra_config`."""
    _, report = loaded(config, "fp8_per_tensor", ours=True, options=Options(staging_budget=0))
    assert report.spills > 0


def test_options_of_the_other_kind_are_refused(tmp_path):
    """The scheme is vLLM's own here."""
    source = make_model(tmp_path / "llama")
    extra = {"scheme": "per_tensor"}
    options = {"quantization": "fp8_per_channel", "load_format": NAME, "model_loader_extra_config": extra}
    with pytest.raises(ValueError, match="scheme with quantization='fp8_per_channel'"):
        load_model(engine_config(source, **options))


@pytest.mark.parametrize("path", compat._READ)
def test_what_has_changed_is_named(monkeypatch, path):
    """Every function that we stand in for, or rely on."""
    module, _, name = path.partition(":")
    owner, _, leaf = name.rpartition(".")
    owner = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    monkeypatch.setattr(owner, leaf, lambda *args: "something new")
    with pytest.raises(compat.UnsupportedVllmError, match=rf"`{re.escape(name)}` is another one"):
        compat.check_online()
    monkeypatch.delattr(owner, leaf)
    with pytest.raises(compat.UnsupportedVllmError, match=rf"`{re.escape(name)}` is (not there|another one)"):
        compat.check_online()


def test_a_changed_method_is_not_replaced(tmp_path, monkeypatch):
    """The load is refused, and vLLM's own goes on working."""
    monkeypatch.setattr(vllm_fp8, "_is_tp_sharded", lambda layer, reduces_output_dim=True: False)
    source = make_model(tmp_path / "llama")
    with pytest.raises(compat.UnsupportedVllmError, match="_is_tp_sharded"):
        load_model(engine_config(source, quantization="fp8_per_channel", load_format=NAME))
    load_model(engine_config(source, quantization="fp8_per_channel"), processed=False)


def test_a_model_without_such_layers_is_refused():
    """It would be loaded as if nothing had been asked."""
    with pytest.raises(ValueError, match="must have layers of vLLM's FP8 schemes"):
        with write_through(torch.nn.Linear(2, 2)):
            pass


def test_stand_ins_have_the_names_of_what_they_stand_for():
    """vLLM's layers choose their weight loaders by these names."""
    assert len(STAND_INS) == 6
    for theirs, ours in STAND_INS.items():
        assert ours.__name__ == theirs.__name__ and issubclass(ours, theirs) and ours is not theirs
