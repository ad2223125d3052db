"""Loads by spans on a CUDA device: the bytes of the slow way, nothing left behind by failures, kills and many loads."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import fp8_kernels as fk
from fp8_kernels import wire
from fp8_kernels.checkpoint import open_checkpoint
from fp8_kernels.errors import CheckpointError, LoadError
from fp8_kernels.loading import engine, feed, transfer
from fp8_kernels.loading.transfer import Options, Span, Transfer

from ..loading.helpers import SCHEMES, Model, assert_quantized, values

pytestmark = pytest.mark.gpu

MB = 1 << 20
OPTIONS = Options(num_threads=6, chunk_bytes=1 * MB, num_slots=8)
ALONE = "PYTEST_XDIST_WORKER" not in os.environ  # else other workers take memory of the same device meanwhile


@pytest.fixture(params=["native", "python"])
def engine_name(request, monkeypatch):
    """Both engines; the C++ one where it was built."""
    if request.param == "python":
        monkeypatch.setattr(transfer, "native", lambda: None)
    elif engine.native() is None:
        pytest.skip("the CPU extension was not built")
    return request.param


@pytest.fixture
def file(tmp_path):
    """(path, its bytes on the device)."""
    data = torch.randint(0, 256, (100 * MB + 777,), dtype=torch.uint8)
    data.numpy().tofile(tmp_path / "data.bin")
    return str(tmp_path / "data.bin"), data.cuda()


def shapes():
    """Weights larger and smaller than a span, experts whose halves share a scale, odd rows, vectors, a table."""
    return {
        "embed_tokens": (3000, 512),
        "fc": (1025, 576),
        "down": (576, 1030),
        "tall": (20_000, 576),
        "experts": (6, 256, 512),
    }


def checkpoint(folder):
    """The folder and its tensors; experts one by one, gate and up apart."""
    state = {f"{name}.weight": values(*shape) for name, shape in shapes().items()}
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    return state


def _allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("size", [(1, 3 * MB), (700_000, 1_300_000), (9 * MB, 33 * MB)])
def test_every_byte_arrives_and_stays_while_it_is_used(engine_name, file, size):
    """Spans below and above a slot and a ring; each is used by a kernel that starts late."""
    path, data = file
    spans_, offset = [], 0
    while offset < len(data):
        num_bytes = min(int(torch.randint(*size, ())), len(data) - offset)
        spans_.append(Span(path, offset, num_bytes))
        offset += num_bytes
    parts = []
    with Transfer("cuda", OPTIONS, ring_bytes=16 * MB) as moving:
        for span, memory in moving.start(spans_):
            torch.cuda._sleep(200_000)
            parts.append(memory.view(0, torch.uint8, (span.num_bytes,)).clone())
    assert torch.equal(torch.cat(parts), data)


def test_host_tensors_and_files_straight_to_where_they_stay(engine_name, file):
    """Enqueued before what used that memory has ended, and used at once."""
    path, data = file
    sources = [torch.randn(n) for n in (1, 1000, 3_000_001)]
    targets = [torch.empty(n, device="cuda") for n in (1, 1000, 3_000_001)]
    whole = torch.empty_like(data)
    with Transfer("cuda", OPTIONS) as moving:
        torch.cuda._sleep(10_000_000)
        before = [t.fill_(7).clone() for t in targets]
        sent = [moving.send(to, source) for to, source in zip(targets, sources, strict=True)]
        fetched = moving.fetch(Span(path, 0, len(data)), whole)
        for number in sent:
            moving.wait(number)
        after = [t.clone() for t in targets]
        moving.wait(fetched)
        copied = whole.clone()
    assert torch.equal(copied, data)
    for was, now, source in zip(before, after, sources, strict=True):
        assert bool((was == 7).all()) and torch.equal(now.cpu(), source)


@pytest.mark.parametrize("early", [1, 1 << 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_to_quantizing_each_weight(scheme, early, tmp_path, monkeypatch):
    """And to the load of one mapped tensor after the other; tables arrive where they stay, or as all others do."""
    monkeypatch.setattr(wire, "_EARLY_BYTES", early)
    monkeypatch.setattr(wire, "_AHEAD_BYTES", 4 * MB)  # less than a quarter of the model: some spans have their own
    state = checkpoint(tmp_path)
    loaded = {}
    for way in ("mapped", "spans"):
        model = Model(**shapes())
        report = fk.load_checkpoint(model, tmp_path, scheme, device="cuda", runnable=False, transfer=way)
        for name in set(state) - {"embed_tokens.weight"}:
            assert_quantized(model, name, state[name].cuda(), scheme)
        assert torch.equal(model.embed_tokens.weight.cpu(), state["embed_tokens.weight"])
        assert report.bytes_in == sum(t.nbytes for t in state.values())
        loaded[way] = model
    for (name, a), b in zip(loaded["mapped"].named_parameters(), loaded["spans"].parameters(), strict=True):
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name
    assert "slots" in report.transfer and report.transfer_bytes == report.bytes_in


@pytest.mark.parametrize("scheme", ["per_channel", "per_block", "per_tensor"])
def test_memory_above_the_model_is_the_ring(scheme, tmp_path, monkeypatch):
    """Also where spans come ahead, in memory that later weights take: what the allocator saw, and held, at most."""
    monkeypatch.setattr(wire, "_AHEAD_BYTES", 100 * MB)
    sizes = {f"fc{i}": (2048, 2816) for i in range(60)}
    shard = values(2048, 2816)
    save_file({f"{name}.weight": shard.clone() for name in sizes}, tmp_path / "model.safetensors")
    fk.quantize(shard.cuda(), scheme)  # load kernels beforehand
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    report = fk.load_checkpoint(Model(**sizes), tmp_path, scheme, device="cuda", runnable=False)
    assert report.peak_allocated - report.resident <= 64 * MB
    assert report.peak_reserved - report.resident <= 256 * MB + before


def test_memory_that_cannot_be_locked_is_slower_and_right(engine_name, file):
    """And the report says so."""
    path, data = file
    with Transfer("cuda", Options(4, MB, 8, lock=False)) as moving:
        parts = [m.view(0, torch.uint8, (s.num_bytes,)).clone() for s, m in moving.start([Span(path, 0, len(data))])]
    assert torch.equal(parts[0], data)
    assert "8 of which are not page-locked" in str(moving)


def assert_untouched(model, before):
    """On meta, without scales, and no memory is held."""
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(name.endswith("_scale") for name, _ in model.named_parameters())
    assert _allocated() == before


def test_a_file_that_ends_in_the_middle_leaves_the_model_as_it_was(tmp_path):
    """It was whole when its header was read; the error names it, and the same model then loads."""
    state = checkpoint(tmp_path)
    model, before = Model(**shapes()), _allocated()
    opened, path = open_checkpoint(tmp_path), tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors.*ends before its header says"):
        fk.load_checkpoint(model, opened, device="cuda", runnable=False)
    assert_untouched(model, before)
    path.write_bytes(content)
    fk.load_checkpoint(model, tmp_path, device="cuda", runnable=False)
    assert_quantized(model, "tall.weight", state["tall.weight"].cuda(), "per_channel")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_kernel_that_fails_in_the_middle_leaves_the_model_as_it_was(error, tmp_path, monkeypatch):
    checkpoint(tmp_path)
    model, before = Model(**shapes()), _allocated()
    launches, launch = [], feed._quantize_many_out

    def failing(*args):
        launches.append(args[0][0].shape)
        if len(launches) == 2:
            raise error("third time lucky")
        launch(*args)

    monkeypatch.setattr(feed, "_quantize_many_out", failing)
    with pytest.raises(error):
        fk.load_checkpoint(model, tmp_path, device="cuda", runnable=False)
    launches.clear()
    assert_untouched(model, before)


def test_what_the_model_has_no_place_for_and_other_shapes_are_errors(tmp_path):
    state = checkpoint(tmp_path)
    for change in ({"extra.weight": values(3, 4)}, {"fc.weight": values(7, 9)}):
        save_file(state | change, tmp_path / "model.safetensors")
        model, before = Model(**shapes()), _allocated()
        with pytest.raises(LoadError, match="extra.weight|`fc.weight` must have shape"):
            fk.load_checkpoint(model, tmp_path, device="cuda", runnable=False)
        assert_untouched(model, before)


def _held():
    """What a leak would add to: threads, files, mappings of memory, bytes in memory, bytes used on the device."""
    torch.cuda.synchronize()
    with open("/proc/self/status") as status:
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    with open("/proc/self/maps") as maps:
        mappings = sum(1 for _ in maps)
    counts = [len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), mappings]
    return counts, resident * 1024, torch.cuda.mem_get_info()[0]


def test_a_thousand_loads_hold_no_more_than_ten(tmp_path):
    """Page-locked memory, threads, files, registrations: whole, left early, and failing."""
    data = torch.randint(0, 256, (6 * MB,), dtype=torch.uint8)
    data.numpy().tofile(tmp_path / "data.bin")
    path = str(tmp_path / "data.bin")

    def load(i):
        ends_early, leaves_early = i % 3 == 1, i % 3 == 2
        spans = [Span(path, j * MB, MB) for j in range(6)]
        if ends_early:
            spans.append(Span(path, 6 * MB, 1))
        with contextlib.suppress(CheckpointError), Transfer("cuda", OPTIONS, ring_bytes=2 * MB) as moving:
            for n, _ in enumerate(moving.start(spans)):
                if leaves_early and n == 2:
                    break

    for i in range(10):
        load(i)
    counts, resident, free = _held()
    for i in range(1000):
        load(i)
    now_counts, now_resident, now_free = _held()
    assert all(now <= then + 2 for now, then in zip(now_counts, counts, strict=True))
    assert now_resident < resident + 32 * MB  # a slot not given back is 1 MiB, so a leak would be thousands
    assert now_free >= free - 32 * MB or not ALONE


def test_a_killed_load_leaves_nothing(tmp_path):
    """The system gives back what a process had locked and registered, at whatever point it was killed."""
    state = checkpoint(tmp_path)
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]; import fp8_kernels as fk\n"
        "from tests.gpu.test_transfer_gpu import Model, shapes\n"
        "while True:\n"
        "    fk.load_checkpoint(Model(**shapes()), sys.argv[1], device='cuda', runnable=False)\n"
        "    print('.', flush=True)\n"
    )
    free = torch.cuda.mem_get_info()[0]
    for delay in (0.0, 0.013, 0.037):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *sys.path], stdout=subprocess.PIPE)
        child.stdout.readline()  # it is loading now
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
    for _ in range(100):
        if torch.cuda.mem_get_info()[0] >= free - 64 * MB or not ALONE:
            break
        time.sleep(0.05)
    assert torch.cuda.mem_get_info()[0] >= free - 64 * MB or not ALONE
    model = Model(**shapes())
    fk.load_checkpoint(model, tmp_path, device="cuda", runnable=False)
    assert_quantized(model, "tall.weight", state["tall.weight"].cuda(), "per_channel")
