"""Weights that several threads load at once."""

import random
import threading

import pytest
import torch

from fp8_kernels.errors import LoadError
from fp8_kernels.loading import LayerwiseLoader

from .helpers import SCHEMES, Model, assert_quantized, values

NUM_THREADS = 8
SHAPES = {"fc": (257, 96), "qkv": (130, 260), "experts": (6, 40, 64)}


def _shards():
    """Small rectangles of every weight, in random order: (name, expert, rows, columns)."""
    shards = []
    for name, (*experts, num_rows, num_cols) in SHAPES.items():
        for expert in range(experts[0]) if experts else [None]:
            rows = sorted({0, num_rows, *random.sample(range(num_rows), 12)})
            columns = sorted({0, num_cols, *random.sample(range(num_cols), 3)})
            shards += [
                (name, expert, slice(r0, r1), slice(c0, c1))
                for r0, r1 in zip(rows, rows[1:], strict=False)
                for c0, c1 in zip(columns, columns[1:], strict=False)
            ]
    random.shuffle(shards)
    return shards


def _run(loader, weights, parts):
    """Each thread loads its part inside a worker; returns the errors."""
    errors, params = [], dict(loader.model.named_parameters())
    together = threading.Barrier(len(parts))

    def work(part):
        try:
            with loader.worker():
                together.wait()
                for name, expert, rows, columns in part:
                    p, w = params[f"{name}.weight"].data, weights[name]
                    p, w = (p, w) if expert is None else (p[expert], w[expert])
                    p[rows, columns].copy_(w[rows, columns])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_concurrent_shards_of_one_unit(scheme):
    """Eight threads, hundreds of small shards of the same units in random order, a third of them sent twice: each unit
    is finished once, with the bytes of quantizing the whole weight."""
    weights = {name: values(*shape) for name, shape in SHAPES.items()}
    for _ in range(3):
        shards, model, finished = _shards(), Model(**SHAPES), []
        again = random.sample(shards, len(shards) // 3)
        parts = [shards[i::NUM_THREADS] + again[i::NUM_THREADS] for i in range(NUM_THREADS)]
        on_unit = lambda unit, q, scale, finished=finished: finished.append(str(unit))  # noqa: E731
        with LayerwiseLoader(model, scheme, device="cpu", on_unit=on_unit) as loader:
            assert not _run(loader, weights, parts)
        assert sorted(finished) == sorted(["fc.weight", "qkv.weight", *(f"experts.weight[{i}]" for i in range(6))])
        for name, w in weights.items():
            assert_quantized(model, f"{name}.weight", w, scheme)
        assert loader.report.shards == len(shards) + len(again) and not loader.report.rewrites
        assert loader.report.quantized_units == 8


def test_modules_complete_once_though_threads_finish_them_together():
    """`on_module` fires once a module, on whichever thread finishes it, and its tensors are installed by then."""
    names = [f"m{i}" for i in range(12)]
    model, done = Model(**{name: (33, 64) for name in names}), []
    weights = {name: values(33, 64) for name in names}

    def on_module(module):
        assert module.weight.dtype == torch.float8_e4m3fn
        done.append(module)

    shards = [(name, None, slice(r, r + 3), slice(None)) for name in names for r in range(0, 33, 3)]
    random.shuffle(shards)
    with LayerwiseLoader(model, device="cpu", on_module=on_module) as loader:
        assert not _run(loader, weights, [shards[i::NUM_THREADS] for i in range(NUM_THREADS)])
    assert sorted(map(id, done)) == sorted(map(id, model.children()))
    for name in names:
        assert_quantized(model, f"{name}.weight", weights[name])


def test_an_error_in_one_thread_fails_the_load():
    """A thread whose error the engine drops still cannot make a load look complete."""
    weights = {name: values(*shape) for name, shape in SHAPES.items()}
    wrong = {**weights, "fc": weights["fc"].to(torch.int32)}
    model, shards = Model(**SHAPES), _shards()
    with pytest.raises(LoadError, match="fc.weight` must be loaded from floating-point data, got torch.int32"):
        with LayerwiseLoader(model, device="cpu") as loader:
            parts = [shards[i::2] for i in range(2)]
            assert _run(loader, wrong, parts)
            _run(loader, weights, parts)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("mode", ["transactional", "streaming"])
def test_threads_reload(mode):
    """Several threads load new weights over an FP8 model, at the old addresses."""
    model, old, new = Model(**SHAPES), *({name: values(*s) for name, s in SHAPES.items()} for _ in range(2))
    with LayerwiseLoader(model, device="cpu") as loader:
        assert not _run(loader, old, [_shards()])
    pointers = [p.data_ptr() for p in model.parameters()]
    shards = _shards()
    with LayerwiseLoader(model, reload=mode) as loader:
        assert not _run(loader, new, [shards[i::NUM_THREADS] for i in range(NUM_THREADS)])
    assert pointers == [p.data_ptr() for p in model.parameters()]
    for name, w in new.items():
        assert_quantized(model, f"{name}.weight", w)
