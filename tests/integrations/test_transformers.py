"""`from_pretrained` with `Fp8KernelsConfig`: the model is the original with rounded weights, also when saved."""

import copy
import json

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint
from fp8_kernels.errors import (
    IncompleteLoadError,
    LoadError,
    NonFiniteWeightError,
    UnmatchedPatternError,
    UnsupportedLayoutError,
)
from fp8_kernels.modules import Fp8Experts, Fp8Linear, Fp8Module
from fp8_kernels.schemes import as_scheme

from .. import models
from .families import FAMILIES

transformers = pytest.importorskip("transformers", minversion="5.17")
SCHEMES = ("per_tensor", "per_channel", "per_block", "per_group", "mxfp8")
SAVED = [family for family in FAMILIES if family not in ("granite_moe", "gpt_oss")]  # whose checkpoints can hold FP8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of the families, written once; SmolLM2's is the real one."""
    made = {}

    def folder(name):
        if name == "smollm2":
            return models.smollm2()
        if name not in made:
            torch.manual_seed(0)
            made[name] = models.save(FAMILIES[name](), tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def load(folder, *args, cls="AutoModelForCausalLM", config=True, **kwargs):
    """from_pretrained; `args` and what belongs there go to Fp8KernelsConfig."""
    own = {key: kwargs.pop(key) for key in ("ignore", "include", "schemes", "activation", "dtype") if key in kwargs}
    if "dtype_of_model" in kwargs:
        kwargs["dtype"] = kwargs.pop("dtype_of_model")
    if config:
        kwargs["quantization_config"] = fk.Fp8KernelsConfig(*args, **own)
    return getattr(transformers, cls).from_pretrained(folder, experts_implementation="eager", **kwargs).eval()


def generated(model):
    prompt = torch.arange(1, 10)[None] * 7 % 100
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, **options)


def differing(a, b):
    """Names of tensors that are not the same to the bit in both models; a scale for all is one for each row."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()

    def same(x, y):
        while y.ndim < x.ndim:
            y = y[..., None]
        return x.dtype == y.dtype and torch.equal(x.float(), y.float().expand(x.shape))

    return [name for name in a if not same(a[name], b[name])]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_oss"])
def test_logits_are_those_of_the_rounded_weights(folders, family, scheme):
    """With weights alone in FP8, logits equal, to the bit, those of the bf16 model with rounded weights; and all of its
    linear layers and experts have been replaced."""
    expected = load(folders(family), config=False)
    names = models.round_weights(expected, scheme)
    model = load(folders(family), scheme, activation=None)
    assert model.hf_quantizer.report.quantized_tensors == len(names) > 0
    assert torch.equal(models.logits(model), models.logits(expected))
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert not [name for name in linear if not name.endswith(("lm_head", "gate", "router.layer"))]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transposed_experts_have_scales_of_output_channels(tmp_path, scheme):
    """gpt-oss holds experts as [E, in, out], gate and up in turns: they are turned, and compute the same. In float32,
    since a product of turned matrices rounds elsewhere in bf16."""
    torch.manual_seed(0)
    source = FAMILIES["gpt_oss"]().float()
    models.save(source, tmp_path)
    model = load(tmp_path, scheme, activation=None, dtype_of_model=torch.float32)
    experts, like = model.model.layers[0].mlp.experts, source.model.layers[0].mlp.experts.down_proj
    assert experts.down_proj.shape == like.mT.shape
    assert experts.down_proj_scale.shape == as_scheme(scheme).scale_shape(like.mT.shape)
    models.round_weights(source, scheme)
    expected = models.logits(source)
    assert (models.logits(model) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", [*FAMILIES, "smollm2"])
def test_load_checkpoint_gives_the_same_model(folders, family):
    """The fast path over a model on meta: every tensor, FP8, tied, kept in float32 or computed, is the same."""
    model = load(folders(family))
    other, report = fk.load_model(folders(family), device="cpu")
    assert not differing(model, other)
    assert report.quantized_tensors == model.hf_quantizer.report.quantized_tensors
    buffers = dict(other.named_buffers())
    assert not [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    assert torch.equal(models.logits(model), models.logits(other))


@pytest.mark.parametrize("family", [*SAVED, "smollm2"])
def test_saved_and_loaded_again_it_is_the_same_model(folders, family, tmp_path):
    """It generates; what save_pretrained writes is a compressed-tensors checkpoint under the source's names, which
    loads, here and by load_model, to the same codes and scales and generates the same tokens."""
    model = load(folders(family))
    tokens = generated(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "compressed-tensors"
    assert fk.verify_checkpoint(tmp_path, against=folders(family)).problems == ()
    for again in (load(tmp_path), fk.load_model(tmp_path, device="cpu")[0]):
        assert not differing(again, model)
        assert torch.equal(generated(again), tokens)


def test_saved_is_what_quantize_checkpoint_writes(folders, tmp_path):
    """Name by name and byte by byte, and the same quantization_config; saving twice changes nothing."""
    model = load(folders("qwen3_moe"))
    quantize_checkpoint(folders("qwen3_moe"), tmp_path / "expected")
    for folder in ("once", "twice"):
        model.save_pretrained(tmp_path / folder)
        saved, expected = (open_checkpoint(tmp_path / name) for name in (folder, "expected"))
        assert saved.metadata().keys() == expected.metadata().keys()
        for name, tensor in expected.tensors():
            assert torch.equal(saved.read(name).float(), tensor.float()), name
        assert saved.config["quantization_config"] == expected.config["quantization_config"]


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral"])
def test_stock_transformers_opens_what_was_saved(folders, family, scheme, tmp_path):
    """Without this package: no weight is missing, and each is the dequantized one."""
    pytest.importorskip("compressed_tensors")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("this transformers rounds scales to bf16 before it dequantizes (5.17 does, 5.23 does not)")
    load(folders(family), scheme).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="quantization_config"):
        stock, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
            output_loading_info=True,
        )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected = load(folders(family), config=False)
    models.round_weights(expected, scheme)
    theirs = stock.state_dict()
    assert not [name for name, p in expected.state_dict().items() if not torch.equal(p, theirs[name])]


@pytest.mark.parametrize("family", ["granite_moe", "gpt_oss"])
def test_experts_in_one_tensor_are_not_saved(folders, family, tmp_path):
    """transformers would open such a folder without a word, and without scales: it is not written."""
    with pytest.raises(UnsupportedLayoutError, match="must be one expert to be saved, got all 4"):
        load(folders(family)).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["per_group", "mxfp8", "per_block"])
def test_schemes_that_no_reader_knows_are_not_saved(folders, scheme, tmp_path):
    """Groups, and blocks that are not whole: refused by the rules of `quantize_checkpoint`."""
    with pytest.raises(UnsupportedLayoutError, match="compressed-tensors"):
        load(folders("llama"), scheme).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_selection_reaches_the_loader(folders):
    """ignore, include and per-pattern schemes decide by the model's names."""
    model = load(
        folders("qwen3_moe"),
        ignore=["model.layers.0"],
        include=["lm_head"],
        schemes={"*.self_attn.o_proj": "per_tensor"},
        dtype=torch.float8_e5m2,
    )
    first, second = model.model.layers
    assert not any(isinstance(module, Fp8Module) for module in first.modules())
    assert isinstance(second.mlp.experts, Fp8Experts) and isinstance(model.lm_head, Fp8Linear)
    assert second.self_attn.o_proj.weight_scale.shape == ()
    assert second.self_attn.o_proj.weight.dtype == torch.float8_e5m2


def test_several_schemes_are_saved(folders, tmp_path):
    """Each module finds its own again."""
    model = load(folders("llama"), schemes={"*.o_proj": "per_tensor"}, ignore=["model.layers.1.mlp"])
    model.save_pretrained(tmp_path)
    assert not differing(load(tmp_path), model)


def test_fp32_checkpoint_is_quantized_from_fp32(tmp_path):
    """Also where the model is to be bf16: weights are not rounded twice."""
    torch.manual_seed(0)
    source = FAMILIES["llama"]().float()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p) * 1e-3)
    models.save(source, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=fk.Fp8KernelsConfig()
    )
    name = "model.layers.1.mlp.up_proj"
    q, scale = fk.quantize(source.get_parameter(f"{name}.weight").data)
    assert torch.equal(model.get_submodule(name).weight.float(), q.float())
    assert torch.equal(model.get_submodule(name).weight_scale, scale)
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_tensors_may_be_given(folders):
    """`state_dict=` in the place of files."""
    source = load(folders("qwen3_moe"), config=False)
    stored = dict(open_checkpoint(folders("qwen3_moe")).tensors())
    model = type(source).from_pretrained(
        None, config=source.config, state_dict=stored, quantization_config=fk.Fp8KernelsConfig()
    )
    assert not differing(model, load(folders("qwen3_moe")))
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[name], stored[f"{name}_scale"] = fk.quantize(stored[name], "per_channel")
    with pytest.raises(LoadError, match="FP8 weights must come from files"):
        type(source).from_pretrained(
            None, config=source.config, state_dict=stored, quantization_config=fk.Fp8KernelsConfig()
        )


def test_pickled_checkpoint(folders, tmp_path):
    """pytorch_model.bin."""
    config = (folders("llama") / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    torch.save(dict(open_checkpoint(folders("llama")).tensors()), tmp_path / "pytorch_model.bin")
    assert not differing(load(tmp_path, use_safetensors=False), load(folders("llama")))


def test_new_head_is_initialised_and_named(folders):
    """What the checkpoint lacks, and is not FP8, transformers makes and reports as ever."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders("llama"), quantization_config=fk.Fp8KernelsConfig(), output_loading_info=True, num_labels=3
    )
    assert info["missing_keys"] == {"score.weight"}
    assert model.score.weight.float().std() > 1e-3
    assert isinstance(model.model.layers[0].mlp.up_proj, Fp8Linear)


def test_base_model_of_a_causal_checkpoint(folders):
    """Prefixes are added and taken away by transformers' rules."""
    base, causal = load(folders("qwen3_moe"), cls="AutoModel"), load(folders("qwen3_moe"))
    assert not differing(base, causal.model)


def test_checkpoint_that_holds_tied_weights_twice(folders, tmp_path):
    """They become one again."""

    def add_head(state, name):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    model = load(broken(folders("llama"), tmp_path, add_head))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not differing(model, load(folders("llama")))


def test_key_mapping(folders, tmp_path):
    """A user's own names."""
    stored = {name.replace("mlp", "ffn"): t.clone() for name, t in open_checkpoint(folders("llama")).tensors()}
    from safetensors.torch import save_file

    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders("llama") / "config.json").read_text())
    assert not differing(load(tmp_path, key_mapping={"ffn": "mlp"}), load(folders("llama")))


def test_converted_weights_are_quantized_whole(tmp_path):
    """A checkpoint with q, k and v in one tensor: transformers takes them apart, each is quantized by itself."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.NomicBertConfig(**sizes, vocab_size=96, max_position_embeddings=64)
    source = transformers.NomicBertModel(config).eval()
    source.save_pretrained(tmp_path)
    assert any("qkv" in name.lower() for name in open_checkpoint(tmp_path).metadata())
    model = load(tmp_path, activation=None, cls="NomicBertModel")
    assert len(models.round_weights(source, "per_channel")) == model.hf_quantizer.report.quantized_tensors > 0
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).last_hidden_state, source(tokens).last_hidden_state)
    with pytest.raises(UnsupportedLayoutError, match="must be weights of their own in the checkpoint to be saved"):
        model.save_pretrained(tmp_path / "saved")
    stored = dict(open_checkpoint(tmp_path).tensors())
    name = next(name for name in stored if name.endswith("qkv.weight"))
    stored[name], stored[f"{name}_scale"] = fk.quantize(stored[name], "per_channel")
    from safetensors.torch import save_file

    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="FP8 weights must come from files, and as the model holds them"):
        load(tmp_path, "per_channel", cls="NomicBertModel")


def test_transformers_claims_no_memory_beforehand(folders):
    """Its allocator's warm-up would be of bf16's size; the load asks for what it needs."""
    from transformers.modeling_utils import get_total_byte_count

    from fp8_kernels.integrations.transformers import Fp8KernelsQuantizer

    with torch.device("meta"):
        model = FAMILIES["llama"]()
    quantizer = Fp8KernelsQuantizer(fk.Fp8KernelsConfig())
    quantizer.preprocess_model(model)
    devices = dict.fromkeys(model.state_dict(), torch.device("cuda"))
    assert sum(get_total_byte_count(model, devices, quantizer).values()) == 0


# Wrong input: named, and nothing is returned.


def broken(folder, to, change):
    from safetensors.torch import save_file

    stored = {name: t.clone() for name, t in open_checkpoint(folder).tensors()}
    change(stored, "model.layers.1.mlp.up_proj.weight")
    save_file(stored, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state, name: state.pop(name), IncompleteLoadError, r"layers\.1\.mlp\.up_proj\.weight"),
        (lambda state, name: state[name].view(-1)[7:8].fill_(float("nan")), NonFiniteWeightError, r"1\.mlp\.up_proj"),
        (lambda state, name: state.update({name: state[name].t().contiguous()}), LoadError, r"must have shape"),
        (lambda state, name: state.update({name: state[name].to(torch.float8_e4m3fn)}), ValueError, "has no scale"),
    ],
    ids=["missing", "nan", "shape", "no scale"],
)
def test_bad_checkpoint_is_named(folders, tmp_path, change, error, message):
    """Every kind of failure names the tensor."""
    with pytest.raises(error, match=message):
        load(broken(folders("llama"), tmp_path, change))


def test_unexpected_tensors_are_reported_by_transformers(folders, tmp_path):
    """As ever, a warning and not an error."""
    folder = broken(folders("llama"), tmp_path, lambda state, name: state.update(extra=torch.ones(3)))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=fk.Fp8KernelsConfig(), output_loading_info=True
    )
    assert info["unexpected_keys"] == {"extra"}
    assert not differing(model, load(folders("llama")))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "per_atom"}, ValueError, "`scheme` must be one of"),
        ({"activation": "static"}, ValueError, "`activation` must be one of"),
        ({"dtype": torch.int8}, TypeError, "`dtype` must be one of"),
    ],
)
def test_bad_config_is_refused(arguments, error, message):
    """Where it is made."""
    with pytest.raises(error, match=message):
        fk.Fp8KernelsConfig(**arguments)


def test_pattern_that_matches_nothing_is_refused(folders):
    """A silent one would quantize the wrong set."""
    with pytest.raises(UnmatchedPatternError, match=r"model\.layers\.9"):
        load(folders("llama"), ignore=["model.layers.9"])


def test_several_devices_are_refused(folders):
    """One model, one device."""
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="must name one device for the whole model, got cpu, disk"):
        load(folders("llama"), device_map={"model": "cpu", "lm_head": "disk"})


def test_config_prints_and_copies(folders):
    """transformers copies configs and writes them as JSON."""
    config = fk.Fp8KernelsConfig("mxfp8", schemes={"*.o_proj": fk.PerBlock(64, 64)})
    assert json.loads(copy.deepcopy(config).to_json_string())["scheme"] == "mxfp8"
    model = load(folders("llama"))
    assert model.config.to_dict()["quantization_config"]["quant_method"] == "fp8_kernels"
    assert "Fp8KernelsConfig" in repr(config)
    options = {"ignore": ["model.layers.0"], "schemes": {"*.o_proj": "per_tensor"}, "activation": None}
    config = fk.Fp8KernelsConfig("per_block", dtype=torch.float8_e5m2, **options)
    again = fk.Fp8KernelsConfig.from_dict(json.loads(config.to_json_string()))
    assert vars(again) == vars(config)
