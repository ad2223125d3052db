"""What vLLM's own tests of its reload package ask for, of a LayerwiseLoader in the place of its counting.

The layers and weight loaders are vLLM's. Where its tests check that a layer is processed neither early nor late, these
check when `on_module` is called.
"""

import gc
import weakref

import pytest
import torch

from .vllm_env import as_rank, current, engine_config, make_model, without_moe_backend  # isort: skip

from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.weight_utils import composed_weight_loader, default_weight_loader

import fp8_kernels as fk
from fp8_kernels.errors import ConflictingShardError, IncompleteLoadError, LoadError
from fp8_kernels.testing import assert_same_bits


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return engine_config(make_model(tmp_path_factory.mktemp("moe"), "qwen3_moe"))


@pytest.fixture(params=[None, "transactional", "streaming"])
def mode(request):
    """None: a first load; else a reload of what a first load has made."""
    return request.param


class Layer(torch.nn.Module):
    """A weight that becomes FP8, and parameters of their own shapes and loaders beside it."""

    def __init__(self, rows=6, cols=8, **others):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(rows, cols, device="meta"), requires_grad=False)
        self.weight.weight_loader = default_weight_loader
        for name, (tensor, loader) in others.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            parameter.weight_loader = loader
            self.register_parameter(name, parameter)


def load_all(model, values, order=None):
    parameters = dict(model.named_parameters())  # once, as vLLM's models do
    for name in order or values:
        parameter = parameters[name]
        parameter.weight_loader(parameter, values[name])


def loading(model, mode, **hooks):
    options = {"reload": mode} if mode else {"scheme": "per_channel"}
    return fk.LayerwiseLoader(model, device="cpu", **options, **hooks)


def prepared(model, values, mode):
    """The model, loaded once with other values where this is to be a reload."""
    if mode:
        with loading(model, None):
            load_all(model, {name: torch.ones_like(t) for name, t in values.items()})
    return model


def assert_holds(layer, w):
    q, scale = fk.quantize(w, "per_channel")
    assert_same_bits(layer.weight.data, q, "codes")
    assert_same_bits(layer.weight_scale.data, scale, "scales")


def test_composed_loader_drops_nothing(mode):
    """Mamba's A is copied and then transformed in place: counted twice it would end its layer before D arrived."""
    exponential = composed_weight_loader(default_weight_loader, lambda x: -torch.exp(x.float()))
    vectors = {"A": exponential, "dt_bias": default_weight_loader, "D": default_weight_loader}
    layer = Layer(**{name: (torch.full((4,), float("nan")), loader) for name, loader in vectors.items()})
    values = {"A": torch.full((4,), 0.5), "weight": torch.randn(6, 8), "dt_bias": torch.full((4,), 3.0)}
    values["D"] = torch.full((4,), 7.0)
    model, done = prepared(torch.nn.Sequential(layer), {f"0.{n}": t for n, t in values.items()}, mode), []
    with loading(model, mode, on_module=lambda module: done.append(module.D.clone())):
        load_all(model, {f"0.{name}": t for name, t in values.items()})
    assert torch.equal(layer.A, -torch.exp(values["A"]))
    assert torch.equal(layer.dt_bias, values["dt_bias"]) and torch.equal(layer.D, values["D"])
    assert len(done) == 1 and torch.equal(done[0], values["D"])
    assert_holds(layer, values["weight"])


def test_composed_loader_of_the_weight_itself(mode):
    """Both copies are of what becomes FP8; the second one counts."""
    layer = Layer()
    layer.weight.weight_loader = composed_weight_loader(default_weight_loader, lambda x: x + 1)
    w = torch.randn(6, 8)
    model = prepared(torch.nn.Sequential(layer), {"0.weight": w}, mode)
    with loading(model, mode):
        load_all(model, {"0.weight": w})
    assert_holds(layer, w + 1)


def test_elements_are_known_not_counted(mode):
    """A loader that writes two pieces: what is between them is missing, however often the pieces come."""

    def pieces(parameter, w):
        parameter.data[:3] = w[:3]
        parameter.data[5:8] = w[5:8]

    layer = Layer(rows=10)
    w = torch.randn(10, 8)
    model = prepared(torch.nn.Sequential(layer), {"0.weight": w}, mode)
    layer.weight.weight_loader = pieces
    with pytest.raises(IncompleteLoadError, match="rows 3:5.*rows 8:10|3:5"):
        with loading(model, mode):
            for _ in range(3):
                load_all(model, {"0.weight": w})


def test_duplicate_loads_change_nothing(config, mode):
    """q, q, k, k, v, v: the second of each is verified."""
    shards = {shard: torch.randn(rows, 64).to(torch.bfloat16) for shard, rows in (("q", 64), ("k", 32), ("v", 32))}
    layer = qkv(config)
    if mode:
        with loading(layer, None):
            layer.weight.weight_loader(layer.weight, torch.ones(128, 64).to(torch.bfloat16))
    with loading(layer, mode) as loader:
        for shard, w in shards.items():
            for _ in range(2):
                layer.weight.weight_loader(layer.weight, w, shard)
        layer.weight.weight_loader(layer.weight, shards["q"], "q")
    assert_holds(layer, torch.cat(list(shards.values())))
    assert loader.report.shards == 7


def test_a_different_second_load_is_refused(config):
    """vLLM drops it with a debug line."""
    layer, late = torch.nn.Sequential(qkv(config), Layer()), torch.randn(64, 64).to(torch.bfloat16)
    with pytest.raises(ConflictingShardError, match="0.weight"):
        with loading(layer, None):
            layer[0].weight.weight_loader(layer[0].weight, torch.ones(128, 64).to(torch.bfloat16))
            layer[1].weight.weight_loader(layer[1].weight, torch.randn(6, 8))
            layer[0].weight.weight_loader(layer[0].weight, late, "q")


def qkv(config):
    with current(config):
        layer = QKVParallelLinear(64, 16, 4, 2, bias=False, params_dtype=torch.bfloat16)
        layer.register_parameter("weight", to_meta_tensor(layer.weight))
    return layer


def test_late_bias_is_waited_for(mode):
    """Registered after the weight, as vLLM's linear layers do it: the layer is processed when it has arrived."""
    layer = Layer()
    bias = torch.nn.Parameter(torch.zeros(6), requires_grad=False)
    bias.weight_loader = default_weight_loader
    layer.register_parameter("bias", bias)
    values, seen = {"0.weight": torch.randn(6, 8), "0.bias": torch.full((6,), 3.0)}, []
    model = prepared(torch.nn.Sequential(layer), values, mode)
    with loading(model, mode, on_module=lambda module: seen.append(module.bias.clone())):
        load_all(model, values, ["0.weight"])
        assert not seen
        load_all(model, values, ["0.bias"])
    assert len(seen) == 1 and torch.equal(seen[0], values["0.bias"])
    assert_holds(layer, values["0.weight"])


def test_a_bias_that_appears_meanwhile_is_not_lost(config):
    """Registered while weights are loaded: it is the engine's own, and keeps what is written to it."""
    layer = Layer()
    with loading(torch.nn.Sequential(layer), None):
        layer.weight.weight_loader(layer.weight, torch.ones(6, 8))
        layer.register_parameter("bias", torch.nn.Parameter(torch.zeros(6), requires_grad=False))
        default_weight_loader(layer.bias, torch.full((6,), 3.0))
    assert torch.equal(layer.bias, torch.full((6,), 3.0))


HIDDEN, INNER, EXPERTS = 16, 12, 2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_padded_experts_are_done_one_layer_after_the_other(config, monkeypatch, gated, has_bias, rank, padded):
    """Padding delays no layer, sources are let go of, and a reload keeps every address."""
    stored = (32, 20) if padded else (HIDDEN, INNER)
    without_moe_backend(monkeypatch)
    monkeypatch.setattr(OnlineMoEMethodBase, "uses_meta_device", False)
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "maybe_roundup_sizes", lambda self, *args, **kwargs: stored)
    with current(config), as_rank(rank, 2):
        layers = [experts(gated, has_bias) for _ in range(2)]
    model = torch.nn.ModuleList(layers)
    shapes = {}
    if padded:
        rows = stored[1] + INNER if gated else INNER
        shapes = {"*w13_weight": (EXPERTS, rows, HIDDEN), "*w2_weight": (EXPERTS, HIDDEN, INNER)}
    names = ["w1", "w3", "w2"] if gated else ["w1", "w2"]
    kinds = [False, True] if has_bias else [False]
    pointers = None
    for cycle in range(2):
        done, plain = [], [{n: torch.zeros(t.shape).to(torch.bfloat16) for n, t in original(layer)} for layer in layers]
        options = {"include": ["*w13_weight", "*w2_weight"], "logical_shapes": shapes}
        options = {"reload": "streaming"} if cycle else {"scheme": "per_channel", **options}
        with fk.LayerwiseLoader(model, device="cpu", on_module=done.append, **options):
            for layer in layers if padded else ():
                write_padding(layer, gated, has_bias)
            for index, layer in enumerate(layers):
                sources = []
                for expert in range(EXPERTS):
                    for shard in names:
                        for is_bias in kinds:
                            leaf = ("w2" if shard == "w2" else "w13") + ("_bias" if is_bias else "_weight")
                            if is_bias:
                                shape = (HIDDEN,) if shard == "w2" else (2 * INNER,)
                            else:
                                shape = (HIDDEN, 2 * INNER) if shard == "w2" else (2 * INNER, HIDDEN)
                            w = torch.randn(shape).to(torch.bfloat16)
                            sources.append(weakref.ref(w))
                            parameter = layer.get_parameter(leaf)
                            layer.weight_loader(parameter, w, leaf, shard, expert)
                            layer.weight_loader(plain[index][leaf], w, leaf, shard, expert)
                            del w
                assert all(source() is None for source in sources)
                assert done[:index] == layers[:index] and len(done) <= index + 1
        assert done == layers
        for layer, expected in zip(layers, plain, strict=True):
            for leaf in ("w13", "w2"):
                if has_bias:
                    assert_same_bits(layer.get_parameter(f"{leaf}_bias").data, expected[f"{leaf}_bias"], leaf)
                q, scale = fk.quantize(expected[f"{leaf}_weight"], "per_channel")
                assert_same_bits(layer.get_parameter(f"{leaf}_weight").data, q, leaf)
                assert_same_bits(layer.get_parameter(f"{leaf}_weight_scale").data, scale, leaf)
        now = {name: t.data_ptr() for name, t in model.named_parameters()}
        assert pointers in (None, now)
        pointers = now


def write_padding(layer, gated, has_bias):
    """What vLLM fills with zeros before it quantizes, but for the corners, which `logical_shapes` leaves out."""
    rows = slice(INNER, layer.w2_weight.shape[2])
    if gated:
        layer.w13_weight.data[:, rows, :HIDDEN].zero_()
    if has_bias:
        layer.w2_bias.data[:, HIDDEN:].zero_()
        for start in range(0, layer.w13_bias.shape[1], rows.stop):
            layer.w13_bias.data[:, start + rows.start : start + rows.stop].zero_()


def experts(gated, has_bias):
    layer = FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=1,
        hidden_size=HIDDEN,
        intermediate_size=2 * INNER,
        params_dtype=torch.bfloat16,
        activation="silu" if gated else "silu_no_mul",
        ckpt_names=("gate_proj", "down_proj", "up_proj" if gated else None),
        has_bias=has_bias,
        prefix=f"moe{torch.randint(1 << 60, ()).item()}",
    ).routed_experts
    for leaf in ("w13_weight", "w2_weight"):
        layer.register_parameter(leaf, to_meta_tensor(layer.get_parameter(leaf)))
    return layer


def original(layer):
    return [(leaf, t) for leaf, t in layer.named_parameters() if not leaf.endswith("_scale")]


def test_buffers_that_view_a_parameter_follow_it():
    """A non-persistent buffer on a parameter's memory: after a reload it is on that memory still, with new values."""

    class Conv(Layer):
        def __init__(self):
            super().__init__(conv=(torch.zeros(2, 3), default_weight_loader))
            self.register_buffer("flat", self.conv.detach().view(-1), persistent=False)

    layer = Conv()
    model = torch.nn.Sequential(layer)
    address, values = layer.conv.data_ptr(), {"0.weight": torch.randn(6, 8), "0.conv": torch.full((2, 3), 7.0)}
    for mode in (None, "transactional", "streaming"):
        values["0.conv"] = values["0.conv"] + 1
        options = {"reload": mode} if mode else {"scheme": "per_channel", "ignore": ["*conv"]}
        with fk.LayerwiseLoader(model, device="cpu", **options):
            load_all(model, values)
        assert torch.equal(layer.flat, values["0.conv"].view(-1))
        assert layer.flat.data_ptr() == layer.conv.data_ptr() == address
        assert "flat" in layer._non_persistent_buffers_set and "0.flat" not in model.state_dict()


@pytest.mark.parametrize("arrives", [False, True])
def test_non_persistent_buffers_keep_or_take_values(mode, arrives):
    """Values of the model's own stay what they are; a loader that writes them is heard."""
    layer = Layer()
    layer.register_buffer("factor", torch.tensor(0.25), persistent=False)
    model = prepared(torch.nn.Sequential(layer), {"0.weight": torch.ones(6, 8)}, mode)
    with loading(model, mode):
        load_all(model, {"0.weight": torch.ones(6, 8)})
        if arrives:
            default_weight_loader(layer.factor, torch.tensor(0.5))
    assert layer.factor.item() == (0.5 if arrives else 0.25)
    assert "factor" in layer._non_persistent_buffers_set and "0.factor" not in model.state_dict()


def test_a_view_that_kernels_use_is_reloaded_in_place():
    """A layer that runs on the transposed weight: the reload writes through it, at the same address."""
    layer, w = Layer(), torch.randn(6, 8)
    model = torch.nn.Sequential(layer)
    with loading(model, None):
        load_all(model, {"0.weight": w})
    layer.weight = torch.nn.Parameter(layer.weight.data.t(), requires_grad=False)
    address = layer.weight.data_ptr()
    with loading(model, "streaming"):
        load_all(model, {"0.weight": w * 3})
    assert layer.weight.data_ptr() == address and layer.weight.shape == (8, 6)
    assert_same_bits(layer.weight.data.t(), fk.quantize(w * 3, "per_channel")[0], "codes")


def test_attention_is_processed_after_everything_else(config, mode):
    """`on_finish` is called once, when every layer holds its values, as attention layers need it."""
    model, values = torch.nn.Sequential(Layer(), Layer()), {}
    values |= {"1.weight": torch.randn(6, 8), "0.weight": torch.randn(6, 8)}
    prepared(model, values, mode)
    seen = []
    with loading(model, mode, on_finish=lambda m: seen.append([layer.weight.dtype for layer in m])):
        load_all(model, values)
    assert seen == [[torch.float8_e4m3fn] * 2]


def test_a_layer_is_not_kept_alive(config, mode):
    """vLLM's loaders are bound methods of the layer: nothing of ours outlives it."""
    layer = qkv(config)
    for m in (None, mode) if mode else (None,):
        with loading(layer, m) as loader:
            layer.weight.weight_loader(layer.weight, torch.ones(128, 64).to(torch.bfloat16))
    held = weakref.ref(layer)
    loader.model = None
    del layer, loader
    gc.collect()
    assert held() is None


def test_a_source_without_values_is_refused():
    """vLLM's dry run is on meta tensors; a real load of one would be of nothing."""
    layer = Layer()
    with pytest.raises(LoadError, match="weight"):
        with loading(torch.nn.Sequential(layer), None):
            layer.weight.weight_loader(layer.weight, torch.empty(6, 8, device="meta"))
