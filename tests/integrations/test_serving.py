"""New weights for a model that an engine loaded by `quantize_weights`, and laid out for its kernels."""

import pytest
import torch
from torch import nn

import fp8_kernels as fk
from fp8_kernels.integrations.serving import CodesStayCodes, Serving

NAMES, N, K = ("a", "b"), 48, 96
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class EngineParameter(nn.Parameter):
    """Of an engine: it carries its loader."""

    def __new__(cls, data, loader):
        made = torch.Tensor._make_subclass(cls, data, False)
        made.loader = loader
        return made


def copy_into(param, loaded_weight):
    assert param.shape == loaded_weight.shape
    param.data.copy_(loaded_weight)


class Engine(nn.Module):
    """Loads FP8 checkpoints of `linear` and a norm; its kernels want weights turned."""

    def __init__(self, device, plain=()):
        super().__init__()
        for name in NAMES:
            child = nn.Module()
            dtype = torch.bfloat16 if name in plain else torch.float8_e4m3fn
            child.weight = EngineParameter(torch.zeros(N, K, device=device).to(dtype), copy_into)
            child.weight_scale = EngineParameter(torch.zeros(N, 1, device=device), copy_into)
            child.norm = nn.LayerNorm(K, bias=False, dtype=torch.bfloat16, device=device)
            self.add_module(name, child)

    def load_weights(self, weights):
        params, taken = dict(self.named_parameters()), []
        for name, tensor in weights:
            param = params[name.replace("_proj", "")]
            getattr(param, "loader", copy_into)(param, tensor)
            taken.append(name)
        return taken

    def lay_out(self):
        for child in self.children():
            child.weight = nn.Parameter(child.weight.data.t(), requires_grad=False)


def state_of(seed):
    torch.manual_seed(seed)
    state = {f"{name}_proj.weight": torch.randn(N, K).bfloat16() for name in NAMES}
    return state | {f"{name}.norm.weight": torch.randn(K).bfloat16() for name in NAMES}


def served(device, checked=None, lay_out=Engine.lay_out):
    """A model that has been loaded and serves."""
    model = Engine(device)
    serving = Serving(model, {"scheme": "per_channel"}, lambda model, names: checked is None or checked.append(names))
    model.load_weights(fk.quantize_weights(state_of(0).items(), device=device))
    with serving.remembered():
        lay_out(model)
    return model, serving


def assert_holds(model, state):
    for name in NAMES:
        child = model.get_submodule(name)
        q, scale = fk.quantize(state[f"{name}_proj.weight"].to(child.weight.device), "per_channel")
        assert torch.equal(child.weight.t().view(torch.uint8), q.view(torch.uint8)), name
        assert torch.equal(child.weight_scale, scale) and not child.weight.is_contiguous()
        assert torch.equal(child.norm.weight.cpu(), state[f"{name}.norm.weight"])


@pytest.mark.parametrize("device", DEVICES)
def test_updates_go_where_the_weights_are(device):
    """In high precision, in whole or in part, by the engine's own loader: same objects, same addresses."""
    calls = []
    model, serving = served(device, calls)
    objects = [(id(p), p.data_ptr(), type(p)) for p in model.parameters()]
    state = state_of(1)
    assert len(model.load_weights(state.items())) == len(state) + len(NAMES)
    assert_holds(model, state)
    part = {"b_proj.weight": torch.randn(N, K).bfloat16()}
    model.load_weights(part.items())
    assert_holds(model, state | part)
    assert objects == [(id(p), p.data_ptr(), type(p)) for p in model.parameters()]
    assert calls == [list(state), list(part)] and serving.report.quantized_tensors == 1


@pytest.mark.gpu
def test_a_graph_sees_the_new_weights():
    """What has captured pointers reads what has come."""
    model, _ = served("cuda")
    found = torch.empty(K, N, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found.copy_(model.a.weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.copy_(model.a.weight)
    state = state_of(3)
    model.load_weights(state.items())
    graph.replay()
    q = fk.quantize(state["a_proj.weight"].cuda(), "per_channel")[0]
    assert torch.equal(found, q.float().t())


def as_copies(model):
    for child in model.children():
        child.weight = nn.Parameter(child.weight.data.t().contiguous(), requires_grad=False)


def in_place(model):
    """Kernels that want powers of two: codes and scales are changed where they are."""
    model.b.weight_scale.data.copy_(torch.exp2(torch.ceil(torch.log2(model.b.weight_scale.data))))


def into_other_memory(model):
    """The same parameter object on other memory."""
    model.a.weight_scale.data = model.a.weight_scale.data.clone()


@pytest.mark.parametrize(
    "lay_out,named", [(as_copies, "a.weight"), (in_place, "b.weight_scale"), (into_other_memory, "a.weight_scale")]
)
def test_what_cannot_be_reached_is_refused(lay_out, named):
    """A layout that is a copy, or whose values are others: an update would not arrive, and is refused by name."""
    model, _ = served("cpu", lay_out=lay_out)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=rf"`{named}` .* must lie where it was loaded"):
        model.load_weights(state_of(1).items())
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_memory_of_copies_is_given_back():
    """Where kernels have copies, what they were made of is not kept for updates that cannot be."""
    from weakref import WeakSet

    alive = WeakSet()

    def as_noted_copies(model):
        alive.update(child.weight for child in model.children())
        as_copies(model)

    model, _ = served("cpu", lay_out=as_noted_copies)
    assert not list(alive) and model.a.weight.shape == (K, N)


def test_a_failed_update_leaves_the_layout():
    """Whatever stops the engine's loader: the parameters that serve are back in their places."""
    model, _ = served("cpu")
    objects = [id(p) for p in model.parameters()]
    with pytest.raises(KeyError, match="nowhere"):
        model.load_weights([*state_of(1).items(), ("nowhere.weight", torch.zeros(3))])
    assert objects == [id(p) for p in model.parameters()]
    model.load_weights(state_of(2).items())
    assert_holds(model, state_of(2))


@pytest.mark.parametrize("device", DEVICES)
def test_codes_stay_codes(device):
    """A weight that the engine has in bf16 must not take codes, which would be there without their scales."""
    model = Engine(device, plain=["b"])
    stream = fk.quantize_weights(state_of(0).items(), device=device)
    with pytest.raises(fk.LoadError, match=r"`b_proj\.weight` must stay bfloat16.*give it to `ignore`"):
        with CodesStayCodes(stream):
            model.load_weights(stream)
    model = Engine(device)
    with CodesStayCodes(stream := fk.quantize_weights(state_of(0).items(), device=device)):
        model.load_weights(stream)
    model.lay_out()
    assert_holds(model, state_of(0))
