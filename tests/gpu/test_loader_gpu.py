"""The loader on a CUDA device: the bits of the CPU load, and the memory bound as the allocator measures it."""

import gc

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels.errors import ConflictingShardError, IncompleteLoadError, NonFiniteWeightError
from fp8_kernels.loading import LayerwiseLoader, arrivals

from ..loading.helpers import SCHEMES, Model, assert_quantized, values

pytestmark = pytest.mark.gpu

# Per shard and per unit the allocator rounds up to 512 bytes and 2 MiB blocks, and scales are small tensors.
SLACK = 4 << 20


def _allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("source", ["cpu", "pinned", "cuda"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_to_quantizing_the_whole_weight(scheme, source):
    """Linears in shards and experts one by one, from host, pinned and device memory: the bytes of `quantize`."""
    model = Model(fc=(1025, 576), experts=(3, 272, 160))
    w, experts = values(1025, 576), values(3, 272, 160)

    def moved(t):
        return t.pin_memory() if source == "pinned" else t.to(source)

    with LayerwiseLoader(model, scheme, device="cuda") as loader:
        p = model.fc.weight.data
        for start in range(0, 1025, 205):
            p[start : start + 205].copy_(moved(w[start : start + 205]))
        for i in range(3):
            model.experts.weight.data[i].narrow(0, 136, 136).copy_(moved(experts[i, 136:]))
            model.experts.weight.data[i].narrow(0, 0, 136).copy_(moved(experts[i, :136]))
    for name, wanted in (("fc.weight", w), ("experts.weight", experts)):
        assert model.get_parameter(name).is_cuda
        assert_quantized(model, name, wanted.cuda(), scheme)
        reference = fk.quantize(wanted, scheme)[0]
        assert torch.equal(model.get_parameter(name).view(torch.uint8).cpu(), reference.view(torch.uint8))
    assert loader.report.peak_allocated >= loader.report.resident


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sixteen_linears_peak_at_resident_and_two_units(scheme):
    """What the allocator saw at most, over the whole load including its end, is the FP8 model and two units."""
    num_rows, num_cols, row = 2048, 2048, 512
    unit = num_rows * num_cols * 2
    model = Model(**{f"fc{i}": (num_rows, num_cols) for i in range(16)})
    shard = values(row, num_cols)
    fk.quantize(shard.cuda(), scheme)  # compile and load kernels beforehand
    before = _allocated()
    with LayerwiseLoader(model, scheme, device="cuda") as loader:
        for p in model.parameters():
            for start in range(0, num_rows, row):
                p.data[start : start + row].copy_(shard)
    resident = _allocated() - before
    peak = loader.report.peak_allocated - before
    assert resident <= loader.plan.resident + SLACK
    assert peak <= resident + 2 * unit + SLACK
    assert loader.report.peak_staging_bytes <= 2 * unit


@pytest.mark.parametrize("source", ["cpu", "cuda"])
def test_segments(source):
    """A scale for each part of a fused weight, of parts that arrive in any order: the bytes of the CPU."""
    model, w, scheme = Model(qkv=(1100, 576)), values(1100, 576), fk.PerTensor((1000, 36, 64))
    with LayerwiseLoader(model, "per_tensor", device="cuda", segments={"qkv": scheme.segments}):
        for start, end in ((1036, 1100), (0, 500), (500, 1036)):
            model.qkv.weight.data[start:end].copy_(w[start:end].to(source))
    assert_quantized(model, "qkv.weight", w, scheme)


@pytest.mark.parametrize("source", ["cpu", "cuda", "mixed"])
def test_maxima_that_come_with_the_shards(source, monkeypatch):
    """A large unit with one scale: the bytes of the whole, where its maximum came with the copies and where not."""
    monkeypatch.setattr(arrivals, "ACCUMULATE_BYTES", 1 << 20)
    model, w = Model(fc=(1025, 1000)), values(1025, 1000)
    with LayerwiseLoader(model, "per_tensor", device="cuda"):
        for i, start in enumerate((1000, 0, 500)):
            shard = w[start : start + 500] if start < 1000 else w[start:]
            on_device = source == "cuda" or (source == "mixed" and i)
            model.fc.weight.data[start : start + 500].copy_(shard.cuda() if on_device else shard)
    assert_quantized(model, "fc.weight", w, "per_tensor")


def test_a_failed_load_gives_all_memory_back():
    """After an exception the device holds what it held before."""
    model = Model(**{f"fc{i}": (1024, 1024) for i in range(4)})
    shard = values(1024, 1024)
    before = _allocated()

    def attempt():
        with LayerwiseLoader(model, device="cuda", on_module=lambda module: None):
            for name, p in model.named_parameters():
                p.data[: 1024 if name != "fc3.weight" else 512].copy_(shard[: 1024 if name != "fc3.weight" else 512])

    with pytest.raises(IncompleteLoadError, match="fc3.weight: rows 512:1024"):
        attempt()
    assert _allocated() == before
    assert all(p.is_meta for p in model.parameters())


def test_checks_work_on_the_device():
    """Duplicates are verified, conflicts and NaN refused, partial writes recorded, where the mask is on the device
    and the engine's indices are on the host."""
    w = values(130, 260)

    def run(last):
        model = Model(fc=(130, 260), fc2=(3, 5))
        with LayerwiseLoader(model, "per_block", device="cuda") as loader:
            p = model.fc.weight.data
            p.index_copy_(0, torch.arange(0, 130, 2), w[::2])
            p[1::2].copy_(w[1::2])
            assert p[7].tolist() == w[7].tolist()
            model.fc2.weight.data.copy_(last)
            p[[3, 5]] = w[[3, 5]]
            p.copy_(w)
        return model, loader

    model, loader = run(values(3, 5))
    assert_quantized(model, "fc.weight", w.cuda(), "per_block")
    assert len(loader.report.duplicates) == 2
    with pytest.raises(NonFiniteWeightError, match="1 weights hold NaN or Inf: fc2.weight"):
        run(torch.full((3, 5), float("inf")).bfloat16())
    model = Model(fc=(130, 260), fc2=(3, 5))
    with pytest.raises(ConflictingShardError, match="fc.weight rows 9:10"), LayerwiseLoader(model, device="cuda"):
        model.fc.weight.data.copy_(w)
        model.fc2.weight.data.zero_()
        model.fc.weight.data[9:10].copy_(w[9:10] * 2)


def test_another_current_device_stream():
    """Work on a side stream, and data that is reused there at once, gives the same bytes."""
    model, w = Model(fc=(1024, 576), fc2=(1024, 576)), values(1024, 576)
    source, buffer = w.cuda(), torch.empty(1024, 576, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), LayerwiseLoader(model, device="cuda"):
        for p in model.parameters():
            buffer.copy_(source)
            p.data.copy_(buffer)
            buffer.fill_(float("nan"))
    torch.cuda.synchronize()
    assert_quantized(model, "fc.weight", source)
    assert_quantized(model, "fc2.weight", source)


def test_the_driver_is_asked_once_for_the_memory_of_a_model():
    """And once for a table that stays as it is, too large to lie between what becomes FP8."""
    model = Model(embed_tokens=(200_000, 1024), **{f"fc{i}": (3000, 4096) for i in range(20)})
    shard = torch.randn(3000, 4096, dtype=torch.bfloat16, device="cuda")
    fk.quantize(shard)
    _allocated()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    with LayerwiseLoader(model, device="cuda"):
        model.embed_tokens.weight.data.fill_(1)
        for i in range(20):
            model.get_parameter(f"fc{i}.weight").data.copy_(shard)
    assert torch.cuda.memory_stats()["num_device_alloc"] - before <= 6  # scales, and where shards wait
    assert_quantized(model, "fc7.weight", shard)
