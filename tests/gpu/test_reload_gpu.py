"""Reloads on a CUDA device: graphs replay with the new weights, nothing moves, failures change nothing."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fp8_kernels as fk
from fp8_kernels.loading import LayerwiseLoader

from ..loading.helpers import SCHEMES, Model, assert_quantized, values

pytestmark = pytest.mark.gpu

SLACK = 4 << 20  # the allocator's rounding, and small tensors
SIZES = (256, 512, 128)  # hidden sizes that FP8 matrix units take


def build():
    with torch.device("meta"):
        return nn.Sequential(
            nn.Linear(SIZES[0], SIZES[1], dtype=torch.bfloat16),
            nn.LayerNorm(SIZES[1], dtype=torch.bfloat16),
            nn.Linear(SIZES[1], SIZES[2], bias=False, dtype=torch.bfloat16),
        )


def new_state(seed):
    torch.manual_seed(seed)
    return {name: values(*t.shape) for name, t in build().state_dict().items()}


def copy_in(model, state, source="cpu"):
    """An engine's loader; `bucket` is a device buffer that every tensor passes through and that is then spoilt."""
    params = dict(model.named_parameters())
    bucket = torch.empty(SIZES[0] * SIZES[1], dtype=torch.bfloat16, device="cuda") if source == "bucket" else None
    for name, w in state.items():
        if source == "bucket":
            w = bucket[: w.numel()].view(w.shape).copy_(w)
        elif source == "pinned":
            w = w.pin_memory()
        params[name].data.copy_(w if source in ("bucket", "pinned") else w.to(source))
        if bucket is not None:
            bucket.fill_(float("nan"))


def loaded(scheme, seed=1):
    model = build()
    with LayerwiseLoader(model, scheme, device="cuda"):
        copy_in(model, new_state(seed))
    return fk.make_runnable(model, schemes=scheme)


class Captured:
    """A model's forward as a CUDA graph."""

    def __init__(self, model):
        self.x = torch.randn(32, SIZES[0], device="cuda", dtype=torch.bfloat16)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            model(self.x)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.y = model(self.x)

    def replay(self):
        self.graph.replay()
        torch.cuda.synchronize()
        return self.y.clone()


def pointers(model):
    return {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("source", ["cpu", "pinned", "cuda", "bucket"])
@pytest.mark.parametrize("mode", ["transactional", "streaming"])
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block"])
def test_a_captured_graph_replays_with_the_new_weights(scheme, mode, source):
    """No address changes, and the graph computes what a model that was loaded with the new weights computes."""
    model = loaded(scheme)
    captured, before = Captured(model), pointers(model)
    first = captured.replay()
    with LayerwiseLoader(model, reload=mode) as loader:
        assert loader.device.type == "cuda"
        copy_in(model, new_state(2), source)
    assert pointers(model) == before
    with torch.no_grad():
        wanted = loaded(scheme, seed=2)(captured.x)
    assert torch.equal(captured.replay(), wanted) and not torch.equal(wanted, first)


class FailAt(TorchDispatchMode):
    def __init__(self, at):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise RuntimeError("injected")
        return func(*args, **(kwargs or {}))


def test_a_transaction_that_fails_at_any_op_leaves_what_the_graph_computes():
    """Each op of a reload fails in turn, its commit's too: the graph's outputs and all addresses stay; then the same
    model reloads."""
    model = loaded("per_tensor")
    captured, before, state = Captured(model), pointers(model), new_state(2)
    first, at = captured.replay(), 0
    while True:
        at += 1
        mode = FailAt(at)
        try:
            with mode, LayerwiseLoader(model, reload="transactional"):
                copy_in(model, state)
            break
        except RuntimeError as error:
            assert "injected" in str(error)
        assert torch.equal(captured.replay(), first) and pointers(model) == before
    assert mode.count < at and at > 60
    assert not torch.equal(captured.replay(), first) and pointers(model) == before


def allocated():
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("mode", ["transactional", "streaming"])
def test_memory_of_a_reload(mode):
    """A streaming reload takes two units; a transaction the new codes too; both give all of it back."""
    shapes, shard = {f"fc{i}": (2048, 2048) for i in range(8)}, values(512, 2048)
    unit = 2048 * 2048 * 2
    model = Model(**shapes)
    for options in ({"scheme": "per_tensor", "device": "cuda"}, {"reload": mode}):
        before = allocated()
        with LayerwiseLoader(model, **options) as loader:
            for p in model.parameters():
                for start in range(0, 2048, 512):
                    p.data[start : start + 512].copy_(shard)
    assert allocated() == before
    codes = 8 * 2048 * 2048 if mode == "transactional" else 0
    assert loader.report.peak_allocated - before <= codes + 2 * unit + SLACK + (16 << 20)


def _fill_up(total):
    """Tensors in all that the allocator holds and nobody uses, as tests before this one may have left it: memory runs
    out when the driver gives no more."""
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    held, size = [], 1 << 30
    while size >= 512:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return held


@pytest.mark.parametrize("room", [8 << 20, 40 << 20, 256 << 20], ids=["staging", "result", "in the middle"])
@pytest.mark.parametrize("mode", [None, "transactional"])
def test_out_of_memory_leaves_the_model_and_the_memory_as_they_were(mode, room):
    """The device really runs out, for the first staging buffer, for the first result or in the middle of a load: with
    the exception still in hand and no garbage collected, the model is as it was and the allocator holds what it held;
    then the load succeeds."""
    model, w = Model(**{f"fc{i}": (4096, 4096) for i in range(24)}), values(4096, 4096)
    options = {"scheme": "per_tensor", "device": "cuda"} if mode is None else {"reload": mode}

    def load(**options):
        with LayerwiseLoader(model, **options):
            for p in dict(model.named_parameters()).values():
                p.data.copy_(w)

    if mode is not None:
        load(scheme="per_tensor", device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    filler = _fill_up(total)
    before = allocated()
    held = [(id(p), p.device, None if p.is_meta else p.data_ptr()) for p in model.parameters()]
    gc.disable()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        with pytest.raises(torch.OutOfMemoryError) as kept:
            load(**options)
        assert allocated() == before and kept.value.__traceback__ is not None
    finally:
        gc.enable()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert held == [(id(p), p.device, None if p.is_meta else p.data_ptr()) for p in model.parameters()]
    del kept, filler
    load(**options)
    assert_quantized(model, "fc23.weight", w.cuda(), "per_tensor")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_offloaded_parameter(scheme):
    """Quantized on the device, kept on the host, to the same bits; duplicates are verified, and a reload streams."""
    model = Model(near=(130, 260), far=(130, 260), experts=(3, 40, 64))
    w, experts = values(2, 130, 260), values(3, 40, 64)
    for i, options in enumerate(({"scheme": scheme, "device": "cuda", "offload": ["far", "experts"]}, {})):
        options = options or {"reload": "streaming"}
        with LayerwiseLoader(model, **options) as loader:
            model.far.weight.data.copy_(w[i])
            model.experts.weight.data.copy_(experts)
            model.near.weight.data.copy_(w[i].cuda())
            model.far.weight.data[3:70].copy_(w[i, 3:70])
        assert loader.device.type == "cuda" and loader.report.duplicates
        assert model.far.weight.device.type == model.experts.weight_scale.device.type == "cpu"
        assert model.near.weight.is_cuda
        for name, wanted in (("far", w[i]), ("near", w[i]), ("experts", experts)):
            assert_quantized(model, f"{name}.weight", wanted, scheme)


def test_dummy_load_costs_what_a_load_costs():
    """Generated weights: the FP8 model and two units."""
    model = Model(**{f"fc{i}": (2048, 2048) for i in range(8)})
    before = allocated()
    with LayerwiseLoader(model, "per_tensor", device="cuda") as loader:
        loader.fill_dummy()
    resident = allocated() - before
    assert loader.report.peak_allocated - before <= resident + 2 * 2048 * 2048 * 2 + SLACK
    assert model.fc7.weight_scale.item() == pytest.approx(2048**-0.5 / 448, rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_thread_without_current_device():
    """A worker thread whose current device is another one than the load's: kernels and hooks run on the load's."""
    model, w, seen = Model(fc=(1025, 576), fc2=(130, 260)), (values(1025, 576), values(130, 260)), []
    on_unit = lambda unit, q, scale: seen.append((torch.cuda.current_device(), q.device.index))  # noqa: E731

    def work(loader):
        assert torch.cuda.current_device() == 0
        with loader.worker():
            for p, source in zip(model.parameters(), w, strict=True):
                for start in range(0, len(source), 100):
                    p.data[start : start + 100].copy_(source[start : start + 100])

    with LayerwiseLoader(model, "per_block", device="cuda:1", on_unit=on_unit) as loader:
        thread = threading.Thread(target=work, args=(loader,))
        thread.start()
        thread.join()
    assert seen == [(1, 1), (1, 1)]
    assert_quantized(model, "fc.weight", w[0].to("cuda:1"), "per_block")
    assert_quantized(model, "fc2.weight", w[1].to("cuda:1"), "per_block")
