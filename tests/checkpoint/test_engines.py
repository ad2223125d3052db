"""transformers loads what was written, and computes what our own dequantized weights compute.

Both sides multiply the same codes by the same scales in fp32 and round once to bf16, so equality is exact: not
only of logits, but of every weight.
"""

import importlib
import inspect

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint
from tests import models

transformers = pytest.importorskip("transformers", minversion="5.17", reason="transformers is not installed")
# transformers says so whenever `dequantize` is asked of a folder that has a config of its own.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

COMMON = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=256,
)
MODELS = {
    # Tied, so the checkpoint lacks the head; small shards, so fused families lie in several files.
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, tie_word_embeddings=True)),
              "100KB"),
    "qwen3_moe": (lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2)), "1GB"),
}  # fmt: skip
CHOICES = [(model, scheme, "compressed-tensors") for model in MODELS for scheme in ("per_channel", "per_tensor")]
CHOICES += [(model, "per_block", "fp8") for model in MODELS] + [("llama", "per_block", "compressed-tensors")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Name -> folder of a tiny random bf16 model."""
    folders = {}
    for name, (make, shard) in MODELS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        make().to(torch.bfloat16).save_pretrained(folders[name], max_shard_size=shard)
    return folders


@pytest.fixture(autouse=True)
def needs(request):
    """The package that reads the format; importing it takes seconds, so only these tests do."""
    callspec = getattr(request.node, "callspec", None)
    format = callspec.params.get("format", "compressed-tensors") if callspec else "compressed-tensors"
    pytest.importorskip({"compressed-tensors": "compressed_tensors", "fp8": "accelerate"}[format])


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(48).reshape(2, 24) * 5 % 256).logits


def dequantized(source, quantized, scheme, folder, scale_dtype=torch.float32):
    """The source model with each weight replaced by dequantize(codes, scales); the scales as read in that dtype."""
    stored, state = dict(open_checkpoint(quantized).tensors()), {}
    for name in open_checkpoint(source).metadata():
        scale = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv"))
        state[name] = stored[name]
        if scale is not None:
            scale = as_read(scale, scheme, scale_dtype)
            state[name] = fk.dequantize(stored[name], scale, torch.bfloat16, scheme)
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(state, folder / "pytorch_model.bin")
    return load(folder)


def as_read(scale, scheme, scale_dtype):
    """Stored scales in the shape of the scheme, through the dtype in which they are read."""
    return (scale.reshape(()) if scheme == "per_tensor" else scale).to(scale_dtype).float()


def transformers_rounds_the_scales():
    """Does `dequantize` go through the package's modules, whose scales have the model's dtype?"""
    quantizer = importlib.import_module("transformers.quantizers.quantizer_compressed_tensors")
    return "CompressedTensorsDequantize" not in inspect.getsource(quantizer)


def dequantizing(format):
    configs = {"compressed-tensors": transformers.CompressedTensorsConfig, "fp8": transformers.FineGrainedFP8Config}
    return configs[format](dequantize=True)


SMOLLM2 = [("smollm2", scheme, "compressed-tensors") for scheme in ("per_channel", "per_tensor")]


@pytest.mark.parametrize("model,scheme,format", CHOICES + SMOLLM2)
def test_the_loaded_model_is_the_dequantized_one(model, scheme, format, sources, tmp_path):
    """Every parameter and the logits, to the bit; and quantizing has changed the logits at all."""
    if format == "compressed-tensors" and transformers_rounds_the_scales():
        pytest.skip("this transformers rounds scales to bf16 before it dequantizes (5.17 does, 5.23 does not)")
    source = models.smollm2() if model == "smollm2" else sources[model]
    quantize_checkpoint(source, tmp_path / "fp8", scheme, format)
    expected = dequantized(source, tmp_path / "fp8", scheme, tmp_path / "ref")
    loaded = load(tmp_path / "fp8", quantization_config=dequantizing(format))
    ours, theirs = dict(expected.named_parameters()), dict(loaded.named_parameters())
    assert all(name.endswith("_scale") for name in ours.keys() ^ theirs.keys())  # some versions leave the scales there
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert torch.equal(logits(loaded), logits(expected))
    assert not torch.equal(logits(loaded), logits(load(source)))


@pytest.mark.parametrize("model,scheme", [(model, scheme) for model, scheme, format in CHOICES if format != "fp8"])
def test_compressed_loading_rounds_only_the_scales(model, scheme, sources, tmp_path):
    """Without `dequantize` the package keeps the codes until the first forward, with the scales in the model's
    dtype, bf16, and quantizes activations. With those switched off the logits are the same to the bit as ours with
    such scales, except for experts, whose scales are read in fp32 all the same; with them on they stay near.
    """
    quantize_checkpoint(sources[model], tmp_path / "fp8", scheme)
    loaded = load(tmp_path / "fp8")
    with_activations = logits(loaded)
    modules = {name: m for name, m in loaded.named_modules() if hasattr(m, "quantization_scheme")}
    assert len(modules) == (14 if model == "llama" else 8)
    exact = dequantized(sources[model], tmp_path / "fp8", scheme, tmp_path / "exact")
    rounded = dequantized(sources[model], tmp_path / "fp8", scheme, tmp_path / "rounded", torch.bfloat16)
    for name, module in modules.items():
        module.quantization_enabled = False
        assert torch.equal(module.weight, rounded.get_parameter(f"{name}.weight"))
        exact.get_parameter(f"{name}.weight").data.copy_(module.weight)
    assert torch.equal(logits(loaded), logits(exact))
    difference = (with_activations - logits(exact)).float().norm() / logits(exact).float().norm()
    assert 0 < difference < 0.1


def test_scales_of_bf16_lose_nothing_in_compressed_loading(sources, tmp_path):
    """Rounded before they were used, they are read as they were written."""
    scheme = fk.PerChannel(scale_dtype=torch.bfloat16)
    quantize_checkpoint(sources["llama"], tmp_path / "fp8", scheme)
    expected = dequantized(sources["llama"], tmp_path / "fp8", "per_channel", tmp_path / "ref")
    loaded = load(tmp_path / "fp8")
    logits(loaded)  # decompresses
    for name, module in loaded.named_modules():
        if hasattr(module, "quantization_scheme"):
            assert torch.equal(module.weight, expected.get_parameter(f"{name}.weight"))


def test_several_schemes_in_one_checkpoint(sources, tmp_path):
    """Groups with exact names win over the group of every Linear; an ignored layer stays as it was."""
    quantize_checkpoint(
        sources["llama"],
        tmp_path / "fp8",
        ignore=["model.layers.1.mlp"],
        schemes={"*.o_proj": "per_tensor", "model.layers.0.mlp": "per_block"},
    )
    stored = dict(open_checkpoint(tmp_path / "fp8").tensors())
    loaded = load(tmp_path / "fp8")
    logits(loaded)  # decompresses
    for name, scheme in (("self_attn.q_proj", "per_channel"), ("self_attn.o_proj", "per_tensor"),
                         ("mlp.down_proj", "per_block"), ("mlp.up_proj", "per_block")):  # fmt: skip
        name = f"model.layers.0.{name}"
        scale = as_read(stored[f"{name}.weight_scale"], scheme, torch.bfloat16)
        expected = fk.dequantize(stored[f"{name}.weight"], scale, torch.bfloat16, scheme)
        assert torch.equal(loaded.get_submodule(name).weight, expected)
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(loaded.get_parameter(untouched), open_checkpoint(sources["llama"]).read(untouched))
