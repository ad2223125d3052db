"""quantization="fp8_kernels": vLLM holds, byte for byte, what it holds when it loads the folder that we would write."""

from types import SimpleNamespace

import pytest
import torch

from .vllm_env import (  # isort: skip
    current,
    engine_config,
    load_model,
    make_model,
    needs_block_kernels,
    needs_kernels,
    tensors,
    vllm,
)

import fp8_kernels as fk
from fp8_kernels.errors import NonFiniteWeightError, UnmatchedPatternError, UnsupportedLayoutError
from fp8_kernels.integrations.vllm import NAME, compat, register
from fp8_kernels.testing import assert_same_bits

BLOCKS = pytest.param("llama", {"scheme": "per_block"}, marks=needs_block_kernels)
CASES = [
    ("llama", {}),
    ("llama", {"scheme": "per_tensor"}),
    BLOCKS,
    ("llama", {"ignore": ["*.layers.0.*", "re:down_proj"]}),
    ("llama", {"schemes": {"*.layers.1.*": "per_tensor"}}),
    ("qwen2", {}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"ignore": ["*.layers.1.mlp.experts"]}),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Kind -> folder of a tiny bf16 model."""
    return {kind: make_model(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "qwen2", "qwen3_moe")}


def both(source, folder, options, processed):
    """(the model loaded by us, the model that vLLM loads from the quantized folder)"""
    fk.quantize_checkpoint(source, folder, **options)
    theirs = load_model(engine_config(folder), processed)
    ours = load_model(engine_config(source, quantization=NAME, model_loader_extra_config=dict(options)), processed)
    return ours, theirs


@pytest.mark.parametrize("kind, options", CASES)
def test_what_vllm_loads_is_the_quantized_folder(sources, tmp_path, kind, options):
    """Every parameter and buffer, as vLLM's loaders fill them."""
    ours, theirs = map(tensors, both(sources[kind], tmp_path / "fp8", options, processed=False))
    assert ours.keys() == theirs.keys()
    assert any(t.dtype == torch.float8_e4m3fn for t in ours.values())
    for name, t in theirs.items():
        assert_same_bits(ours[name], t, name)


@needs_kernels
@pytest.mark.parametrize("kind, options", [("llama", {}), BLOCKS, ("qwen2", {})])
def test_kernels_get_what_they_get_from_the_folder(sources, tmp_path, kind, options):
    """Also after vLLM's kernels have laid out their weights."""
    ours, theirs = map(tensors, both(sources[kind], tmp_path / "fp8", options, processed=True))
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert_same_bits(ours[name], t, name)


def test_registering_again_changes_nothing():
    """vLLM calls it in each process, and tools may call it too."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    register()
    before = EngineArgs.create_load_config, list(QUANTIZATION_METHODS), dict(_LOAD_FORMAT_TO_MODEL_LOADER)
    register()
    assert before == (EngineArgs.create_load_config, QUANTIZATION_METHODS, _LOAD_FORMAT_TO_MODEL_LOADER)
    assert QUANTIZATION_METHODS.count(NAME) == 1


def test_vllm_finds_the_plugin():
    """By its entry point, as an installed package."""
    from vllm.plugins import load_plugins_by_group

    assert load_plugins_by_group("vllm.general_plugins")["fp8_kernels"] is register


def test_the_command_line_needs_one_option(sources):
    """`vllm serve MODEL --quantization fp8_kernels`; the format to read files by is kept."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    engine_config(sources["llama"])  # the platform
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    line = ["--model", str(sources["llama"]), "--quantization", NAME, "--load-format", "safetensors"]
    config = AsyncEngineArgs.from_cli_args(parser.parse_args(line)).create_load_config()
    assert (config.load_format, config.model_loader_extra_config) == (NAME, {"load_format": "safetensors"})
    other = AsyncEngineArgs.from_cli_args(parser.parse_args(line[:2])).create_load_config()
    assert (other.load_format, other.model_loader_extra_config) == ("auto", {})


@needs_kernels
def test_weights_can_be_loaded_again(sources, tmp_path):
    """vLLM's own in-place reload reads other bf16 weights through our loader."""
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    other = make_model(tmp_path / "other", "llama", seed=1)
    config = engine_config(sources["llama"], quantization=NAME)
    model = load_model(config)
    pointers = {name: t.data_ptr() for name, t in model.named_parameters()}
    with current(config):
        reload_weights(config, model, None, str(other), True)
    fk.quantize_checkpoint(other, tmp_path / "fp8")
    theirs = tensors(load_model(engine_config(tmp_path / "fp8")))
    for name, t in tensors(model).items():
        assert_same_bits(t, theirs[name], name)
    assert pointers == {name: t.data_ptr() for name, t in model.named_parameters()}


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"load_format": "dummy"}, ValueError, "'dummy'"),
        ({"model_loader_extra_config": {"scheme": "per_row"}}, ValueError, "per_row"),
        ({"model_loader_extra_config": {"ignore": "lm_head"}}, TypeError, "list of patterns"),
        ({"model_loader_extra_config": {"ignore": ["typo"]}}, UnmatchedPatternError, "typo"),
        ({"model_loader_extra_config": {"staging_budget": 1}}, ValueError, "staging_budget"),
        ({"model_loader_extra_config": {"shceme": "per_tensor"}}, ValueError, "shceme"),
        ({"model_loader_extra_config": {"load_format": "tensorizer"}}, ValueError, "tensorizer"),
        ({"quantization": None, "load_format": NAME}, ValueError, "quantization='fp8_kernels'"),
    ],
)
def test_what_cannot_be_is_refused(sources, options, error, words):
    """Before any weight is read, in words that name the option."""
    with pytest.raises(error, match=words):
        load_model(engine_config(sources["llama"], **{"quantization": NAME, **options}))


@pytest.mark.parametrize("scheme, other", [("per_tensor", "fp8_per_tensor"), ("per_block", "fp8_per_block")])
def test_experts_that_the_format_has_not_are_refused(sources, scheme, other):
    """The message names what vLLM has for them."""
    extra = {"scheme": scheme}
    with pytest.raises(UnsupportedLayoutError, match=rf"experts\.0\..*{other}"):
        load_model(engine_config(sources["qwen3_moe"], quantization=NAME, model_loader_extra_config=extra))


def test_a_draft_model_beside_ours_is_loaded_as_it_is(sources):
    """vLLM gives it the load format of the model that it drafts for."""
    config = engine_config(sources["llama"], load_format=NAME)
    config.model_config.runner_type = "draft"
    plain = tensors(load_model(engine_config(sources["llama"]), processed=False))
    for name, t in tensors(load_model(config, processed=False)).items():
        assert_same_bits(t, plain[name], name)


def test_another_loader_is_refused(sources):
    """A config that was put together by hand must name the loader."""
    config = engine_config(sources["llama"], quantization=NAME)
    config.load_config.load_format, config.load_config.model_loader_extra_config = "auto", {}
    with pytest.raises(ValueError, match="must come with load_format='fp8_kernels'"):
        load_model(config)


def test_a_quantized_folder_is_refused(sources, tmp_path):
    """vLLM itself sees that config.json says something else."""
    fk.quantize_checkpoint(sources["llama"], tmp_path / "fp8")
    with pytest.raises(ValueError, match="does not match the quantization"):
        engine_config(tmp_path / "fp8", quantization=NAME)


def test_nan_is_refused_by_name(tmp_path):
    """At the end of the load."""
    from safetensors.torch import load_file, save_file

    source = make_model(tmp_path / "nan")
    file = sorted(source.glob("*.safetensors"))[0]
    state = load_file(file)
    name = next(name for name in state if name.endswith("proj.weight"))
    state[name][3, 5] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightError, match=name.replace(".", r"\.")):
        load_model(engine_config(source, quantization=NAME), processed=False)


def test_compiled_graphs_are_told_apart_by_scheme(sources):
    """vLLM keeps compiled graphs by a key of its config; another scheme is another graph."""
    keys = set()
    for scheme in ("per_channel", "per_tensor"):
        extra = {"scheme": scheme}
        config = engine_config(sources["llama"], quantization=NAME, model_loader_extra_config=extra)
        load_model(config, processed=False)
        keys.add(config.compute_hash())
    assert len(keys) == 2


def test_an_unknown_vllm_is_left_alone(monkeypatch):
    """A changed interface: nothing is registered, and the warning says what is missing."""
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.model_loader import DefaultModelLoader

    said = []
    log = SimpleNamespace(warning=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(compat, "logger", lambda: log)
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    monkeypatch.setattr(DefaultModelLoader, "_prepare_weights", lambda self, model: None)
    register()
    assert quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG == {}
    assert "`DefaultModelLoader._prepare_weights` takes other arguments" in said[0] and vllm.__version__ in said[0]
