"""Layouts in which checkpoints come: each loads, by load_checkpoint and by from_pretrained, to the same model."""

import json

import pytest
import torch
from safetensors.torch import save_file

import fp8_kernels as fk
from fp8_kernels.checkpoint import open_checkpoint, quantize_checkpoint
from fp8_kernels.errors import IncompleteLoadError, LoadError, NonFiniteWeightError
from fp8_kernels.loading.rules import Rules
from fp8_kernels.modules import Fp8Linear
from fp8_kernels.names import Names

from . import models
from .integrations.families import FAMILIES
from .integrations.test_transformers import differing

transformers = pytest.importorskip("transformers", minversion="5.17")
WAYS = ("load_model", "from_pretrained")
BLOCKS = {"hidden_size": 384, "head_dim": 64, "num_key_value_heads": 4, "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Qwen3-MoE whose sizes are whole blocks, as folder and as tensors in the names of its checkpoint."""
    torch.manual_seed(0)
    folder = models.save(models.tiny_qwen3_moe(**BLOCKS), tmp_path_factory.mktemp("qwen3_moe"))
    return folder, {name: t.clone() for name, t in open_checkpoint(folder).tensors()}


def load(way, folder, scheme=None, **options):
    if way == "load_model":
        return fk.load_model(folder, scheme, device="cpu", **options)[0]
    config = fk.Fp8KernelsConfig(scheme, **options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


def write(folder, tensors, like, quantization_config=None):
    """A folder of these tensors and the config of another."""
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((like / "config.json").read_text())
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fused(tensors):
    """The same checkpoint with all experts of a layer in two tensors."""
    found = {name: t for name, t in tensors.items() if ".experts." not in name}
    for i in range(2):
        experts = f"model.layers.{i}.mlp.experts"

        def part(name, experts=experts):
            return torch.stack([tensors[f"{experts}.{e}.{name}.weight"] for e in range(5)])

        found[f"{experts}.gate_up_proj"] = torch.cat([part("gate_proj"), part("up_proj")], dim=1)
        found[f"{experts}.down_proj"] = part("down_proj")
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("turned", [False, True], ids=["E_out_in", "E_in_out"])
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block"])
def test_experts_in_one_tensor(source, tmp_path, way, turned, scheme):
    """[E, 2I, H] and [E, H, 2I] give what experts one by one give."""
    tensors = fused(source[1])
    if turned:
        tensors = {name: t.mT if t.ndim == 3 else t for name, t in tensors.items()}
    folder = write(tmp_path / "fused", tensors, source[0])
    assert not differing(load(way, folder, scheme), load("load_model", source[0], scheme))


@pytest.mark.parametrize("way", WAYS)
def test_experts_in_one_tensor_that_are_fp8(source, tmp_path, way):
    """Codes of all experts and `<name>_scale` beside them are taken as they are."""
    tensors = {}
    for name, t in fused(source[1]).items():
        if t.ndim == 3:
            tensors[name], tensors[f"{name}_scale"] = fk.quantize(t, "per_channel")
        else:
            tensors[name] = t
    model = load(way, write(tmp_path / "fp8", tensors, source[0]))
    experts = model.model.layers[1].mlp.experts
    expected = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(experts.gate_up_proj.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(experts.gate_up_proj_scale, tensors["model.layers.1.mlp.experts.gate_up_proj_scale"])
    assert not isinstance(model.model.layers[1].self_attn.q_proj, Fp8Linear)  # the folder kept it


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_group", "mxfp8"])
@pytest.mark.parametrize("stored", ["per_block", "per_channel"])
def test_fp8_source_to_another_scheme(source, tmp_path, way, stored, scheme):
    """Each weight is quantized from the float32 values that its codes and scales stand for, dense ones and experts;
    where the scales cover the same already, codes and scales are taken as they are."""
    quantize_checkpoint(source[0], tmp_path / "fp8", stored, "fp8" if stored == "per_block" else "compressed-tensors")
    model, checkpoint = load(way, tmp_path / "fp8", scheme), open_checkpoint(tmp_path / "fp8")
    with torch.device("meta"):
        high = models.tiny_qwen3_moe(**BLOCKS).float()
    values = {name: torch.empty_like(p, device="cpu") for name, p in high.named_parameters()}
    for name, info in checkpoint.metadata().items():
        if info.dtype == torch.float8_e4m3fn:
            scale = checkpoint.read(name + ("_scale_inv" if stored == "per_block" else "_scale"))
            found = Names(high).find(name)
            found.of(values[found.name]).copy_(fk.dequantize(checkpoint.read(name), scale, torch.float32, stored))
    rules, compared = Rules(scheme), 0
    for name, w in values.items():
        owner = high.get_submodule(name.rpartition(".")[0])
        if rules.decide(name, w.shape, w.dtype, owner)[0] is not None:
            q, scale = fk.quantize(w, scheme)
            if stored == scheme:
                q, scale = None, None
            got, got_scale = model.get_parameter(name), model.get_parameter(f"{name}_scale")
            if q is not None:
                assert torch.equal(got.view(torch.uint8), q.view(torch.uint8)), name
                assert torch.equal(got_scale.float(), scale.float()), name
            else:
                assert torch.equal(fk.dequantize(got, got_scale, torch.float32, scheme), w), name
            compared += 1
    assert compared == 2 * (4 + 2)


@pytest.mark.parametrize("way", WAYS)
def test_partly_quantized_folder(source, tmp_path, way):
    """As it is where nothing is asked; with a scheme the rest becomes FP8, and what is FP8 of that scheme stays."""
    quantize_checkpoint(source[0], tmp_path / "fp8", ignore=["model.layers.0"])
    model = load(way, tmp_path / "fp8")
    first, second = model.model.layers
    assert type(first.self_attn.q_proj) is torch.nn.Linear and isinstance(second.self_attn.q_proj, Fp8Linear)
    whole = load(way, tmp_path / "fp8", "per_channel")
    assert not differing(whole, load("load_model", source[0], "per_channel"))


@pytest.mark.parametrize("way", [*WAYS, "spans"])
@pytest.mark.parametrize("bad", ["weight", "weight_scale"])
def test_fp8_folder_that_is_not_finite(source, tmp_path, way, bad):
    """A NaN among its codes or an Inf among its scales is refused by name, as in a bf16 weight."""
    quantize_checkpoint(source[0], tmp_path / "fp8")
    tensors = {name: t.clone() for name, t in open_checkpoint(tmp_path / "fp8").tensors()}
    module = "model.layers.1.self_attn.k_proj"
    tensors[f"{module}.{bad}"].view(-1)[-1] = float("nan" if bad == "weight" else "inf")
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    options = {"transfer": way} if way == "spans" else {}
    with pytest.raises(NonFiniteWeightError, match=rf"1 weights hold NaN or Inf: {module}.weight$"):
        load("load_model" if way == "spans" else way, tmp_path / "fp8", **options)


def test_the_report_counts_weights_that_were_fp8(source, tmp_path):
    """They are none that were made, and none that stayed in high precision."""
    quantize_checkpoint(source[0], tmp_path / "fp8", ignore=["model.layers.0"])
    _, report = fk.load_model(tmp_path / "fp8", device="cpu")
    kept = len(report.passed_through) - report.fp8_tensors
    assert report.fp8_tensors == 4 + 2
    assert str(report).startswith(f"6 FP8 weights taken as they are on cpu, {kept} passed through\n")
    _, report = fk.load_model(source[0], device="cpu")
    assert report.fp8_tensors == 0 and str(report).startswith("12 weights (28 units) to FP8 per_channel on cpu, ")


def test_dequantizing_is_streamed(tmp_path):
    """A weight of 32 MiB in codes, 128 in float32, passes in pieces: staging never holds more than a few of them."""
    from .loading.helpers import Model

    model, w = Model(fc=(8192, 4096)), torch.randn(8192, 4096)
    q, scale = fk.quantize(w, "per_block")
    with fk.LayerwiseLoader(model, "per_channel", device="cpu") as loader:
        loader.copy_codes(model.fc.weight, q, scale, "per_block")
    assert loader.report.peak_staging_bytes <= 24 << 20
    expected, _ = fk.quantize(fk.dequantize(q, scale, torch.float32, "per_block"), "per_channel")
    assert torch.equal(model.fc.weight.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("wrong", [lambda e, i, o: (e, 1, o), lambda e, i, o: (e, i, 1), lambda e, i, o: (e, i + 1, o)])
def test_experts_to_be_turned_must_have_their_shape(wrong, tmp_path):
    """Also where torch would repeat them."""
    torch.manual_seed(0)
    source, name = FAMILIES["gpt_oss"](), "model.layers.0.mlp.experts.gate_up_proj"
    tensors = dict(models.save(source, tmp_path) and open_checkpoint(tmp_path).tensors())
    tensors[name] = torch.ones(wrong(*tensors[name].shape), dtype=torch.bfloat16)
    model = models.on_meta(source)
    with pytest.raises(LoadError, match=rf"`{name}` must have shape"):
        fk.load_checkpoint(model, tensors.items(), device="cpu")
    assert all(p.is_meta for p in model.parameters()) and model.model.layers[0].mlp.experts.is_transposed


def test_a_failed_load_turns_experts_back(tmp_path):
    """Experts that were turned for the load are the model's own again, in its layout."""
    torch.manual_seed(0)
    source = FAMILIES["gpt_oss"]()
    tensors = dict(models.save(source, tmp_path) and open_checkpoint(tmp_path).tensors())
    del tensors["model.norm.weight"]
    model = models.on_meta(source)
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    with pytest.raises(IncompleteLoadError):
        fk.load_checkpoint(model, tensors.items(), device="cpu")
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == before
    assert model.model.layers[0].mlp.experts.is_transposed
    fk.load_checkpoint(model, tmp_path, device="cpu")
