"""load_checkpoint and load_model: the loaded model is the original with rounded weights, or is left as it was."""

import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fp8_kernels import load as load_module
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint, write_amax
from fp8_kernels.errors import (
    CheckpointError,
    IncompleteLoadError,
    LoadError,
    NonFiniteWeightError,
    UnsupportedLayoutError,
)
from fp8_kernels.load import load_checkpoint, load_model
from fp8_kernels.modules import Fp8Experts, Fp8Linear, Fp8Module
from fp8_kernels.names import Destination, Names

from . import models

pytest.importorskip("transformers", minversion="5.0")

SCHEMES = ("per_tensor", "per_channel", "per_block", "per_group", "mxfp8")


def original(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager", **options
    ).eval()


def meta_model(folder):
    return models.on_meta(original(folder))


def snapshot(model):
    """Every module, parameter and buffer of the model, by identity."""
    parts = (model.named_modules, model.named_parameters, model.named_buffers)
    return [{name: id(part) for name, part in named(remove_duplicate=False)} for named in parts]


# Right: logits of the loaded model.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3_moe", "tiny_mixtral"])
def test_logits_are_those_of_the_rounded_weights(folders, family, scheme):
    """With weights alone in FP8, logits equal, to the bit, those of the bf16 model with rounded weights."""
    expected = original(folders(family))
    names = models.round_weights(expected, scheme)
    model, report = load_model(folders(family), scheme, activation=None, device="cpu")
    assert report.quantized_tensors == len(names) > 0
    assert torch.equal(models.logits(model), models.logits(expected))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_smollm2_logits_are_those_of_the_rounded_weights(scheme):
    """The same for a real model, all thirty layers of it, 576 wide, which no 128-block divides."""
    folder = models.smollm2()
    expected = original(folder)
    models.round_weights(expected, scheme)
    model, report = load_model(folder, scheme, activation=None, device="cpu")
    assert report.quantized_tensors == 30 * 7
    assert torch.equal(models.logits(model), models.logits(expected))


def test_fp32_bert_is_quantized_from_fp32():
    """An fp32 checkpoint of another family: the encoder's output equals that of the rounded weights, in fp32."""
    from transformers import AutoModel

    folder = models.minilm()
    expected = AutoModel.from_pretrained(folder).eval()
    models.round_weights(expected, "per_channel")
    model, _ = load_model(folder, "per_channel", activation=None, device="cpu")
    tokens = torch.arange(1000, 1032)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).last_hidden_state, expected(tokens).last_hidden_state)


def test_dynamic_activations_stay_close(folders):
    """FP8 activations move the logits by their rounding, and only by that: several layers of 3 bits each."""
    weights_only, _ = load_model(folders("tiny_llama"), activation=None, device="cpu")
    dynamic, _ = load_model(folders("tiny_llama"), activation="dynamic", device="cpu")
    a, b = models.logits(weights_only).float(), models.logits(dynamic).float()
    assert 0 < (a - b).norm() / a.norm() < 0.2


def test_tied_weights_stay_one(folders):
    """Embedding and head are one tensor before and after."""
    model, _ = load_model(folders("tiny_llama"), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generates_with_the_checkpoints_settings(folders):
    """The loaded model generates, and reads its generation settings from the folder."""
    model, _ = load_model(folders("tiny_llama"), device="cpu")
    out = model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 9)


def test_modules_without_a_replacement_stay_in_high_precision(tmp_path):
    """GPT-2 keeps its weights as [K, N] in modules of its own: they pass through, named in the report."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel._from_config(
        GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96), dtype=torch.bfloat16
    ).eval()
    models.save(gpt2, tmp_path)
    model, report = load_model(tmp_path, device="cpu")
    assert report.quantized_tensors == 0
    assert report.passed_through["transformer.h.0.attn.c_attn.weight"] == "nothing runs Conv1D in FP8"
    assert torch.equal(models.logits(model), models.logits(gpt2))


def test_not_runnable_leaves_codes_and_scales_in_place(folders):
    """With `runnable=False` the modules stay what they were and hold FP8 with its scale."""
    model = meta_model(folders("tiny_llama"))
    load_checkpoint(model, folders("tiny_llama"), device="cpu", runnable=False)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is nn.Linear
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight_scale.shape == (320, 1)


def test_selection_reaches_the_loader(folders):
    """ignore, include and per-pattern schemes decide by name."""
    model, _ = load_model(
        folders("tiny_qwen3_moe"),
        "per_channel",
        device="cpu",
        ignore=["model.layers.0"],
        include=["lm_head"],
        schemes={"*.self_attn.o_proj": "per_tensor"},
    )
    first, second = model.model.layers
    assert not any(isinstance(module, Fp8Module) for module in first.modules())
    assert isinstance(second.mlp.experts, Fp8Experts)
    assert isinstance(model.lm_head, Fp8Linear)
    assert second.self_attn.o_proj.weight_scale.shape == ()


# Checkpoints that are FP8 already.


@pytest.mark.parametrize("scheme", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3_moe"])
def test_written_fp8_folder_is_taken_as_it_is(folders, tmp_path, family, scheme):
    """Codes and scales of a written folder land in the model bit by bit; logits are those of its values."""
    quantize_checkpoint(folders(family), tmp_path / "fp8", scheme=scheme)
    model, report = load_model(tmp_path / "fp8", activation=None, device="cpu")
    assert report.quantized_tensors == 0
    stored = open_checkpoint(tmp_path / "fp8")
    q, scale = (stored.read(f"model.layers.1.self_attn.q_proj.{leaf}") for leaf in ("weight", "weight_scale"))
    layer = model.model.layers[1].self_attn.q_proj
    assert torch.equal(layer.weight.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(layer.weight_scale.flatten(), scale.flatten())
    expected = original(folders(family))
    with torch.no_grad():
        for name in stored.metadata():
            if name.endswith(".weight_scale"):
                weight = name.removesuffix("_scale")
                value = (stored.read(weight).float() * stored.read(name)).bfloat16()
                destination = Names(expected).find(weight)
                destination.of(expected.get_parameter(destination.name)).copy_(value)
    assert torch.equal(models.logits(model), models.logits(expected))


def test_written_block_folder_is_taken_as_it_is(tmp_path):
    """128-blocks with `weight_scale_inv`, dense and in merged experts: logits as when loaded from bf16."""
    sizes = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 4, "moe_intermediate_size": 128}
    models.save(models.tiny_qwen3_moe(**sizes), tmp_path / "bf16")
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8", scheme="per_block", format="fp8")
    direct, _ = load_model(tmp_path / "bf16", "per_block", activation=None, device="cpu")
    model, _ = load_model(tmp_path / "fp8", activation=None, device="cpu")
    for a, b in zip(direct.state_dict().items(), model.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1].float(), b[1].float()), a[0]
    assert torch.equal(models.logits(model), models.logits(direct))


def test_fp8_weight_without_its_scale_is_refused(folders, tmp_path):
    """Codes mean nothing without a scale."""
    from safetensors.torch import save_file

    tensors = {name: t.clone() for name, t in open_checkpoint(folders("tiny_llama")).tensors()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"`{re.escape(name)}` has no scale"):
        load_checkpoint(meta_model(folders("tiny_llama")), tmp_path, device="cpu")


def test_blocks_of_unknown_extent_are_refused(folders, tmp_path):
    """Scales whose blocks no config explains are not guessed at."""
    from safetensors.torch import save_file

    tensors = {name: t.clone() for name, t in open_checkpoint(folders("tiny_llama")).tensors()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(3, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedLayoutError, match="does not say what the scales"):
        load_checkpoint(meta_model(folders("tiny_llama")), tmp_path, device="cpu")


# Names.


def test_base_model_prefix_is_added_and_taken_away(folders):
    """A causal model's checkpoint loads into its base model, and the base model's into the causal one."""
    causal = meta_model(folders("tiny_llama"))
    tensors = dict(open_checkpoint(folders("tiny_llama")).tensors())
    load_checkpoint(causal, {k.removeprefix("model."): t for k, t in tensors.items()}.items(), device="cpu")
    base = meta_model(folders("tiny_llama")).model
    load_checkpoint(base, tensors.items(), device="cpu")
    tokens = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(causal.model(tokens).last_hidden_state, base(tokens).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.experts.4.gate_proj.weight", ("model.layers.1.mlp.experts.gate_up_proj", 4, 0)),
        ("model.layers.1.mlp.experts.0.up_proj.weight", ("model.layers.1.mlp.experts.gate_up_proj", 0, 1)),
        ("layers.1.mlp.experts.0.w3.weight", ("model.layers.1.mlp.experts.gate_up_proj", 0, 1)),
        ("model.layers.1.mlp.experts.2.w2.weight", ("model.layers.1.mlp.experts.down_proj", 2, None)),
        ("model.layers.1.mlp.experts.down_proj", ("model.layers.1.mlp.experts.down_proj", None, None)),
        ("model.layers.1.mlp.experts.5.down_proj.weight", None),  # there are 5: 0 to 4
        ("model.layers.2.mlp.experts.0.down_proj.weight", None),  # there are 2 layers
    ],
)
def test_experts_one_by_one_land_in_merged_weights(name, expected):
    """Each shard of an expert goes to its rows; what the model has no place for goes nowhere."""
    model = models.on_meta(models.tiny_qwen3_moe())
    assert Names(model).find(name) == (expected and Destination(*expected))


def test_values_that_the_model_computes_are_dropped(folders):
    """Rotary tables in old checkpoints do not disturb, and are not taken."""
    tensors = dict(open_checkpoint(folders("tiny_llama")).tensors())
    expected, _ = load_model(folders("tiny_llama"), device="cpu")
    model = meta_model(folders("tiny_llama"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(24)}
    load_checkpoint(model, (tensors | extra).items(), device="cpu")
    assert torch.equal(models.logits(model), models.logits(expected))


# Wrong input: named, and the model is as it was.


def broken(tensors, how):
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del tensors[name]
    elif how == "unexpected":
        tensors["model.layers.7.mlp.up_proj.weight"] = tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name].t()
    elif how == "nan":
        tensors[name] = tensors[name].clone()
        tensors[name][3, 5] = float("nan")
    elif how == "fp8":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    return tensors


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("missing", IncompleteLoadError, r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ("unexpected", LoadError, r"no place for `model\.layers\.7\.mlp\.up_proj\.weight`"),
        ("shape", LoadError, r"up_proj\.weight` must have shape \(320, 192\), got \(192, 320\)"),
        ("nan", NonFiniteWeightError, r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ("fp8", LoadError, r"model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_bad_checkpoint_is_named_and_leaves_the_model_as_it_was(folders, how, error, message):
    """Every kind of failure names the tensor; modules, parameters and buffers are the very objects from before."""
    model = meta_model(folders("tiny_llama"))
    before = snapshot(model)
    tensors = broken(dict(open_checkpoint(folders("tiny_llama")).tensors()), how)
    with pytest.raises(error, match=message):
        load_checkpoint(model, tensors.items(), device="cpu")
    assert snapshot(model) == before
    assert all(p.is_meta for p in model.parameters())
    load_checkpoint(model, folders("tiny_llama"), device="cpu")  # and it can be loaded after all


def test_failure_over_an_fp8_folder_puts_the_modules_back(folders, tmp_path):
    """Modules exchanged for an FP8 folder return where it turns out incomplete."""
    quantize_checkpoint(folders("tiny_llama"), tmp_path / "fp8")
    (tmp_path / "fp8" / "model.safetensors.index.json").unlink()
    first = sorted((tmp_path / "fp8").glob("*.safetensors"))[0]
    model = meta_model(folders("tiny_llama"))
    before = snapshot(model)
    with pytest.raises(IncompleteLoadError):
        load_checkpoint(model, first, device="cpu")
    assert snapshot(model) == before


def test_buffer_that_nothing_computes_is_refused():
    """A table on meta that no checkpoint holds is not left uninitialised."""

    class WithTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(32, 16)
            self.register_buffer("table", torch.arange(16), persistent=False)

    with torch.device("meta"):
        model = WithTable()
    with pytest.raises(LoadError, match="no checkpoint holds `table`"):
        load_checkpoint(model, {"proj.weight": torch.ones(16, 32), "proj.bias": torch.ones(16)}.items(), device="cpu")
    assert model.table.is_meta


def test_iterable_is_consumed_one_tensor_at_a_time(folders):
    """No more than the tensor at hand and the one before it are alive while a generator is read."""
    living, most = weakref.WeakSet(), 0

    def tensors():
        nonlocal most
        for name, tensor in open_checkpoint(folders("tiny_llama")).tensors():
            copy = tensor.clone()
            living.add(copy)
            most = max(most, len(living))
            yield name, copy

    load_checkpoint(meta_model(folders("tiny_llama")), tensors(), device="cpu")
    assert most <= 2


def test_tensors_by_name_are_a_source():
    """As `state_dict` gives them; a bare string is no list of patterns, whose letters would be some."""
    weights = {"weight": torch.randn(8, 16), "bias": torch.randn(8)}

    def load(source, **options):
        with torch.device("meta"):
            model = torch.nn.Linear(16, 8)
        load_checkpoint(model, source, device="cpu", runnable=False, **options)
        return model.state_dict()

    found, expected = load(weights), load(weights.items())
    assert found.keys() == expected.keys() == {"weight", "weight_scale", "bias"}
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
    with pytest.raises(TypeError, match="`ignore` must be a list of patterns, got the string 'weight'"):
        load(weights, ignore="weight")


def test_progress_ends_at_the_size_of_the_checkpoint(folders):
    """Progress counts the checkpoint's bytes, up to all of them."""
    calls = []
    load_model(folders("tiny_llama"), device="cpu", progress=lambda *call: calls.append(call))
    total = sum(info.num_bytes for info in open_checkpoint(folders("tiny_llama")).metadata().values())
    assert calls[-1][:2] == (total, total)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)


# Maxima that are known.


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3_moe", "tiny_mixtral"])
def test_a_sidecar_of_maxima_changes_no_bit_and_nothing_waits(folders, family, tmp_path, monkeypatch):
    """With the sidecar each weight, experts' halves included, is quantized under per_tensor as it arrives."""
    folder = tmp_path / "in"
    shutil.copytree(folders(family), folder)
    plain, _ = load_model(folder, "per_tensor", device="cpu")
    write_amax(folder)
    model, told = meta_model(folder), []
    original_loader = load_module.LayerwiseLoader
    monkeypatch.setattr(
        load_module,
        "LayerwiseLoader",
        lambda *args, **kwargs: told.append(kwargs["amax"]) or original_loader(*args, **kwargs),
    )
    load_checkpoint(model, folder, "per_tensor", device="cpu")
    wanted = plain.state_dict()
    quantized = {name.removesuffix("_scale") for name in wanted if name.endswith("_scale")}
    assert quantized <= told[0].keys()
    assert model.state_dict().keys() == wanted.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)), name


def test_a_stale_sidecar_is_refused(folders, tmp_path):
    """Under per_tensor, which would use it; another scheme has no need to look."""
    folder = tmp_path / "in"
    shutil.copytree(folders("tiny_llama"), folder)
    path = write_amax(folder)
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(CheckpointError, match="fp8-kernels amax"):
        load_checkpoint(meta_model(folder), folder, "per_tensor", device="cpu")
    load_checkpoint(meta_model(folder), folder, "per_channel", device="cpu")


def test_a_sidecar_of_nan_names_the_weight_that_holds_it(tmp_path):
    """As an error of the load: the sidecar says what is true of the weights."""
    folder = tmp_path / "in"
    folder.mkdir()
    weights = {"0.weight": torch.randn(4, 6), "1.weight": torch.randn(3, 4)}
    weights["1.weight"][2, 1] = float("nan")
    save_file(weights, folder / "model.safetensors")
    write_amax(folder)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False))
    with pytest.raises(NonFiniteWeightError, match="1 weights hold NaN or Inf: 1.weight"):
        load_checkpoint(model, folder, "per_tensor", device="cpu")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64, dtype=torch.bfloat16)
        self.fc = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(64, bias=False, dtype=torch.bfloat16)

    @classmethod
    def tensors(cls):
        return {name: torch.randn_like(p) for name, p in cls().named_parameters()}


@pytest.mark.parametrize("way", ["iterable", "mapped", "spans"])
@pytest.mark.parametrize(
    ("name", "dtype", "match"),
    [
        ("fc.weight", torch.int8, "floating-point data, got torch.int8"),
        ("embed.weight", torch.int8, "floating-point data, got torch.int8"),
        ("norm.weight", torch.bool, "floating-point data, got torch.bool"),
        ("embed.weight", torch.float8_e4m3fn, "got torch.float8_e4m3fn without its scale|has no scale"),
        ("fc.weight_scale", torch.uint8, "floating-point data, got torch.uint8"),
    ],
)
def test_values_that_mean_nothing_alone_are_refused(way, name, dtype, match, tmp_path):
    """Integers for a weight, also one that stays in high precision, and for scales; codes without their scale."""
    tensors = Small.tensors()
    if name == "fc.weight_scale":
        tensors["fc.weight"] = tensors["fc.weight"].to(torch.float8_e4m3fn)
    tensors[name] = torch.ones(tensors[name].shape if name in tensors else (48, 1), dtype=dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    if way == "iterable" and name == "fc.weight_scale":
        match = "scales for `fc.weight` must be floating-point numbers, got torch.uint8"
    with torch.device("meta"):
        model = Small()
    with pytest.raises((LoadError, CheckpointError), match=match):
        if way == "iterable":
            load_checkpoint(model, tensors.items(), device="cpu")
        else:
            load_checkpoint(model, tmp_path, device="cpu", transfer=way)
    assert all(p.is_meta for p in model.parameters())


def test_two_scales_of_one_weight_are_refused(tmp_path):
    """Which one counts, nobody can know; the last that arrived did."""
    tensors = Small.tensors()
    tensors["fc.weight"] = tensors["fc.weight"].to(torch.float8_e4m3fn)
    tensors |= {"fc.weight_scale": torch.ones(48, 1), "fc.weight_scale_inv": torch.ones(48, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with torch.device("meta"):
        model = Small()
    with pytest.raises(CheckpointError, match="`fc.weight` has scales `fc.weight_scale` and `fc.weight_scale_inv`"):
        load_checkpoint(model, tmp_path, device="cpu")
