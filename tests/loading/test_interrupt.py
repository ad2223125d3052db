"""Ctrl-C between any two statements of a load: the model as it was or as it should be, and torch left alone."""

import linecache
import random
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fp8_kernels import loading
from fp8_kernels.errors import PoisonedModelError
from fp8_kernels.loading import LayerwiseLoader
from fp8_kernels.loading.install import uninterrupted

from .helpers import Model, assert_quantized, values

FOLDER = str(Path(loading.__file__).parent)
# Python itself leaves such a gap between a block and what is to follow it: around `with`, before what `finally` calls.
GAPS = {LayerwiseLoader.__enter__.__code__, LayerwiseLoader.__exit__.__code__, uninterrupted.__code__}
SAMPLES = 150  # of the thousands of statements that a load runs


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line of the loading package; counts lines."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._called)

    def __exit__(self, *exc):
        sys.settrace(self.before)

    def _called(self, frame, event, arg):
        code = frame.f_code
        return self._line if code.co_filename.startswith(FOLDER) and code not in GAPS else None

    def _line(self, frame, event, arg):
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and "uninterrupted(" not in line and "with torch.no_grad():" not in line:  # gaps too
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._line


def _weights():
    return {"fc": values(64, 96), "experts": values(3, 40, 96), "norm": values(96)}


def _load(model, weights, interrupt, **options):
    """Halves of a matrix, experts, a write in place and a vector; the loader is left inside of `interrupt`."""
    with interrupt, LayerwiseLoader(model, **options):
        model.fc.weight.data[:32].copy_(weights["fc"][:32])
        for i in range(3):
            model.experts.weight.data[i].copy_(weights["experts"][i])
        model.experts.weight.data[2].mul_(1)
        model.fc.weight.data[32:].copy_(weights["fc"][32:])
        model.norm.weight.data.copy_(weights["norm"])


def _is_loaded(model, weights, scheme):
    try:
        assert_quantized(model, "fc.weight", weights["fc"], scheme)
        assert_quantized(model, "experts.weight", weights["experts"], scheme)
        return torch.equal(model.norm.weight, weights["norm"])
    except (AssertionError, AttributeError):
        return False


def _points(count):
    """Every stretch of a load is hit; which line of it, differs from run to run of the test's seed."""
    step = max(count // SAMPLES, 1)
    return [start + random.randrange(step) for start in range(1, count + 1, step)]


def _assert_torch_is_left_alone():
    assert not _get_current_dispatch_mode_stack() and not _get_current_function_mode_stack()
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
def test_a_first_load(scheme):
    """The parameters are on meta, the same objects, without scales; or, where it came after everything was installed,
    the model is loaded. Then it loads."""
    model, weights = Model(fc=(64, 96), experts=(3, 40, 96), norm=(96,)), _weights()
    objects = dict(model.named_parameters())
    counting = Interrupt(None)
    _load(Model(fc=(64, 96), experts=(3, 40, 96), norm=(96,)), weights, counting, scheme=scheme, device="cpu")
    assert counting.count > 1_000
    for at in _points(counting.count):
        try:
            _load(model, weights, Interrupt(at), scheme=scheme, device="cpu")
        except KeyboardInterrupt:
            pass
        _assert_torch_is_left_alone()
        held = dict(model.named_parameters())
        if held.keys() != objects.keys():
            assert _is_loaded(model, weights, scheme), f"half loaded after line {at} of {counting.count}"
            model = Model(fc=(64, 96), experts=(3, 40, 96), norm=(96,))
            objects = dict(model.named_parameters())
        else:
            assert all(held[name] is p and p.is_meta for name, p in objects.items())
    _load(model, weights, Interrupt(None), scheme=scheme, device="cpu")
    assert _is_loaded(model, weights, scheme)


@pytest.mark.parametrize("mode", ["transactional", "streaming"])
def test_a_reload(mode):
    """A transaction leaves all old or all new weights at their addresses; a streaming reload that has begun to write
    marks the model. Then it reloads."""
    model, old, new = Model(fc=(64, 96), experts=(3, 40, 96), norm=(96,)), _weights(), _weights()
    _load(model, old, Interrupt(None), scheme="per_channel", device="cpu")
    addresses = {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    counting = Interrupt(None)
    _load(model, old, counting, reload=mode)
    marked = 0
    for at in _points(counting.count):
        try:
            _load(model, new, Interrupt(at), reload=mode)
        except KeyboardInterrupt:
            pass
        _assert_torch_is_left_alone()
        assert addresses == {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
        states = [_is_loaded(model, w, "per_channel") for w in (old, new)]
        if mode == "transactional" or any(states):
            assert any(states), f"half loaded after line {at} of {counting.count}"
        else:
            with pytest.raises(PoisonedModelError):
                _ = LayerwiseLoader(model, device="cpu").plan
            marked += 1
        _load(model, old, Interrupt(None), reload=mode)
        assert _is_loaded(model, old, "per_channel")
    assert (marked > 10) == (mode == "streaming")
