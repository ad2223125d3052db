"""Loading new weights over an FP8 model: the same objects at the same addresses, all of the new values or none."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fp8_kernels as fk
from fp8_kernels.errors import IncompleteLoadError, LoadError, NonFiniteWeightError, UnmatchedPatternError
from fp8_kernels.loading import LayerwiseLoader
from fp8_kernels.loading.poison import half_loaded

from .helpers import SCHEMES, Model, assert_quantized, values

MODES = ("transactional", "streaming")


def build(dtype=torch.bfloat16):
    """Linears with biases, experts, tied and untied pass-through parameters, a persistent and a derived buffer."""
    with torch.device("meta"):
        model = nn.Module()
        model.embed = nn.Embedding(10, 36, dtype=dtype)
        model.fc = nn.Linear(36, 7, dtype=dtype)
        model.fc2 = nn.Linear(7, 36, dtype=dtype)
        model.experts = nn.Module()
        model.experts.w13 = nn.Parameter(torch.empty(3, 10, 36, dtype=dtype))
        model.norm = nn.BatchNorm1d(36, dtype=dtype)
        model.lm_head = nn.Linear(36, 10, bias=False, dtype=dtype)
        model.lm_head.weight = model.embed.weight
    model.register_buffer("table", torch.arange(5.0), persistent=False)
    return model


def new_state(seed, dtype=torch.bfloat16):
    """Checkpoint tensors, different for every seed."""
    torch.manual_seed(seed)
    return {
        name: values(*t.shape, dtype=dtype) if t.is_floating_point() else torch.tensor(seed)
        for name, t in build(dtype).state_dict().items()
        if name != "lm_head.weight"
    }


def copy_in(model, state):
    """An engine's loader: it looks its parameters up each time."""
    for name, t in model.state_dict(keep_vars=True).items():
        if name in state:
            t.data.copy_(state[name])


def loaded(scheme="per_channel", seed=1, **options):
    """A model that serves the weights of `new_state(seed)`."""
    model = build()
    with LayerwiseLoader(model, scheme, device="cpu", **options):
        copy_in(model, new_state(seed))
    return model


def memory(model):
    """Name -> object, address and layout of every tensor; and its bytes."""
    held = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    where = {name: (id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad) for name, t in held.items()}
    return where, {name: t.detach().clone().reshape(-1).view(torch.uint8) for name, t in held.items()}


def assert_untouched(model, before):
    where, contents = memory(model)
    assert where == before[0]
    for name, data in contents.items():
        assert torch.equal(data, before[1][name]), name


def assert_serves(model, state, scheme="per_channel"):
    """Every tensor holds these checkpoint values, quantized where it is FP8."""
    for name, w in state.items():
        held = model.state_dict()[name]
        if held.dtype == torch.float8_e4m3fn:
            assert_quantized(model, name, w, scheme)
        else:
            assert torch.equal(held, w), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_new_values_at_the_old_addresses(scheme, mode):
    """After a reload every tensor is the same object at the same address with the new checkpoint's values; three times
    over, since a reload must not live on what the first load left behind."""
    model = loaded(scheme)
    where = memory(model)[0]
    for seed in (2, 3, 2):
        with LayerwiseLoader(model, reload=mode) as loader:
            assert model.fc.weight.is_meta and model.fc.weight.dtype == torch.bfloat16
            copy_in(model, new_state(seed))
        assert memory(model)[0] == where
        assert_serves(model, new_state(seed), scheme)
        assert loader.report.quantized_tensors == 3 and loader.device == torch.device("cpu")
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize("mode", MODES)
def test_reload_of_a_runnable_model(mode):
    """A model whose modules became `Fp8Linear` reloads through the modules that it has now, and computes anew."""
    model = loaded()
    experts = model.experts
    del model.experts
    fk.make_runnable(model)
    model.experts = experts
    x = torch.randn(4, 36).bfloat16()
    where, first = memory(model)[0], model.fc(x)
    with LayerwiseLoader(model, reload=mode):
        copy_in(model, new_state(2))
    assert isinstance(model.fc, fk.Fp8Linear) and memory(model)[0] == where
    assert_serves(model, new_state(2))
    assert not torch.equal(model.fc(x), first)
    with LayerwiseLoader(model, reload=mode):
        copy_in(model, new_state(1))
    assert torch.equal(model.fc(x), first)


def test_modules_that_were_made_fp8_can_be_loaded_in_high_precision():
    """`Fp8Linear` modules that no load of ours has filled are reloaded with the scheme that they name; float32 data is
    quantized from float32."""
    model = nn.Sequential(fk.Fp8Linear(300, 130, scheme="per_block"), fk.Fp8Linear(130, 5, bias=False))
    w = [torch.randn(130, 300), torch.randn(5, 130)]
    where = memory(model)[0]
    with LayerwiseLoader(model, reload="transactional"):
        model[0].weight.data.copy_(w[0])
        model[0].bias.data.zero_()
        model[1].weight.data.copy_(w[1])
    assert memory(model)[0] == where
    assert_quantized(model, "0.weight", w[0], "per_block")
    assert_quantized(model, "1.weight", w[1], "per_channel")


@pytest.mark.parametrize("mode", MODES)
def test_partial_update(mode):
    """Only what `scope` names is loaded and required; the rest is untouched, and writing to it is refused."""
    model, state = loaded(), new_state(2)
    before = memory(model)
    inside = ["fc.weight", "fc.bias", "experts.w13"]
    with LayerwiseLoader(model, reload=mode, scope=(name for name in ("fc", "experts"))) as loader:
        copy_in(model, {name: state[name] for name in inside})
    assert {entry.name for entry in loader.plan.entries} == set(inside)
    assert memory(model)[0] == before[0]
    assert_serves(model, {**new_state(1), **{name: state[name] for name in inside}})
    before = memory(model)
    for name in ("fc2.weight", "norm.weight", "fc2.weight_scale"):
        with pytest.raises(LoadError, match=f"`{name}` must not be written by this reload"):
            with LayerwiseLoader(model, reload=mode, scope=["fc"]):
                model.get_parameter(name).data.fill_(1)
        assert_untouched(model, before)
    with pytest.raises(UnmatchedPatternError, match=r"'nothing'.*scope"):
        _ = LayerwiseLoader(model, reload=mode, scope=["fc", "nothing"]).plan


@pytest.mark.parametrize("mode", MODES)
def test_chunked_updates(mode):
    """One session takes many calls of the engine's loader, each with a bucket of shards in a buffer that is reused."""
    model, state = loaded("per_block"), new_state(2)
    bucket = torch.empty(4096, dtype=torch.bfloat16)
    with LayerwiseLoader(model, reload=mode):
        for name, w in state.items():
            for rows in (slice(0, 2), slice(2, None)) if w.ndim else (...,):
                source = bucket[: w[rows].numel()].view(w[rows].shape).copy_(w[rows])
                model.state_dict(keep_vars=True)[name].data[rows].copy_(source)
                bucket.fill_(float("nan"))
    assert_serves(model, state, "per_block")


class FailAt(TorchDispatchMode):
    """Raises at the n-th op that reaches real memory; `count` is how many there were."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


def _relayout(module):
    """What an engine does for its kernels: one weight transposed in memory, one derived from another."""
    if module.weight.dtype == torch.float8_e4m3fn if hasattr(module, "weight") else False:
        module.weight = nn.Parameter(module.weight.t().contiguous(), requires_grad=False)
        module.doubled = module.weight_scale.detach() * 2


@pytest.mark.parametrize(
    "scheme, error",
    [
        ("per_tensor", RuntimeError("injected")),
        ("per_tensor", KeyboardInterrupt()),
        ("per_channel", RuntimeError("injected")),
        ("per_block", torch.OutOfMemoryError("out of memory")),
    ],
    ids=["error", "interrupt", "per_channel", "per_block-oom"],
)
def test_a_transaction_that_fails_at_any_op_changes_nothing(scheme, error):
    """Each op that a reload runs fails in turn, its commit's too: model, addresses and bytes are the old ones; at
    the end the very same model reloads."""
    model = loaded(scheme, on_module=_relayout)
    state, before = new_state(2), memory(model)
    doubled = model.fc.doubled.clone()

    def attempt(at):
        mode = FailAt(at, error)
        with mode, LayerwiseLoader(model, reload="transactional", on_module=_relayout):
            copy_in(model, state)
        return mode.count

    at = 0
    while True:
        at += 1
        try:
            count = attempt(at)
        except type(error):
            assert_untouched(model, before)
            assert torch.equal(model.fc.doubled, doubled)
        else:
            assert count < at
            break
    assert at > 150
    q, scale = fk.quantize(state["fc.weight"], scheme)
    assert memory(model)[0] == before[0]
    assert torch.equal(model.fc.weight.view(torch.uint8), q.t().view(torch.uint8))
    assert torch.equal(model.fc.doubled, scale * 2)


@pytest.mark.parametrize("kind", ["missing", "nan", "body", "on_module", "on_finish"])
def test_a_transaction_that_fails_at_its_end_changes_nothing(kind):
    """Whatever is found only when everything has arrived: the old weights serve."""
    model, state = loaded(), new_state(2)
    before = memory(model)
    if kind == "missing":
        del state["fc2.bias"]
    if kind == "nan":
        state["experts.w13"][2, 3, 4] = float("nan")
    hooks = {kind: lambda _: 1 / 0} if kind.startswith("on_") else {}
    errors = {"missing": IncompleteLoadError, "nan": NonFiniteWeightError, "body": OSError}
    with pytest.raises(errors.get(kind, ZeroDivisionError)):
        with LayerwiseLoader(model, reload="transactional", **hooks):
            copy_in(model, state)
            if kind == "body":
                raise OSError("file ended")
    assert_untouched(model, before)
    with LayerwiseLoader(model, reload="transactional"):
        copy_in(model, new_state(3))
    assert_serves(model, new_state(3))


def test_a_streaming_reload_that_fails_marks_the_model():
    """What received data is named: it refuses to run and to be loaded in part, until it is reloaded."""
    model, state = loaded(), new_state(2)
    where = memory(model)[0]
    x = torch.randn(2, 36).bfloat16()

    def broken(names):
        with pytest.raises(OSError), LayerwiseLoader(model, reload="streaming"):
            copy_in(model, {name: state[name] for name in names})
            raise OSError("disk")

    broken([])
    model.norm(x)  # nothing arrived, so nothing is half loaded
    broken(["fc.weight", "norm.weight"])
    assert memory(model)[0] == where
    with pytest.raises(fk.PoisonedModelError, match=r"`fc.weight`"):
        model.fc(x)
    for options in ({}, {"reload": "streaming", "scope": ["fc"]}, {"reload": "transactional", "scope": ["norm"]}):
        with pytest.raises(fk.PoisonedModelError, match="half loaded"):
            _ = LayerwiseLoader(model, **options).plan
    broken(["fc2.weight"])
    with pytest.raises(fk.PoisonedModelError, match="`fc.weight`"):
        model.fc(x)
    with pytest.raises(fk.PoisonedModelError, match="`fc2.weight`"):
        model.fc2(x)
    with LayerwiseLoader(model, reload="transactional", scope=["fc", "fc2", "norm"]):
        copy_in(model, {n: w for n, w in new_state(3).items() if n.split(".")[0] in ("fc", "fc2", "norm")})
    model.norm(x)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert memory(model)[0] == where


def test_a_streaming_reload_that_fails_marks_buffers():
    """Buffers need not arrive; where one did, its module is half loaded too."""
    model, w = Model(fc=(6, 36)), values(6, 36)
    model.norm = nn.BatchNorm1d(36)
    for options in ({}, {"reload": "streaming"}):
        with LayerwiseLoader(model, device="cpu", **options):
            model.fc.weight.data.copy_(w)
            for p in model.norm.parameters():
                p.data.fill_(1)
    with pytest.raises(ZeroDivisionError), LayerwiseLoader(model, reload="streaming"):
        model.norm.running_mean.data.fill_(3)
        raise ZeroDivisionError
    assert half_loaded(model) == ["norm.running_mean"]
    with pytest.raises(fk.PoisonedModelError, match="`norm.running_mean`"):
        model.norm(torch.randn(2, 36))


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block"])
def test_a_streaming_reload_that_fails_at_any_op_tells(scheme):
    """Each op fails in turn: the old weights are there, bit for bit, or the model refuses; no address changes, and the
    next reload heals it."""
    model = loaded(scheme)
    old, new = new_state(1), new_state(2)
    (where, contents), x, at, refused = memory(model), torch.randn(2, 36).bfloat16(), 0, 0
    while True:
        at += 1
        mode = FailAt(at, RuntimeError("injected"))
        try:
            with mode, LayerwiseLoader(model, reload="streaming"):
                copy_in(model, new)
            break
        except RuntimeError:
            pass
        assert memory(model)[0] == where
        if not all(torch.equal(data, contents[name]) for name, data in memory(model)[1].items()):
            refused += 1
            with pytest.raises(fk.PoisonedModelError):
                _ = LayerwiseLoader(model, "per_channel", device="cpu").plan
            marked = model.get_submodule(half_loaded(model)[0].rpartition(".")[0])
            with pytest.raises(fk.PoisonedModelError):
                marked(x)
        with LayerwiseLoader(model, reload="streaming"):
            copy_in(model, old)
        assert_serves(model, old, scheme)
    assert refused > 20 and mode.count < at
    assert_serves(model, new, scheme)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["view", "copy", "square"])
def test_stale_weight_loader(how, mode):
    """An engine that put its own parameter, of another layout, in a weight's place gets the checkpoint's layout with
    the `weight_loader` of the first load, always; what is not known to be in it needs the hook that made it."""
    shape = (8, 8) if how == "square" else (6, 36)

    class Engine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
            self.weight.weight_loader = self.load_rows

        def load_rows(self, param, w, start):
            assert param.shape == shape
            param.data.narrow(0, start, len(w)).copy_(w)

    def process(module):
        if isinstance(module, Engine):
            w = module.weight.t()
            module.weight = nn.Parameter(w if how == "view" else w.contiguous(), requires_grad=False)

    model, w = nn.Sequential(Engine()), values(2, *shape)

    def run(w, **options):
        with LayerwiseLoader(model, device="cpu", **options):
            p = dict(model.named_parameters())["0.weight"]
            for start in (0, 3):
                p.weight_loader(p, w[start : start + 3] if start == 0 else w[start:], start)

    run(w[0], on_module=process)
    before = memory(model)
    if how == "view":
        run(w[1], reload=mode)
    else:
        with pytest.raises(ValueError, match=r"`0.weight` must be in the layout of the checkpoint.*on_module"):
            run(w[1], reload=mode)
        assert_untouched(model, before)
        run(w[1], reload=mode, on_module=process)
    assert memory(model)[0] == before[0]
    q, scale = fk.quantize(w[1], "per_channel")
    assert torch.equal(model[0].weight.view(torch.uint8), q.t().view(torch.uint8))
    assert torch.equal(model[0].weight_scale, scale)
    with pytest.raises(LoadError, match=r"must come out as it was"):
        run(w[0], reload="transactional", on_module=lambda m: setattr(m, "weight", nn.Parameter(torch.ones(3, 3))))


@pytest.mark.parametrize("mode", MODES)
def test_deferred_module(mode):
    """What is folded out of other modules' weights, a plain attribute, is folded again after all of them, and lies
    where it lay."""
    model = loaded(on_finish=lambda model: setattr(model, "folded", model.fc.weight_scale * model.norm.weight.sum()))
    pointer = model.folded.data_ptr()
    events = []

    def fold(model):
        assert model.fc.weight.dtype == torch.float8_e4m3fn
        events.append("finish")
        model.folded = model.fc.weight_scale * model.norm.weight.sum()

    with LayerwiseLoader(model, reload=mode, on_module=events.append, on_finish=fold):
        copy_in(model, new_state(2))
    assert events[-1] == "finish" and len(set(events)) == len(events) == 7
    assert model.folded.data_ptr() == pointer
    assert torch.equal(model.folded, model.fc.weight_scale * model.norm.weight.sum())


@pytest.mark.parametrize("mode", MODES)
def test_non_idempotent_post_processing(mode):
    """Hooks run once, and only for modules that received data: optional ones that did not keep what they were."""
    seen = []
    model = loaded()
    before = memory(model)
    with LayerwiseLoader(
        model, reload=mode, scope=["fc", "fc2", "norm"], optional=["fc2", "norm.bias"], on_module=seen.append
    ) as loader:
        copy_in(model, {n: w for n, w in new_state(2).items() if n.startswith(("fc.", "norm")) and n != "norm.bias"})
    assert sorted(map(id, seen)) == sorted(map(id, (model.fc, model.norm)))
    assert sorted(loader.report.defaulted) == ["fc2.bias", "fc2.weight", "norm.bias"]
    where, contents = memory(model)
    assert where == before[0]
    for name in ("fc2.weight", "fc2.weight_scale", "fc2.bias", "norm.bias"):
        assert torch.equal(contents[name], before[1][name])
    assert_quantized(model, "fc.weight", new_state(2)["fc.weight"])


@pytest.mark.parametrize("mode", MODES)
def test_alias_and_non_persistent_buffers(mode):
    """Tensors that share memory still do after a reload: buffers that view a weight, parameters that overlap; and
    buffers that no checkpoint holds keep their values."""
    model = loaded()
    model.fc.register_buffer("rows", model.fc.weight.detach()[2:4], persistent=False)
    both = torch.zeros(12)
    model.both = nn.Module()
    model.both.a, model.both.b = nn.Parameter(both[:8]), nn.Parameter(both[4:])
    where = memory(model)[0]
    with LayerwiseLoader(model, reload=mode):
        copy_in(model, new_state(2))
        model.both.a.data.fill_(1)
        model.both.b.data.fill_(2)
    assert memory(model)[0] == where
    assert torch.equal(model.fc.rows.view(torch.uint8), model.fc.weight[2:4].view(torch.uint8))
    assert both.tolist() == [1.0] * 4 + [2.0] * 8
    assert torch.equal(model.table, torch.arange(5.0))


@pytest.mark.parametrize("mode", MODES)
def test_weights_in_one_buffer(mode):
    """FP8 weights that an engine laid side by side in one buffer, interleaved, are each reloaded in their place."""
    model, w = Model(a=(6, 36), b=(4, 20)), [values(6, 36), values(4, 20), values(6, 36), values(4, 20)]
    buffer = torch.zeros(6, 60, dtype=torch.float8_e4m3fn)

    def load(a, b, **options):
        with LayerwiseLoader(model, device="cpu", **options):
            model.a.weight.data.copy_(a)
            model.b.weight.data.copy_(b)

    load(w[0], w[1])
    places = {"a": buffer[:, :36], "b": buffer[1:5, 40:]}
    for name, place in places.items():
        held = model.get_submodule(name).weight
        held.data = place.copy_(held.data)

    def process(model):
        for name in places:  # another memory than the buffer's, which the results move into
            module = model.get_submodule(name)
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)

    load(w[2], w[3], reload=mode, on_finish=process)
    for name, wanted in (("a", w[2]), ("b", w[3])):
        q = fk.quantize(wanted, "per_channel")[0].view(torch.uint8)
        assert torch.equal(model.get_submodule(name).weight.view(torch.uint8), q)
        assert torch.equal(places[name].view(torch.uint8), q)


def test_memory_of_a_reload():
    """Streaming holds no second copy of the weights; a transaction holds one, and lets go of it."""
    model = loaded()

    def codes():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta]
        return {t.untyped_storage()._cdata: t.nbytes for t in tensors if t.dtype == torch.float8_e4m3fn}

    resident = sum(p.nbytes for p in model.parameters() if p.dtype == torch.float8_e4m3fn)
    before = codes()
    for mode, expected in (("streaming", 0), ("transactional", resident)):
        with LayerwiseLoader(model, reload=mode, on_module=lambda module: None):
            copy_in(model, new_state(2))
            model.fc.weight.data.copy_(new_state(2)["fc.weight"])  # turn to another weight: the last one is quantized
            held = sum(size for storage, size in codes().items() if storage not in before)
            assert held == expected
        assert codes() == before


def test_what_a_reload_refuses():
    """A model without FP8, settings that are the first load's, a scope without a reload, a copy whose layout is
    unknown."""
    with pytest.raises(ValueError, match="holds FP8 weights"):
        LayerwiseLoader(build(), reload="transactional")
    model = loaded()
    with pytest.raises(ValueError, match="must be one of"):
        LayerwiseLoader(model, reload="yes")
    for options in ({"scheme": "per_block"}, {"ignore": ["fc"]}, {"schemes": {"fc": "per_block"}}):
        with pytest.raises(ValueError, match="a reload keeps each weight's scheme"):
            LayerwiseLoader(model, reload="streaming", **options)
    with pytest.raises(ValueError, match="`scope` must come with `reload`"):
        LayerwiseLoader(build(), scope=["fc"])
    with pytest.raises(ValueError, match="layout of the checkpoint"):
        LayerwiseLoader(copy.deepcopy(model), reload="streaming")
    with pytest.raises(LoadError, match="would drop the scale.*`reload=`"), LayerwiseLoader(model, device="cpu"):
        copy_in(model, new_state(2))
