"""Whatever fails, wherever: the model as it was, its memory returned, and the next load succeeds."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8_kernels.errors import ConflictingShardError, IncompleteLoadError, LoadError, NonFiniteWeightError
from fp8_kernels.loading import LayerwiseLoader

from .helpers import Model, assert_quantized, values


class FailAt(TorchDispatchMode):
    """Raises at the n-th op that reaches real memory; remembers the memory that ops allocate."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.count, self.storages = at, error, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        try:
            result = func(*args, **(kwargs or {}))
        except BaseException:
            args = None  # this frame is not the loader's to clear
            raise
        if isinstance(result, torch.Tensor) and not result.is_meta:
            storage = result.untyped_storage()
            if all(storage._cdata != t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)):
                self.storages[storage._cdata] = weakref.ref(storage)
        return result


def _engine(model, weights, write=torch.Tensor.copy_):
    """Halves of linears, experts one by one, a bias."""
    write(model.fc.weight.data[:64], weights["fc"][:64])
    for i in range(3):
        write(model.experts.weight.data[i], weights["experts"][i])
    write(model.fc.weight.data[64:], weights["fc"][64:])
    write(model.norm.weight.data, weights["norm"])


def _build():
    return Model(fc=(130, 260), experts=(3, 40, 36), norm=(36,))


def _weights():
    return {"fc": values(130, 260), "experts": values(3, 40, 36), "norm": values(36)}


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()], ids=["oom", "ctrl-c"])
def test_a_first_load_that_fails_at_any_op_leaves_the_model_on_meta(scheme, error):
    """Out of memory while staging, while allocating the result, in a kernel, at the end; or Ctrl-C there: every op
    fails in turn. The parameters are the same objects on meta, without scales; then the same model loads."""
    model, weights = _build(), _weights()
    objects = dict(model.named_parameters())

    def attempt(at):
        with FailAt(at, error) as mode, LayerwiseLoader(model, scheme, device="cpu"):
            _engine(model, weights)
        return mode.count

    at = 0
    while True:
        at += 1
        try:
            count = attempt(at)
            break
        except type(error):
            held = dict(model.named_parameters())
            assert held.keys() == objects.keys() and all(held[name] is p for name, p in objects.items())
            assert all(p.is_meta and p.dtype == torch.bfloat16 for p in held.values())
    assert 30 < at and count < at
    for name in ("fc", "experts"):
        assert_quantized(model, f"{name}.weight", weights[name], scheme)


def _kinds():
    weights = _weights()
    nan = {**weights, "fc": weights["fc"].clone()}
    nan["fc"][7, 7] = float("nan")

    def conflict(model):
        _engine(model, weights)
        model.fc.weight.data[:64].copy_(weights["fc"][:64] * 2)
        model.experts.weight.data[0].copy_(weights["experts"][0] * 2)

    def file_ends(model):
        model.fc.weight.data[:64].copy_(weights["fc"][:64])
        model.experts.weight.data[1, 3:].copy_(weights["experts"][1, 3:])
        raise EOFError("the file ends early")

    def swallowed(model):
        try:
            model.fc.weight.data.copy_(torch.zeros(130, 260, dtype=torch.int32))
        except LoadError:
            pass
        _engine(model, weights)

    return {
        "a loader raises": (file_ends, EOFError),
        "conflict": (conflict, ConflictingShardError),
        "incomplete": (lambda model: model.fc.weight.data[:64].copy_(weights["fc"][:64]), IncompleteLoadError),
        "nan": (lambda model: _engine(model, nan), NonFiniteWeightError),
        "swallowed by the engine": (swallowed, LoadError),
        "wrong shape": (lambda model: model.fc.weight.data.copy_(weights["experts"]), RuntimeError),
    }


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block"])
@pytest.mark.parametrize("retries", [False, True])
def test_a_failure_that_the_engine_swallows_loses_nothing(retries, scheme):
    """An engine that goes on after an error, or tries once more, gets every byte or an error at the end: what failed
    may have been an earlier shard, on its way into the result."""
    weights, at, refused = _weights(), 0, 0
    while True:
        at += 1
        model, mode = _build(), FailAt(at, RuntimeError("injected"))

        def write(p, w):
            for _ in range(2):
                try:
                    p.copy_(w)
                    return
                except RuntimeError:
                    if not retries:
                        return

        try:
            with mode, LayerwiseLoader(model, scheme, device="cpu"):
                _engine(model, weights, write)
        except (LoadError, RuntimeError):
            refused += 1
            assert all(p.is_meta for p in model.parameters())
            continue
        for name in ("fc", "experts"):
            assert_quantized(model, f"{name}.weight", weights[name], scheme)
        assert torch.equal(model.norm.weight, weights["norm"])
        if mode.count < at:
            break
    assert refused > 5


@pytest.mark.parametrize("written", [False, True])
def test_whether_a_gradient_is_needed_comes_back_too(written):
    """Engines freeze a model before they fill it."""
    model = _build()
    with pytest.raises(ZeroDivisionError), LayerwiseLoader(model, device="cpu"):
        model.requires_grad_(False)
        if written:
            _engine(model, _weights())
        raise ZeroDivisionError
    assert all(p.requires_grad and p.is_meta and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("ignored", [False, True])
def test_a_module_that_is_replaced_while_it_loads(ignored):
    """What arrived is in the old one: the model would serve the new one, in high precision or with any values."""
    model, w = Model(a=(6, 36), b=(6, 36)), values(6, 36)
    with pytest.raises(LoadError, match="`a.weight` is that of another module now"):
        with LayerwiseLoader(model, device="cpu", ignore=["a"] if ignored else []):
            model.a.weight.data.copy_(w)
            model.b.weight.data.copy_(w)
            model.a = Model(device="cpu", a=(6, 36)).a
    kept = Model(a=(6, 36), b=(6, 36))
    with LayerwiseLoader(kept, device="cpu"):  # around the same module, or none at all in its place
        kept.a.weight.data.copy_(w)
        kept.b.weight.data.copy_(w)
        kept.a, module = torch.nn.Sequential(kept.a), kept.b
        del kept.b
    assert kept.a[0].weight.dtype == module.weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("hook", ["on_unit", "on_module", "progress"])
def test_a_hook_that_fails_is_not_forgotten(hook):
    """It is called once, so a load in which the engine swallowed its error has not done what it says."""
    model, weights, calls = _build(), _weights(), []

    def fails(*args):
        calls.append(args)
        if len(calls) == 1:
            raise ZeroDivisionError

    def write(p, w):
        for _ in range(2):
            with contextlib.suppress(ZeroDivisionError):
                p.copy_(w)

    with pytest.raises(ZeroDivisionError), LayerwiseLoader(model, device="cpu", **{hook: fails}):
        _engine(model, weights, write)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("kind", _kinds())
def test_memory_returns_while_the_exception_is_kept(kind):
    """With the garbage collector off and the exception in hand, as a debugger keeps it, nothing that the load
    allocated is alive."""
    loading, error = _kinds()[kind]
    model = _build()
    mode = FailAt(None, None)

    def attempt():
        with mode, LayerwiseLoader(model, "per_tensor", device="cpu", on_module=lambda module: None):
            loading(model)

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(error) as kept:
            attempt()
        alive = [ref for ref in mode.storages.values() if ref() is not None]
        assert kept.value.__traceback__ is not None and mode.storages
        assert not alive
    finally:
        gc.enable()
    assert all(p.is_meta for p in model.parameters())
