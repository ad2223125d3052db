"""`LayerwiseLoader` as a whole: hooks, identity, what an exception leaves behind, threads, memory, the report."""

import contextlib
import gc
import random
import re
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

import fp8_kernels as fk
from fp8_kernels.errors import ConflictingShardError, IncompleteLoadError, LoadError, UnmatchedPatternError
from fp8_kernels.loading import LayerwiseLoader

from .helpers import SCHEMES, Model, assert_quantized, load, values


def _mixed():
    """Weights, experts, tied and untied pass-through parameters, buffers."""
    with torch.device("meta"):
        model = nn.Module()
        model.embed = nn.Embedding(10, 36, dtype=torch.bfloat16)
        model.fc = nn.Linear(36, 7, dtype=torch.bfloat16)
        model.fc2 = nn.Linear(7, 36, dtype=torch.bfloat16)
        model.experts = nn.Module()
        model.experts.w13 = nn.Parameter(torch.empty(3, 10, 36, dtype=torch.bfloat16))
        model.experts.w2 = nn.Parameter(torch.empty(3, 36, 5, dtype=torch.bfloat16))
        model.norm = nn.BatchNorm1d(36, dtype=torch.bfloat16)
        model.lm_head = nn.Linear(36, 10, bias=False, dtype=torch.bfloat16)
        model.lm_head.weight = model.embed.weight
    return model


def _state(model):
    return {name: values(*t.shape).to(t.dtype) if t.ndim else t.new_zeros((), device="cpu") + 3
            for name, t in model.state_dict().items() if name != "lm_head.weight"}  # fmt: skip


def _fingerprint(model):
    """Everything about a model's tensors that a failed load must not change."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [
        (name, id(t), type(t), t.device, t.dtype, t.shape, t.stride(), t.requires_grad, t.untyped_storage()._cdata)
        for name, t in tensors
    ]


def _copy_all(model, state):
    for name, t in model.state_dict(keep_vars=True).items():
        if name in state:
            t.data.copy_(state[name])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_mixed_model(scheme, dtype):
    """Weights and experts become FP8, everything else arrives unchanged, ties stay, parameters are the same objects."""
    model = _mixed()
    state, params = _state(model), dict(model.named_parameters(remove_duplicate=False))
    params["fc.weight"].output_dim = 0
    with LayerwiseLoader(model, scheme, device="cpu", dtype=dtype) as loader:
        _copy_all(model, state)
    for name in ("fc.weight", "fc2.weight", "experts.w13", "experts.w2"):
        assert_quantized(model, name, state[name], scheme, dtype)
        del state[name]
    for name, w in state.items():
        assert torch.equal(model.state_dict()[name], w), name
    assert model.lm_head.weight is model.embed.weight is params["lm_head.weight"]
    assert all(model.get_parameter(name) is p for name, p in params.items())
    assert model.fc.weight.output_dim == 0 and model.fc.bias.requires_grad
    assert model.fc.weight_scale.dtype == fk.schemes.as_scheme(scheme).scale_dtype
    assert loader.report.quantized_units == 8 and loader.report.quantized_tensors == 4
    assert loader.report.passed_through["embed.weight"] == "embedding"


def test_random_shards_in_random_order_with_duplicates():
    """Shards of three weights and some experts, cut at random, shuffled, partly repeated, written through views
    and transposed views: the result is that of a plain load."""
    shapes = {"a": (50, 33), "b": (17, 64), "experts": (3, 12, 20)}
    model = Model(**shapes)
    weights = {name: values(*shape) for name, shape in shapes.items()}
    shards = []
    for name, shape in shapes.items():
        for expert in range(shape[0]) if len(shape) == 3 else [None]:
            rows = sorted({0, shape[-2], *random.choices(range(shape[-2]), k=4)})
            cols = sorted({0, shape[-1], *random.choices(range(shape[-1]), k=3)})
            shards += [
                (name, expert, slice(r0, r1), slice(c0, c1))
                for r0, r1 in zip(rows, rows[1:], strict=False)
                for c0, c1 in zip(cols, cols[1:], strict=False)
            ]
    shards += random.choices(shards, k=len(shards) // 2)
    random.shuffle(shards)

    def loading(params):
        for name, expert, rows, cols in shards:
            p, w = params[f"{name}.weight"].data, weights[name]
            p, w = (p, w) if expert is None else (p[expert], w[expert])
            if random.random() < 0.3:
                p.t()[cols, rows].copy_(w[rows, cols].t())
            else:
                p[rows, cols].copy_(w[rows, cols])

    loader = load(model, loading, "per_block")
    for name, w in weights.items():
        assert_quantized(model, f"{name}.weight", w, "per_block")
    assert loader.report.shards == len(shards) and not loader.report.rewrites


def test_hooks_fire_once_and_in_order():
    """on_unit after each unit with its result, on_module when the module's last tensor is final and installed,
    on_finish last, on the whole model."""
    model, state = _mixed(), None
    state, events = _state(model), []

    def on_unit(unit, q, scale):
        w = state[unit.name] if unit.index is None else state[unit.name][unit.index]
        expected_q, expected_scale = fk.quantize(w, unit.scheme)
        assert q.shape == unit.shape and torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
        assert torch.equal(scale, expected_scale)
        events.append(str(unit))

    def on_module(module):
        assert not any(t.is_meta for t in module.state_dict().values())
        for name, p in module.named_parameters():
            if f"{name}_scale" in dict(module.named_parameters()):
                assert p.dtype == torch.float8_e4m3fn
        events.append(module)

    def on_finish(finished):
        assert finished is model and not any(t.is_meta for t in model.state_dict().values())
        events.append("finish")

    hooks = {"on_unit": on_unit, "on_module": on_module, "on_finish": on_finish}
    with LayerwiseLoader(model, device="cpu", **hooks):
        _copy_all(model, state)
    experts = [f"experts.{leaf}[{i}]" for leaf in ("w13", "w2") for i in range(3)]
    assert [e for e in events if isinstance(e, str)] == ["fc.weight", "fc2.weight", *experts, "finish"]
    # Modules that hold nothing of their own have nothing to wait for.
    assert sorted(map(id, (e for e in events if not isinstance(e, str)))) == sorted(
        map(id, (model.embed, model.fc, model.fc2, model.experts, model.norm, model.lm_head))
    )
    assert events.index("experts.w13[2]") < events.index(model.experts)
    assert events.index("experts.w2[2]") < events.index(model.experts) < events.index("finish")


def test_on_module_may_change_the_layout():
    """A hook may replace the weight by what its kernels want; a late duplicate is still verified, and the layout
    stays."""
    model, w = Model(fc=(6, 36), fc2=(6, 36)), values(6, 36)

    def on_module(module):
        module.weight = nn.Parameter(module.weight.t().contiguous(), requires_grad=False)

    def loading(params):
        params["fc.weight"].data.copy_(w)
        params["fc2.weight"].data.copy_(w)
        assert model.fc.weight.shape == (36, 6)
        params["fc.weight"].data.copy_(w)

    loader = load(model, loading, on_module=on_module)
    q, scale = fk.quantize(w, "per_channel")
    for module in (model.fc, model.fc2):
        assert torch.equal(module.weight.view(torch.uint8), q.t().view(torch.uint8))
        assert torch.equal(module.weight_scale, scale)
    assert loader.report.duplicates == ["fc.weight"]

    def conflict(params):
        loading(params)
        params["fc.weight"].data[:2].copy_(w[:2] * 2)

    model = Model(fc=(6, 36), fc2=(6, 36))
    before = _fingerprint(model)
    with pytest.raises(ConflictingShardError):
        load(model, conflict, on_module=on_module)
    assert _fingerprint(model) == before


FAILURES = {
    "body": (lambda: None, {}, ZeroDivisionError),
    "interrupt": (lambda: None, {}, KeyboardInterrupt),
    "incomplete": (None, {}, IncompleteLoadError),
    "on_unit": (None, {"on_unit": lambda *a: 1 / 0}, ZeroDivisionError),
    "on_module": (None, {"on_module": lambda *a: 1 / 0}, ZeroDivisionError),
    "on_finish": (None, {"on_finish": lambda *a: 1 / 0}, ZeroDivisionError),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_an_exception_leaves_the_model_as_it_was(kind):
    """Whatever fails, wherever: the same tensor objects on the same meta storages, no scale, no hook left behind, no
    staging or result alive; and the same loader then loads."""
    model = _mixed()
    state, before = _state(model), _fingerprint(model)
    keys = [list(m._parameters) + list(m._buffers) for m in model.modules()]
    _, hooks, error = FAILURES[kind]
    results = []

    def attempt():
        on_unit = hooks.get("on_unit", lambda unit, q, scale: results.append(weakref.ref(q)))
        options = {**hooks, "on_unit": on_unit}
        with LayerwiseLoader(model, device="cpu", **options) as loader:
            results.extend(weakref.ref(t) for t in (model.embed.weight.data, loader._session._staging))
            _copy_all(model, {k: v for k, v in state.items() if kind != "incomplete" or k != "fc2.weight"})
            model.fc.late = nn.Parameter(torch.ones(3))
            if kind == "body":
                raise ZeroDivisionError
            if kind == "interrupt":
                raise KeyboardInterrupt

    with pytest.raises(error):
        attempt()
    gc.collect()
    assert _fingerprint(model) == before
    assert [list(m._parameters) + list(m._buffers) for m in model.modules()] == keys
    assert all(r() is None for r in results)
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2))  # no registration hook is left
    with LayerwiseLoader(model, device="cpu"):
        _copy_all(model, state)
    assert_quantized(model, "fc2.weight", state["fc2.weight"])


class _EngineParameter(nn.Parameter):
    """As engines subclass it: extra state, a loader of its own, and torch functions that bypass the class."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, data, output_dim):
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, data, output_dim):
        self._output_dim = output_dim

    def load_rows(self, start, loaded):
        self.data.narrow(self._output_dim, start, loaded.size(0)).copy_(loaded)


def test_parameter_subclasses_stay_themselves():
    """An engine's parameter class, its attributes, weak references and kept views survive; it holds FP8."""
    model, w = Model(fc=(6, 36)), values(6, 36)
    p = model.fc.weight = _EngineParameter(torch.empty(6, 36, dtype=torch.bfloat16, device="meta"), 0)
    reference, view = weakref.ref(p), p[3:5]
    with LayerwiseLoader(model, device="cpu"):
        for start in (3, 0):
            p.load_rows(start, w[start : start + 3])
        p[[1, 2]] = w[[1, 2]]
    assert model.fc.weight is p and reference() is p and type(p) is _EngineParameter and p._output_dim == 0
    assert_quantized(model, "fc.weight", w)
    assert view.is_meta


def test_values_of_real_tensors_are_the_engine_s():
    """Real pass-through parameters are used as they are, and stay the same storage."""
    model = _mixed()
    model.norm = nn.BatchNorm1d(36)
    pointers = {name: t.data_ptr() for name, t in model.norm.state_dict().items()}
    state = _state(model)
    with LayerwiseLoader(model, device="cpu"):
        _copy_all(model, state)
    assert {name: t.data_ptr() for name, t in model.norm.state_dict().items()} == pointers
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_a_real_parameter_that_never_arrived():
    """Being real is not being loaded: a pass-through parameter has to arrive too."""
    model = _mixed()
    model.norm = nn.BatchNorm1d(36)
    state = _state(model)
    del state["norm.weight"]
    with pytest.raises(IncompleteLoadError, match=r"norm.weight: everything"), LayerwiseLoader(model, device="cpu"):
        _copy_all(model, state)


@pytest.mark.filterwarnings("ignore:.*which is a no-op")  # torch sees a meta parameter, and not what happens to it
def test_load_state_dict_works_as_a_loader():
    """torch's own `load_state_dict` inside the context loads, strict and with assign."""
    for assign in (False, True):
        model = _mixed()
        state = _state(model)
        with LayerwiseLoader(model, device="cpu"):
            missing = model.load_state_dict({**state, "lm_head.weight": state["embed.weight"]}, assign=assign)
            assert not missing.missing_keys and not missing.unexpected_keys
        assert_quantized(model, "fc.weight", state["fc.weight"])
        assert torch.equal(model.norm.running_var, state["norm.running_var"])
        assert model.lm_head.weight is model.embed.weight


def test_staging_holds_two_units():
    """Sixteen equal linears, shard by shard: never more than two of them in high precision."""
    model, w = Model(**{f"fc{i}": (64, 576) for i in range(16)}), values(64, 576)
    unit = w.nbytes

    def loading(params):
        for p in params.values():
            for row in range(0, 64, 16):
                p.data[row : row + 16].copy_(w[row : row + 16])

    loader = load(model, loading, "per_tensor")
    assert unit <= loader.report.peak_staging_bytes <= 2 * unit


def test_units_in_any_order_are_counted_in_the_peak():
    """Shards that keep three weights open at once are allowed, and the report says what that took."""
    model, w = Model(a=(64, 576), b=(64, 576), c=(64, 576)), values(64, 576)

    def loading(params):
        for rows in (slice(0, 32), slice(32, 64)):
            for p in params.values():
                p.data[rows].copy_(w[rows])

    loader = load(model, loading, "per_tensor")
    assert loader.report.peak_staging_bytes == 3 * w.nbytes
    for name in "abc":
        assert_quantized(model, f"{name}.weight", w, "per_tensor")


def test_temporary_buffers_are_given_back():
    """Widening a buffer, reading across experts and verifying duplicates leave nothing counted as held."""
    w = values(8, 64, 36, dtype=torch.float32)
    unit = 64 * 36 * 4
    model = Model(**{f"fc{i}": (64, 36) for i in range(8)})

    def widened(params):
        for p, wanted in zip(params.values(), w, strict=True):
            p.data[:32].copy_(wanted[:32].bfloat16())
            p.data[32:].copy_(wanted[32:])
        for _ in range(5):
            params["fc0.weight"].data[32:].copy_(w[0, 32:])

    assert load(model, widened).report.peak_staging_bytes <= 1.5 * unit
    model = Model(experts=(8, 64, 36), dtype=torch.float32)

    def read_again(params):
        p = params["experts.weight"].data
        for i in range(8):
            p[i, 1:].copy_(w[i, 1:])
        for _ in range(5):
            assert torch.equal(p[:, 1:], w[:, 1:])
            p[:, 1:].mul_(1)
        p[:, 0].copy_(w[:, 0])

    assert load(model, read_again, stream=False).report.peak_staging_bytes <= 16 * unit


def test_worker_threads():
    """Threads that enter `loader.worker()` load shards of the same weights; one that does not is diagnosed."""
    shapes = {f"fc{i}": (64, 33) for i in range(6)}
    weights = {name: values(*shape) for name, shape in shapes.items()}

    def worker(loader, part, errors, enters):
        try:
            params = dict(loader.model.named_parameters())
            if enters:
                with loader.worker():
                    _copy_part(params, part)
            else:
                _copy_part(params, part)
        except BaseException as error:
            errors.append(error)

    def _copy_part(params, part):
        for name, w in weights.items():
            params[f"{name}.weight"].data[part::4].copy_(w[part::4])
            rows = slice(part * 16, part * 16 + 16)
            params[f"{name}.weight"].data[rows].copy_(w[rows])

    def run(enters):
        model, errors = Model(**shapes), []
        with LayerwiseLoader(model, device="cpu") as loader:
            threads = [threading.Thread(target=worker, args=(loader, i, errors, enters)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not errors
        return model, loader

    model, loader = run(enters=True)
    for name, w in weights.items():
        assert_quantized(model, f"{name}.weight", w)
    assert loader.report.quantized_units == 6
    with pytest.raises(IncompleteLoadError, match="in this thread"):
        run(enters=False)


def test_report_and_progress():
    """Bytes, units and shards add up; progress ends at all bytes; the text and the JSON hold the numbers."""
    model = _mixed()
    state, steps = _state(model), []
    with LayerwiseLoader(model, device="cpu", progress=lambda *step: steps.append(step)) as loader:
        _copy_all(model, state)
    report = loader.report
    assert report.bytes_in == sum(t.nbytes for t in state.values())
    assert report.bytes_in == loader.plan.bytes_in
    held = {t.untyped_storage()._cdata: t.nbytes for t in model.state_dict().values()}
    assert report.bytes_out == sum(held.values())
    assert report.shards == len(state)
    done = [step[0] for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1][1] == report.bytes_in
    assert {step[2] for step in steps} >= {"fc.weight", "experts.w13[2]", "norm.bias"}
    text = str(report)
    assert "4 weights (8 units) to FP8 per_channel on cpu" in text
    assert re.search(r"quantize \d+\.\d\d s, load \d+\.\d\d s, finish \d+\.\d\d s", text)
    assert all(seconds >= 0 for seconds in report.seconds_by_phase.values())
    assert sum(report.seconds_by_phase.values()) == pytest.approx(report.seconds)
    assert report.as_dict()["quantized_units"] == 8


def test_buffers_that_no_checkpoint_holds_are_reported():
    """A non-persistent buffer on meta is left to its owner, and named."""
    model, w = Model(fc=(6, 36)), values(6, 36)
    model.fc.register_buffer("inv_freq", torch.empty(3, device="meta"), persistent=False)
    loader = load(model, lambda params: params["fc.weight"].data.copy_(w))
    assert loader.report.rebuild == ["fc.inv_freq"] and "fc.inv_freq" in str(loader.report)
    assert model.fc.inv_freq.is_meta


def test_the_context_is_entered_once_at_a_time():
    """A loader inside itself, a worker without the context, a second load of an FP8 model: each says what is wrong."""
    model, w = Model(fc=(6, 36)), values(6, 36)
    loader = LayerwiseLoader(model, device="cpu")
    with pytest.raises(RuntimeError, match="must be entered before"), loader.worker():
        pass
    with loader:
        with pytest.raises(RuntimeError, match="entered already"):
            loader.__enter__()
        model.fc.weight.data.copy_(w)
    assert_quantized(model, "fc.weight", w)
    with pytest.raises(RuntimeError, match="is not entered, or was left already"):
        loader.__exit__(None, None, None)
    with pytest.raises((ValueError, LoadError)):
        with loader:
            model.fc.weight.data.copy_(w)
    assert_quantized(model, "fc.weight", w)


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_two_loaders_left_in_the_order_in_which_they_were_entered(fails):
    """Each sees its own model to its own end, and nothing of torch stays as they had it."""
    first, second, w = Model(fc=(6, 36)), Model(fc=(6, 36)), values(6, 36)
    loaders = [LayerwiseLoader(model, device="cpu") for model in (first, second)]
    for loader in loaders:
        loader.__enter__()
    if not fails:
        first.fc.weight.copy_(w)
    second.fc.weight[:2].copy_(w[:2])
    with pytest.raises(IncompleteLoadError) if fails else contextlib.nullcontext():
        loaders[0].__exit__(None, None, None)
    second.fc.weight[2:].copy_(w[2:])
    loaders[1].__exit__(None, None, None)
    assert_quantized(second, "fc.weight", w)
    assert first.fc.weight.is_meta if fails else first.fc.weight.dtype == torch.float8_e4m3fn
    assert not _get_current_dispatch_mode_stack() and not _get_current_function_mode_stack()
    assert not is_in_torch_dispatch_mode()


def test_schemes_by_pattern():
    """Each weight is quantized with its own scheme, and the report names them all."""
    model, w = Model(a=(7, 64), b=(7, 64)), values(7, 64)
    loader = load(
        model, lambda params: [p.data.copy_(w) for p in params.values()], "per_channel", schemes={"b": "mxfp8"}
    )
    assert_quantized(model, "a.weight", w, "per_channel")
    assert_quantized(model, "b.weight", w, "mxfp8")
    assert loader.report.scheme == "mxfp8, per_channel"


def test_no_grad_is_not_needed_beyond_the_engine_s_own():
    """Writes need what they need on real parameters: `.data`, `no_grad` or `inference_mode`; a bare copy_ raises."""
    w = values(6, 36)
    for context in (torch.no_grad, torch.inference_mode):
        model = Model(fc=(6, 36))
        with LayerwiseLoader(model, device="cpu"), context():
            model.fc.weight.copy_(w)
        assert_quantized(model, "fc.weight", w)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        load(Model(fc=(6, 36)), lambda params: params["fc.weight"][:3].copy_(w[:3]))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64])
def test_tied_weights_that_arrive_twice_in_another_precision(source):
    """What passes through is rounded as it arrives, so equal values are equal however they come; others are refused."""
    w = torch.randn(16, 36).to(source)
    for second, refused in ((w, False), (w * 2, True)):
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Embedding(16, 36, dtype=torch.bfloat16), torch.nn.Linear(36, 16))
        model[1].weight = model[0].weight
        error = pytest.raises(ConflictingShardError) if refused else contextlib.nullcontext()
        with error, LayerwiseLoader(model, device="cpu") as loader:
            model[0].weight.data.copy_(w)
            model[1].weight.data.copy_(second)
            model[1].bias.data.zero_()
        if not refused:
            assert torch.equal(model[0].weight, w.bfloat16()) and loader.report.duplicates == ["0.weight"]


@pytest.mark.parametrize("entered", [torch.no_grad, torch.inference_mode])
def test_a_load_inside_inference_mode_leaves_ordinary_tensors(entered):
    """Whatever context an engine loads in, the model can be written to and trained further outside of it."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(36, 6, dtype=torch.bfloat16), torch.nn.BatchNorm1d(6))
    w = values(6, 36)
    for options in ({}, {"reload": "transactional"}, {"reload": "streaming"}):
        with entered(), LayerwiseLoader(model, device="cpu", **options):
            for p in model.state_dict().values():
                p.copy_(w if p.ndim == 2 else torch.ones_like(p))
        assert_quantized(model, "0.weight", w)
        assert not any(t.is_inference() for t in model.state_dict(keep_vars=True).values())
        assert model[1].weight.requires_grad and model[1].running_mean.add_(1).tolist() == [2] * 6


def test_a_long_load_does_not_grow():
    """What is kept of a shard does not depend on how many came before: thousands of shards, duplicates included,
    leave no Python objects but the report's lines."""
    model, row = Model(fc=(2048, 8)), values(1, 8)
    with LayerwiseLoader(model, device="cpu") as loader:
        p = model.fc.weight.data
        for i in range(64):
            p[i : i + 1].copy_(row)
        gc.collect()
        before = len(gc.get_objects())
        for i in range(64, 2048):
            p[i : i + 1].copy_(row)
        gc.collect()
        assert len(gc.get_objects()) - before < 50
        assert loader.report.shards == 2048


def test_cpu_offloaded_parameter():
    """What `offload` names is on the CPU in the end; a pattern that matches nothing is an error, and a reload leaves
    devices alone."""
    model, w = Model(fc=(6, 36), fc2=(6, 36)), values(6, 36)
    with LayerwiseLoader(model, device="cpu", offload=["fc"]):
        for p in model.parameters():
            p.data.copy_(w)
    assert_quantized(model, "fc.weight", w)
    with pytest.raises(UnmatchedPatternError, match="'nothing' of `offload`"):
        _ = LayerwiseLoader(Model(fc=(6, 36)), device="cpu", offload=["nothing"]).plan
    with pytest.raises(ValueError, match="a reload keeps"):
        LayerwiseLoader(model, reload="streaming", offload=["fc"])
