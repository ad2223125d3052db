"""Bytes that are moved by many threads arrive as they are, in order, or the error names what could not be read."""

import gc
import os
import signal
import threading
import weakref

import numpy as np
import pytest
import torch

from fp8_kernels.errors import CheckpointError
from fp8_kernels.loading import engine, transfer
from fp8_kernels.loading.transfer import Options, Span, Transfer, _places, cached_fraction

ENGINES = ["native", "python"]
SIZE = (3 << 20) + 777  # not a multiple of any page, slot or ring


@pytest.fixture(params=ENGINES)
def engine_name(request, monkeypatch):
    """Both engines; the C++ one where it was built."""
    if request.param == "python":
        monkeypatch.setattr(transfer, "native", lambda: None)
        monkeypatch.setattr(engine, "native", lambda: None)
    elif engine.native() is None:
        pytest.skip("the CPU extension was not built")
    return request.param


@pytest.fixture
def file(tmp_path):
    """(path, its bytes)."""
    data = np.random.randint(0, 256, SIZE, dtype=np.uint8)
    data.tofile(tmp_path / "data.bin")
    return str(tmp_path / "data.bin"), data


def cut(path, size, largest):
    """Spans of random sizes that cover a file; the first is one byte."""
    spans, offset, num_bytes = [], 0, 1
    while offset < size:
        num_bytes = min(num_bytes, size - offset)
        spans.append(Span(path, offset, num_bytes))
        offset += num_bytes
        num_bytes = int(np.random.randint(1, largest))
    return spans


def received(moving):
    """The bytes of spans, copied when they arrive, as a consumer would use them."""
    return [memory.view(0, torch.uint8, (span.num_bytes,)).clone().numpy() for span, memory in moving]


# Slots smaller and larger than spans, rings that hold a few spans and a fraction of the largest, one thread and many.
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("threads", "chunk", "slots", "ring"), [(1, 4096, 1, 1), (4, 8192, 3, 1 << 20), (7, 1 << 20, 5, 0)]
)
def test_every_byte_arrives_in_order(engine_name, file, threads, chunk, slots, ring, direct):
    path, data = file
    spans = cut(path, SIZE, 300_000)
    with Transfer("cpu", Options(threads, chunk, slots, direct), ring) as moving:
        parts = received(moving.start(spans, ahead=slots * 100_000))
    assert np.array_equal(np.concatenate(parts), data)
    assert moving.num_bytes == SIZE


def test_several_files_and_starts_and_host_tensors_in_one_transfer(engine_name, file, tmp_path):
    """What is sent later arrives later; spans may be received in between."""
    path, data = file
    data[:1000].tofile(tmp_path / "other.bin")
    source = torch.randn(513, 257)
    first, second = torch.empty_like(source), torch.empty(0)
    with Transfer("cpu", Options(3, 4096, 4)) as moving:
        sent = moving.send(first, source)
        parts = received(moving.start([Span(path, 5, 70_000), Span(str(tmp_path / "other.bin"), 0, 1000)]))
        moving.wait(sent)
        moving.wait(moving.send(second, torch.empty(0)))
        parts += received(moving.start([Span(path, SIZE - 3, 3)]))
    assert torch.equal(first, source)
    for part, wanted in zip(parts, (data[5:70_005], data[:1000], data[-3:]), strict=True):
        assert np.array_equal(part, wanted)


def test_a_span_stays_as_it_is_until_the_next_is_asked_for(engine_name, file):
    """The ring is not written where it is still in use, however far ahead the threads could be."""
    path, data = file
    spans = [Span(path, i * 1000, 1000) for i in range(500)]
    with Transfer("cpu", Options(4, 512, 64), ring_bytes=4096) as moving:
        for span, memory in moving.start(spans):
            for _ in range(2):
                threading.Event().wait(0.0005)  # time for the threads to go wrong
                got = memory.view(0, torch.uint8, (1000,)).numpy()
                assert np.array_equal(got, data[span.offset : span.offset + 1000])


def test_places_never_overlap_what_is_not_released():
    """Of random sizes, each place is free once what it names is released."""
    sizes = [int(n) * 512 for n in np.random.randint(1, 40, 2000)]
    ring = 50 * 512
    taken, released = [], -1
    for i, (size, (start, after)) in enumerate(zip(sizes, _places(sizes, ring), strict=True)):
        assert 0 <= start and start + size <= ring
        released = max(released, after)  # copies are in order, so what an earlier one waited for is released too
        for number in range(released + 1, i):
            low, high = taken[number]
            assert high <= start or start + size <= low
        taken.append((start, start + size))
    assert released > 1900


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_ends_early_is_an_error_with_its_name(engine_name, file, direct):
    """Whatever is around it; the transfer then ends at once."""
    path, _ = file
    spans = [Span(path, 0, SIZE), Span(path, SIZE - 100, 5000), Span(path, 0, SIZE)]
    with Transfer("cpu", Options(4, 65536, 8, direct)) as moving:
        where = rf"data.bin, bytes {SIZE - 100} to {SIZE + 4900}: the file ends before its header says"
        with pytest.raises(CheckpointError, match=where):
            received(moving.start(spans))


def test_a_file_that_cannot_be_opened_or_read_is_an_error_with_its_name(engine_name, tmp_path):
    with Transfer("cpu", Options(2)) as moving, pytest.raises(CheckpointError, match="missing.bin: No such file"):
        moving.start([Span(str(tmp_path / "missing.bin"), 0, 1)])
    with Transfer("cpu", Options(2)) as moving, pytest.raises(CheckpointError, match="Is a directory"):
        list(moving.start([Span(str(tmp_path), 0, 1)]))


def test_leaving_early_waits_for_no_consumer(engine_name, file):
    """A consumer that raises, or stops asking, leaves no thread behind, however much is under way."""
    path, _ = file
    before, threads = threading.active_count(), len(os.listdir("/proc/self/task"))
    for taken in (0, 1, 3) * 4:
        with pytest.raises(KeyError), Transfer("cpu", Options(4, 4096, 4), ring_bytes=1 << 16) as moving:
            arriving = moving.start(cut(path, SIZE, 30_000))
            for _ in range(taken):
                next(arriving)
            raise KeyError
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/task")) < threads + 12  # torch may have started some of its own


def test_transfers_side_by_side(engine_name, file):
    """Each thread with one of its own."""
    path, data = file
    results = {}

    def load(number):
        with Transfer("cpu", Options(3, 10_000, 4), ring_bytes=1 << 18) as moving:
            results[number] = np.concatenate(received(moving.start(cut(path, SIZE, 50_000))))

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[number], data) for number in range(4))


def test_signals_in_the_middle_of_reads_lose_nothing(engine_name, file):
    """A timer that interrupts system calls, as profilers have."""
    path, data = file
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        with Transfer("cpu", Options(2, 4096, 4)) as moving:
            parts = received(moving.start(cut(path, SIZE, 100_000)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert np.array_equal(np.concatenate(parts), data)


def test_reads_that_come_short_are_continued(engine_name):
    """A pipe gives less than it is asked for; files on a network do too."""
    if engine_name == "native":
        pytest.skip("its reads are positional, which a pipe has not; the loop is the same")
    calls = []
    data = np.random.randint(0, 256, 10_000, dtype=np.uint8)

    def short(fd, buffers, offset):
        size = min(len(buffers[0]), 777)
        buffers[0][:size] = data[offset : offset + size].tobytes()
        calls.append(size)
        return size

    out = bytearray(9000)
    original, os.preadv = os.preadv, short
    try:
        engine.read_run(-1, 1000, 9000, memoryview(out))
    finally:
        os.preadv = original
    assert bytes(out) == data[1000:].tobytes() and len(calls) > 10


@pytest.mark.parametrize("stride", [300, 4096, 10_000])
def test_rows_are_read_without_what_is_between_them(engine_name, file, stride):
    """Rows that adjoin, overlap no page, and are far apart."""
    path, data = file
    num_rows = SIZE // stride - 1
    out = torch.empty(num_rows * 300, dtype=torch.uint8)
    fd = os.open(path, os.O_RDONLY)
    try:
        engine.read_rows(fd, 7, stride, 300, num_rows, out, 4)
        wanted = np.lib.stride_tricks.as_strided(data[7:], (num_rows, 300), (stride, 1))
        assert np.array_equal(out.reshape(num_rows, 300).numpy(), wanted)
        with pytest.raises(engine.EngineError, match="ends before"):
            engine.read_rows(fd, SIZE - 10, stride, 300, 2, torch.empty(600, dtype=torch.uint8), 4)
    finally:
        os.close(fd)


def test_how_is_chosen_by_where_the_file_is(file, tmp_path):
    """One that was just written is in the page cache; an empty one is not asked for."""
    path, _ = file
    (tmp_path / "empty.bin").touch()
    assert cached_fraction(path) == 1.0
    assert Options.for_files([path]) == Options.for_memory()
    assert Options.for_files([tmp_path / "empty.bin"]) == Options.for_memory()


def test_cold_files_are_read_through_the_page_cache_if_they_fit(file, monkeypatch):
    """Else past it, where the file system can."""
    path, _ = file
    monkeypatch.setattr(transfer, "cached_fraction", lambda path: 0.0)
    assert not Options.for_files([path]).direct
    monkeypatch.setattr(transfer, "free_memory", lambda: SIZE - 1)
    assert Options.for_files([path]).direct == transfer._opens_directly(path)
    assert not transfer._opens_directly(os.path.dirname(path) + "/missing")


def test_memory_stays_while_threads_may_write_to_it(engine_name, file, monkeypatch):
    """Whoever asked for spans, or sent a tensor, may let go of all at once, as an error in a loop over them does: what
    is under way is then still read from, and written to, memory of the transfer's."""
    path, _ = file
    made = []
    allocate = Transfer._allocate
    monkeypatch.setattr(Transfer, "_allocate", lambda *args: made.append(t := allocate(*args)) or t)
    with Transfer("cpu", Options(2, 4096, 2)) as moving:
        next(moving.start([Span(path, i << 20, 1 << 20) for i in range(3)], ahead=1 << 20))
        source, target = torch.ones(1 << 16), torch.zeros(1 << 16)
        moving.send(target, source)
        held = [weakref.ref(t) for t in (*made, source, target)]
        del source, target
        made.clear()
        gc.collect()
        # The first span has memory of its own, and had arrived.
        assert [ref() is not None for ref in held] == [False, True, True, True]
    gc.collect()
    assert all(ref() is None for ref in held)
