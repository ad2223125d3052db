"""SGLang's real loader, plugin hooks and models with `--quantization fp8_kernels`; `make test-sglang` installs it.

What serves has to equal, to the bit, what SGLang makes of the folder that `quantize_checkpoint` writes.
"""

import importlib.util
import os
import random
import traceback
import types

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.integrations import sglang as integration

from .. import models
from . import sglang_engine as engine

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; `make test-sglang` runs these tests with it", allow_module_level=True)
engine.declare_image_ops()

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


@pytest.fixture(scope="module", autouse=True)
def started():
    end = engine.start()
    yield
    end()


def llama(folder, seed=0, **sizes):
    torch.manual_seed(seed)
    return models.save(models.tiny_llama(**SIZES | sizes), folder)


def qwen3_moe(folder, seed=0, **sizes):
    torch.manual_seed(seed)
    return models.save(models.tiny_qwen3_moe(**SIZES | EXPERTS | sizes), folder)


def deepseek_v3(folder, seed=0):
    """Latent attention, whose `kv_b_proj` SGLang folds into other tensors, a dense layer and one of experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    # The last five are what SGLang asks of older versions' configs.
    config = DeepseekV3Config(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=128,
        q_lora_rank=128,
        qk_rope_head_dim=128,  # with it rows of kv_a_proj_with_mqa are whole blocks
        vocab_size=160,
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        num_nextn_predict_layers=0,
        moe_layer_freq=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        ep_size=1,
    )
    torch.manual_seed(seed)
    return models.save(models.random_model(DeepseekV3ForCausalLM, config), folder)


def assert_same(found, wanted):
    """Names, shapes, strides and bits of all parameters, and of what latent attention has made of them."""
    for name, module in wanted.named_modules():
        for leaf in ("w_kc", "w_vc", "w_scale"):
            made, t = getattr(found.get_submodule(name), leaf, None), getattr(module, leaf, None)
            if isinstance(t, torch.Tensor):
                assert torch.equal(made.float(), t.float()), f"{name}.{leaf}"
            else:
                assert made == t, f"{name}.{leaf}"
    found, wanted = dict(found.named_parameters()), dict(wanted.named_parameters())
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        layout = (t.dtype, t.shape, t.stride())
        assert (found[name].dtype, found[name].shape, found[name].stride()) == layout, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)), name


def num_fp8(model):
    return sum(p.dtype == torch.float8_e4m3fn for p in model.parameters())


@pytest.mark.parametrize(
    "make,scheme,format",
    [
        (llama, "per_channel", "compressed-tensors"),
        (llama, "per_block", "compressed-tensors"),
        (qwen3_moe, "per_channel", "compressed-tensors"),
        (qwen3_moe, "per_block", "fp8"),
        (deepseek_v3, "per_channel", "compressed-tensors"),
        (deepseek_v3, "per_block", "fp8"),
    ],
)
def test_model_equals_that_of_the_folder(make, scheme, format, tmp_path):
    """After post-processing: q, k, v and gate, up fused, experts merged, layouts as the kernels want them."""
    folder = make(tmp_path / "bf16")
    fk.quantize_checkpoint(folder, tmp_path / "fp8", scheme, format)
    model = engine.load(folder, "fp8_kernels", scheme=scheme)
    assert_same(model, engine.load(tmp_path / "fp8"))
    assert num_fp8(model) == (14 if make is deepseek_v3 else 8)


@pytest.mark.parametrize("make", [llama, qwen3_moe])
def test_per_tensor_arrives_as_from_the_folder(make, tmp_path):
    """Before post-processing, in which SGLang quantizes fused weights again, with a CUDA kernel. SGLang builds no
    experts with one scale from the folder's config, which says `token` for activations, so these compare with what
    the folder holds."""
    folder = make(tmp_path / "bf16")
    fk.quantize_checkpoint(folder, tmp_path / "fp8", "per_tensor")
    model = engine.load_without_layouts(folder, "fp8_kernels", scheme="per_tensor")
    assert num_fp8(model) == 8
    if make is llama:
        assert_same(model, engine.load_without_layouts(tmp_path / "fp8"))
        return
    stored = dict(fk.open_checkpoint(tmp_path / "fp8").tensors())
    for layer in range(2):
        experts, prefix = model.model.layers[layer].mlp.experts, f"model.layers.{layer}.mlp.experts"
        for e in range(4):
            gate, up = (stored[f"{prefix}.{e}.{part}_proj.weight"] for part in ("gate", "up"))
            assert torch.equal(experts.w13_weight[e].view(torch.uint8), torch.cat([gate, up]).view(torch.uint8))
            scales = [stored[f"{prefix}.{e}.{part}_proj.weight_scale"] for part in ("gate", "up")]
            assert torch.equal(experts.w13_weight_scale[e], torch.cat(scales)) and scales[0] == scales[1]
            down = stored[f"{prefix}.{e}.down_proj.weight"]
            assert torch.equal(experts.w2_weight[e].view(torch.uint8), down.view(torch.uint8))
            assert experts.w2_weight_scale[e] == stored[f"{prefix}.{e}.down_proj.weight_scale"]


def test_smollm2_equals_its_folder(tmp_path):
    """A real model, with tied embeddings and the default options."""
    folder = models.smollm2()
    fk.quantize_checkpoint(folder, tmp_path / "fp8")
    model = engine.load(folder, "fp8_kernels")
    assert_same(model, engine.load(tmp_path / "fp8"))
    assert num_fp8(model) == 4 * 30


def test_ignored_weights_stay_whole(tmp_path):
    """An ignored attention stays bf16, although SGLang's class fuses its three weights without saying so."""
    folder = llama(tmp_path / "bf16")
    model = engine.load(folder, "fp8_kernels", ignore=["model.layers.0.self_attn"])
    plain = engine.load(folder)
    first, second = (model.model.layers[i].self_attn.qkv_proj.weight for i in (0, 1))
    assert first.dtype == torch.bfloat16 and second.dtype == torch.float8_e4m3fn
    assert torch.equal(first, plain.model.layers[0].self_attn.qkv_proj.weight)
    assert num_fp8(model) == 6


def test_plugin_is_found_by_its_entry_point(tmp_path, monkeypatch):
    """SGLang's own discovery finds and runs what pyproject.toml declares, as often as it likes."""
    import tomllib
    from sglang.srt import plugins

    groups = tomllib.loads((models.ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path / "fp8_kernels-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fp8_kernels\nVersion: 0.1.0\n")
    lines = [f"{name} = {value}" for name, value in groups["sglang.srt.plugins"].items()]
    (folder / "entry_points.txt").write_text("[sglang.srt.plugins]\n" + "\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    found = plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP)
    assert found["fp8_kernels"][0] is integration.register
    hooked = dict(plugins.HookRegistry._hooks)
    plugins.load_plugins()
    assert {name: len(hooks) for name, hooks in hooked.items()} == dict.fromkeys(integration._hooks(), 1)


def test_command_line(tmp_path):
    """The line of docs/engines.md, through SGLang's own parser and resolution of its arguments."""
    from sglang.srt.server_args import prepare_server_args

    options = '{"fp8_kernels": {"scheme": "per_block"}}'
    words = ["--model-path", str(llama(tmp_path / "bf16")), "--quantization", "fp8_kernels", "--device", "cpu"]
    args = prepare_server_args([*words, "--model-loader-extra-config", options])
    assert (args.quantization, args.model_loader_extra_config) == ("fp8_kernels", options)
    with pytest.raises(SystemExit):
        prepare_server_args([*words[:3], "fp8_kernel"])


def forget_scales_of_experts(model, weights, device):
    model.load_weights((name, t) for name, t in weights if not name.endswith("down_proj.weight_scale"))


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    """Other loaders, options that mean nothing, formats that the model does not load, another SGLang: each is named."""
    from sglang.srt.model_loader import loader

    folder = llama(tmp_path / "bf16")
    with pytest.raises(ValueError, match="load_format.*'layered'"):
        engine.loader_of(folder, "fp8_kernels", load_format="layered")
    with pytest.raises(ValueError, match="load_format.*'dummy'"):
        engine.loader_of(folder, "fp8_kernels", load_format="dummy")
    with pytest.raises(ValueError, match="--quantization fp8_kernels"):
        engine.loader_of(folder, None, scheme="per_channel")
    with pytest.raises(ValueError, match="shceme"):
        engine.loader_of(folder, "fp8_kernels", shceme="per_channel")
    with pytest.raises(fk.UnmatchedPatternError, match="nothing"):
        engine.load(folder, "fp8_kernels", ignore=["nothing"])
    with pytest.raises(fk.UnsupportedLayoutError, match="mxfp8"):
        engine.load(folder, "fp8_kernels", scheme="mxfp8")
    with pytest.raises(RuntimeError, match=r"qkv_proj\.weight_scale_inv.*LlamaForCausalLM took no scale"):
        engine.load(folder, "fp8_kernels", scheme="per_block", format="fp8")
    with pytest.raises(fk.LoadError, match=r"`lm_head\.weight` must stay bfloat16, as the engine has it"):
        engine.load(folder, "fp8_kernels", include=["lm_head"])
    with pytest.raises(RuntimeError, match=r"experts\.w2_weight_scale.*Qwen3MoeForCausalLM took no scale"):
        monkeypatch.setattr(loader.DefaultModelLoader, "load_weights_only", staticmethod(forget_scales_of_experts))
        engine.load(qwen3_moe(tmp_path / "moe"), "fp8_kernels")
    fk.quantize_checkpoint(folder, tmp_path / "fp8")
    with pytest.raises(ValueError, match="does not match"):  # SGLang's own: the folder is FP8 already
        engine.load(tmp_path / "fp8", "fp8_kernels")
    monkeypatch.setattr(integration, "_registered", False)
    monkeypatch.setattr(loader.DefaultModelLoader, "_get_all_weights", lambda self, sources: iter(()))
    with pytest.raises(RuntimeError, match=r"_get_all_weights` must take \(self model_config model\).*not supported"):
        integration.register()


def updater(model, config):
    """SGLang's updater of a serving model."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    return WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=config,
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=lambda model, **fields: None,
        recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: None,
    )


def from_tensors(updater, folder, state):
    ok, message = updater.update_weights_from_tensor(state)
    assert ok, message


def from_buckets(updater, folder, state):
    """Flattened, in two parts that cut a fused weight apart."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    for part in (state[:5], state[5:]):
        bucket = FlattenedTensorBucket(named_tensors=part)
        payload = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        ok, message = updater.update_weights_from_tensor(payload, load_format="flattened_bucket")
        assert ok, message


def from_distributed(updater, folder, state):
    """What a broadcast has received, a weight at a time, inside SGLang's begin and end of an update."""
    updater.begin_weight_update()
    for item in state:
        ok, message = updater.load_weights_from_distributed([item])
        assert ok, message
    updater.end_weight_update(run_post_load=False)


def from_checkpoint_engine(updater, folder, state):
    """What its worker calls: the loader for each bucket, and once its hook."""
    pytest.importorskip("checkpoint_engine", reason="checkpoint-engine is not installed")
    from sglang.srt.checkpoint_engine.checkpoint_engine_worker import SGLangCheckpointEngineWorkerExtensionImpl

    worker = SGLangCheckpointEngineWorkerExtensionImpl(types.SimpleNamespace(model=updater.get_model()))
    for start in range(0, len(state), 4):
        worker.get_model_loader()(state[start : start + 4])
    worker.get_post_hook()()


def from_disk(updater, folder, state):
    ok, message = updater.update_weights_from_disk(str(folder), "auto")
    assert ok, message


WAYS = [from_tensors, from_buckets, from_distributed, from_checkpoint_engine, from_disk]
UPDATED = [
    (make, scheme, way)
    for make in (llama, qwen3_moe, deepseek_v3)
    for scheme in ("per_channel", "per_block")
    for way in (WAYS if make is not deepseek_v3 else [from_tensors, from_disk])
]


@pytest.mark.parametrize("make,scheme,way", UPDATED)
def test_updates_in_place(make, scheme, way, tmp_path):
    """A serving model takes bf16 weights by each of SGLang's ways, twice: it is then as if loaded with them, and every
    tensor is the same object at the same address."""
    model = engine.load(make(tmp_path / "0"), "fp8_kernels", scheme=scheme)
    _, config = engine.loader_of(tmp_path / "0", "fp8_kernels", scheme=scheme)
    objects = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    for seed in (1, 2):
        folder = make(tmp_path / str(seed), seed=seed)
        state = list(fk.open_checkpoint(folder).tensors())
        random.shuffle(state)
        way(updater(model, config), folder, state)
        assert_same(model, engine.load(folder, "fp8_kernels", scheme=scheme))
        assert objects == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}


def test_update_of_a_part(tmp_path):
    """One weight by name: its rows change and nothing else does."""
    model = engine.load(llama(tmp_path / "0"), "fp8_kernels")
    _, config = engine.loader_of(tmp_path / "0", "fp8_kernels")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    w = torch.randn(128, 256).bfloat16()  # two heads of 64
    from_tensors(updater(model, config), None, [("model.layers.1.self_attn.k_proj.weight", w)])
    q, scale = fk.quantize(w, "per_channel")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    rows = slice(256, 384)  # below four heads of q
    assert torch.equal(model.get_parameter(name).t()[rows].view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(model.get_parameter(f"{name}_scale")[rows], scale)
    for other, p in model.named_parameters():
        same = p.reshape(-1).view(torch.uint8) == before[other].reshape(-1).view(torch.uint8)
        assert same.all() or other in (name, f"{name}_scale"), other


def test_update_that_sglang_would_forget(tmp_path):
    """DeepSeek's loader joins q_a and kv_a of one call; where they come in two, the update fails and says so."""
    model = engine.load(deepseek_v3(tmp_path / "0"), "fp8_kernels")
    state = dict(fk.open_checkpoint(deepseek_v3(tmp_path / "1", seed=1)).tensors())
    name = "model.layers.0.self_attn.q_a_proj.weight"
    partner = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    with pytest.raises(RuntimeError, match=r"q_a_proj\.weight` must come in one call with `.*kv_a_proj_with_mqa"):
        model.load_weights([(name, state[name])])
    model.load_weights([(name, state[name]), (partner, state[partner])])
    q = torch.cat([fk.quantize(state[n], "per_channel")[0].view(torch.uint8) for n in (name, partner)])
    held = model.get_parameter("model.layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight")
    assert torch.equal(held.t().view(torch.uint8), q)


def test_direct_update_of_other_precision_is_refused(tmp_path):
    """It would be cast without its scale."""
    model = engine.load(llama(tmp_path / "0"), "fp8_kernels", scheme="per_block")
    _, config = engine.loader_of(tmp_path / "0", "fp8_kernels")
    name = "model.layers.0.self_attn.o_proj.weight"
    held = model.get_parameter(name)
    with pytest.raises(ValueError, match=r"o_proj\.weight` must be float8_e4m3fn .*bfloat16"):
        updater(model, config).update_weights_from_tensor([(name, torch.ones(256, 256).bfloat16())], "direct")
    codes = torch.randn(256, 256).to(torch.float8_e4m3fn)
    updater(model, config).update_weights_from_tensor([(name, codes)], "direct")
    assert torch.equal(held.view(torch.uint8), codes.view(torch.uint8))


def test_update_of_a_layout_that_is_a_copy_is_refused(tmp_path, monkeypatch):
    """Where SGLang has made another tensor for its kernels, new weights are refused, and the old ones serve on."""
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8

    plain = CompressedTensorsW8A8Fp8.process_weights_after_loading

    def packed(self, layer):
        plain(self, layer)
        layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)

    monkeypatch.setattr(CompressedTensorsW8A8Fp8, "process_weights_after_loading", packed)
    model = engine.load(llama(tmp_path / "0"), "fp8_kernels")
    before = [p.detach().clone() for p in model.parameters()]
    state = list(fk.open_checkpoint(llama(tmp_path / "1", seed=1)).tensors())
    with pytest.raises(RuntimeError, match=r"qkv_proj\.weight` \(8 in all\) must lie where it was loaded"):
        model.load_weights(state)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_non_finite_weights_fail_the_load(tmp_path):
    """Named, as everywhere."""
    torch.manual_seed(0)
    model = models.tiny_llama(**SIZES)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(fk.NonFiniteWeightError, match=r"layers\.1\.mlp\.down_proj"):
        engine.load(models.save(model, tmp_path / "bf16"), "fp8_kernels")


def run_rank(rank, folder, cases, ep_size):
    """A rank's process: each case both ways; what failed goes to a file."""
    torch.set_num_threads(1)
    try:
        end = engine.start(rank, 2, folder, ep_size)
        for name, scheme in cases:
            model = engine.load(folder / name, "fp8_kernels", scheme=scheme)
            assert_same(model, engine.load(folder / f"{name}-{scheme}"))
            assert num_fp8(model) == 8
            if ep_size > 1:
                assert model.model.layers[0].mlp.experts.w13_weight.shape[0] == 2
        (folder / f"{rank}").write_text("ok")
        end()
    except BaseException:
        (folder / f"{rank}").write_text(traceback.format_exc())
        os._exit(1)


CASES = [(name, scheme) for name in ("llama", "qwen3_moe") for scheme in ("per_channel", "per_block")]


@pytest.mark.parametrize("ep_size,cases", [(1, CASES), (2, CASES[2:])])
def test_parallel_ranks(ep_size, cases, tmp_path):
    """Two processes over gloo: each rank of SGLang's own parallel layers, with parts of all experts or half of them
    whole, holds what it takes from the folder."""
    llama(tmp_path / "llama", head_dim=128)  # SGLang wants whole blocks on each rank
    qwen3_moe(tmp_path / "qwen3_moe", head_dim=128, moe_intermediate_size=256)
    for name, scheme in cases:
        blocks_of_experts = (name, scheme) == ("qwen3_moe", "per_block")
        format = "fp8" if blocks_of_experts else "compressed-tensors"
        fk.quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-{scheme}", scheme, format)
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, tmp_path, cases, ep_size)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    said = [(tmp_path / f"{rank}").read_text() if (tmp_path / f"{rank}").exists() else "none" for rank in range(2)]
    assert said == ["ok"] * 2, "\n".join(said)
