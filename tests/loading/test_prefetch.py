"""Bytes of file mappings and host memory that come by another way than torch's are the same bytes, whatever happens to
the file, its mapping and its pages meanwhile.

The copies go to host memory here, where they need no GPU; the threads, the reading ahead and every check are the same.
"""

import gc
import mmap
import os
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fp8_kernels.errors import LoadError
from fp8_kernels.loading import prefetch
from fp8_kernels.loading.prefetch import Prefetch

pytestmark = pytest.mark.skipif(prefetch.library() is None, reason="needs the CPU extension")

MIB = 1 << 20


@pytest.fixture
def sources():
    made = Prefetch(torch.device("cpu"), num_threads=3)
    yield made
    made.close()


def brought(sources, source):
    """What arrives, in memory that held other values before."""
    destination = torch.full(source.shape, 77, dtype=source.dtype)
    sources.bring(destination, source)
    return destination


def values(count=12, rows=700):
    """Weights of about 1 MiB, none a multiple of a page or a slot."""
    return {f"w{i:02}": torch.randn(rows + i, 769).bfloat16() for i in range(count)}


def written(path, tensors):
    save_file(tensors, path)
    return path


def asked(sources, kind="file"):
    found = sources.counters().get(kind)
    return found.asked_bytes if found else 0


def test_a_walk_in_order_reads_ahead_and_every_byte_once(sources, tmp_path):
    """Small and large tensors in the file's order: the values, none left to torch but the first, no byte read twice."""
    wanted = values(20) | {f"n{i}": torch.randn(129) for i in range(40)}
    with safe_open(written(tmp_path / "a.safetensors", wanted), "pt") as f:
        for name in f.offset_keys():
            assert torch.equal(brought(sources, f.get_tensor(name)), wanted[name]), name
    counters, total = sources.counters()["file"], sum(t.nbytes for t in wanted.values())
    assert counters.declined <= 1 and counters.restarts == 1
    assert total - 129 * 4 <= counters.asked_bytes <= total
    assert counters.read_bytes <= total


@pytest.mark.parametrize("step", [-1, 5, 7])
def test_another_order_gives_the_same_values(sources, step, tmp_path):
    """Backwards, and in leaps over the file: guesses are wrong, values are not."""
    wanted = values(12)
    names = sorted(wanted)
    with safe_open(written(tmp_path / "a.safetensors", wanted), "pt") as f:
        for i in range(len(names)):
            name = names[i * step % len(names)]
            assert torch.equal(brought(sources, f.get_tensor(name)), wanted[name])
    assert asked(sources) == sum(t.nbytes for t in wanted.values())


def test_several_files_in_turn(sources, tmp_path):
    """More files than are known at a time, a tensor of each after the other."""
    all_values = [values(4) for _ in range(prefetch.MAX_MAPPINGS + 3)]
    files = [safe_open(written(tmp_path / f"{i}.safetensors", v), "pt") for i, v in enumerate(all_values)]
    for name in sorted(all_values[0]):
        for file, wanted in zip(files, all_values, strict=True):
            assert torch.equal(brought(sources, file.get_tensor(name)), wanted[name])
    assert asked(sources) > 0


def test_a_tensor_that_was_written_to_arrives_as_it_is(sources, tmp_path):
    """In place, in its mapping: before anything was read, and after it was read ahead."""
    wanted = values(6)
    with safe_open(written(tmp_path / "a.safetensors", wanted), "pt") as f:
        tensors = {name: f.get_tensor(name) for name in sorted(wanted)}
        tensors["w00"].neg_()
        for name, tensor in tensors.items():
            expected = -wanted[name] if name in ("w00", "w04") else wanted[name]
            assert torch.equal(brought(sources, tensor), expected), name
            if name == "w02":  # what follows has been read by now, or is about to be
                tensors["w04"].neg_()
    assert 0 < asked(sources) < sum(t.nbytes for t in wanted.values())


def test_a_tensor_that_was_written_to_on_a_kernel_without_scans(sources, tmp_path):
    """Before Linux 6.7 the pages are listed, not searched: a list of ours, in a file that no scan can be asked of."""
    pages, size = os.open("/proc/self/pagemap", os.O_RDONLY), os.sysconf("SC_PAGESIZE")
    sources._pagemap = os.open(tmp_path / "pagemap", os.O_RDWR | os.O_CREAT)
    wanted = values(4)
    with safe_open(written(tmp_path / "a.safetensors", wanted), "pt") as f:
        for name in sorted(wanted):
            tensor, before = f.get_tensor(name), asked(sources)
            if name == "w02":
                tensor[300, 0] = 5
            at = tensor.data_ptr() // size * 8
            os.pwrite(sources._pagemap, os.pread(pages, (tensor.nbytes // size + 2) * 8, at), at)
            assert torch.equal(brought(sources, tensor), tensor), name
            assert (asked(sources) == before) == (name == "w02"), name
    os.close(pages)


def test_memory_may_be_written_again_at_once(sources, tmp_path):
    """What arrived does not change with its source: a mapped tensor, and a buffer that is used again."""
    wanted = values(3)
    buffer = torch.empty(900, 769, dtype=torch.bfloat16)
    with safe_open(written(tmp_path / "a.safetensors", wanted), "pt") as f:
        for name in sorted(wanted):
            tensor = f.get_tensor(name)
            arrived = brought(sources, tensor)
            tensor.fill_(3)
            assert torch.equal(arrived, wanted[name])
    for i in range(5):
        arrived = brought(sources, buffer.fill_(i))
        buffer.fill_(9)
        assert arrived.eq(i).all()
    assert asked(sources, "memory") == 5 * buffer.nbytes


def test_a_file_that_was_overwritten_counts_as_it_is_mapped(sources, tmp_path):
    """Other bytes in the same file after the reading began: what the tensor shows is what arrives."""
    wanted = values(4)
    path = written(tmp_path / "a.safetensors", wanted)
    with safe_open(path, "pt") as f:
        for i, name in enumerate(sorted(wanted)):
            tensor = f.get_tensor(name)
            if i == 2:
                time = os.stat(path).st_mtime_ns
                with open(path, "r+b") as file:
                    file.seek(-8, os.SEEK_END)
                    file.write(b"\0" * 8)
                os.utime(path, ns=(time, time + 1_000_000))
            assert torch.equal(brought(sources, tensor), tensor)


def test_a_file_whose_name_another_has_taken(sources, tmp_path):
    """The mapped file counts, not what has its name."""
    first, second = values(3), values(3)
    path = written(tmp_path / "a.safetensors", first)
    with safe_open(path, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in first}
        written(tmp_path / "b.safetensors", second)
        os.replace(tmp_path / "b.safetensors", path)
        for name, tensor in tensors.items():
            assert torch.equal(brought(sources, tensor), first[name])


def test_addresses_that_come_again(sources, tmp_path):
    """Files mapped one after another where the one before was: each gives its own values."""
    for i in range(2 * prefetch.MAX_MAPPINGS):
        wanted = values(2)
        path = written(tmp_path / f"{i}.safetensors", wanted)
        with safe_open(path, "pt") as f:
            for name in sorted(wanted):
                assert torch.equal(brought(sources, f.get_tensor(name)), wanted[name])
        del f
        gc.collect()


def test_a_file_that_is_mapped_again_and_again(sources, tmp_path):
    """A new mapping for each tensor, as who bounds what is mapped makes them: reading ahead goes on."""
    wanted = values(12)
    path = written(tmp_path / "a.safetensors", wanted)
    for name in sorted(wanted):
        with safe_open(path, "pt") as f:
            assert torch.equal(brought(sources, f.get_tensor(name)), wanted[name])
    counters = sources.counters()["file"]
    assert counters.restarts <= 2 and counters.asked_bytes == sum(t.nbytes for t in wanted.values())


def test_looking_again_is_one_step_however_much_is_mapped(sources):
    """Small tensors of a heap, each of which looks anew what lies where: a few calls, not some for each mapping."""
    t, counts = torch.randn(9, 33), []
    kept = [mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | i % 2 * mmap.PROT_WRITE) for i in range(400)]
    for _ in range(5):
        calls, sources._look_again = [], 0.0
        sys.setprofile(lambda frame, event, arg, calls=calls: calls.append(event))
        try:
            arrived = brought(sources, t)
        finally:
            sys.setprofile(None)
        assert torch.equal(arrived, t)
        counts.append(sum(event in ("call", "c_call") for event in calls))
    assert 10 < min(counts) and max(counts) < 100
    del kept


def test_a_shared_mapping_is_not_read_ahead(sources, tmp_path):
    """Who shares it may write to it at any time: its bytes are those of the moment."""
    path = tmp_path / "bucket"
    path.write_bytes(bytes(8 * MIB))
    shared = torch.from_file(str(path), shared=True, size=8 * MIB, dtype=torch.uint8)
    for i in range(8):
        piece = shared[i * MIB : (i + 1) * MIB]
        piece.fill_(i + 1)
        assert brought(sources, piece).eq(i + 1).all()
    assert asked(sources) == 0 and asked(sources, "memory") == 8 * MIB


def test_a_mapped_pickle(sources, tmp_path):
    """`torch.load(mmap=True)` maps its file too."""
    wanted = values(4)
    torch.save(wanted, tmp_path / "a.bin")
    for name, tensor in torch.load(tmp_path / "a.bin", mmap=True).items():
        assert torch.equal(brought(sources, tensor), wanted[name])
    assert asked(sources) == sum(t.nbytes for t in wanted.values())


@pytest.mark.parametrize("columns", [slice(3, None), slice(0, 700), slice(999, 1000), slice(0, 1)])
@pytest.mark.parametrize("mapped", [False, True])
def test_columns_of_a_weight(sources, columns, mapped, tmp_path):
    """What a rank keeps of a weight that is cut by columns: rows with gaps between them."""
    w = torch.randn(300_000 // (columns.stop or 1000) + 500, 1000)
    if mapped:
        save_file({"w": w}, tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", "pt") as f:
            source = f.get_tensor("w")[:, columns]
    else:
        source = w[:, columns]
    assert torch.equal(brought(sources, source), w[:, columns])
    is_large = source.nbytes >= prefetch.SMALLEST_BYTES
    assert asked(sources, "memory") == (source.nbytes if is_large else 0) and asked(sources) == 0


def test_what_is_no_run_of_rows_is_left_to_torch(sources):
    """Transposed, expanded, cast, conjugated, too small, and empty: as `copy_`."""
    w = torch.randn(600, 1000)
    complex_ = torch.randn(400, 500, dtype=torch.complex64)
    others = (w.t(), w[:, 3:500:2], w[:1].expand(600, 1000), complex_.conj(), w[:2], w[:0], torch.tensor(3.0))
    for source in others:
        assert torch.equal(brought(sources, source), source)
    destination = torch.empty(600, 1000, dtype=torch.bfloat16)
    sources.bring(destination, w)
    assert torch.equal(destination, w.bfloat16())
    strided = torch.zeros(600, 2000)[:, ::2]
    sources.bring(strided, w)
    assert torch.equal(strided, w)
    sources.bring(destination, torch.tensor(2.0, dtype=torch.bfloat16))
    assert destination.eq(2).all()
    assert not sources.counters()


def test_a_file_that_was_cut_off_is_named(sources, tmp_path):
    """An error, where reading the mapping would end the process."""
    path = written(tmp_path / "a.safetensors", values(4))
    with safe_open(path, "pt") as f:
        brought(sources, f.get_tensor("w00"))
        os.truncate(path, 3 * MIB)
        with pytest.raises(LoadError, match="a.safetensors: it ends before its header says"):
            for name in ("w01", "w02", "w03"):
                brought(sources, f.get_tensor(name))


def test_from_several_threads(sources, tmp_path):
    """Each with a file of its own: all values, in whatever order they come."""
    found = {}

    def walk(i):
        wanted = values(6, 500 + 100 * i)
        with safe_open(written(tmp_path / f"{i}.safetensors", wanted), "pt") as f:
            found[i] = all(torch.equal(brought(sources, f.get_tensor(n)), wanted[n]) for n in sorted(wanted))

    threads = [threading.Thread(target=walk, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_the_summary_says_what_was_used(sources, tmp_path):
    """Nothing before anything was needed; then which ways, and their bytes."""
    assert sources.summary() is None
    with safe_open(written(tmp_path / "a.safetensors", values(1)), "pt") as f:
        w = f.get_tensor("w00")
        brought(sources, w)
        text, num_bytes, seconds = sources.summary()
        assert text == "read ahead of the loop, 3 threads" and num_bytes == w.nbytes and seconds > 0
    brought(sources, torch.zeros(2 * MIB, dtype=torch.uint8))
    text, num_bytes, _ = sources.summary()
    assert "and through page-locked memory" in text and num_bytes == w.nbytes + 2 * MIB


def test_nothing_is_left_after_the_end(tmp_path):
    """A hundred loads, each given up in the middle: no file, thread or mapping more than after the first."""
    path = written(tmp_path / "a.safetensors", values(6))

    def load():
        sources = Prefetch(torch.device("cpu"), num_threads=2)
        with safe_open(path, "pt") as f:
            for name in ("w00", "w01"):
                brought(sources, f.get_tensor(name))
        brought(sources, torch.zeros(2 * MIB))
        sources.close()
        sources.close()

    def held():
        gc.collect()
        with open("/proc/self/maps") as file:
            maps = [line for line in file if str(path) in line]
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(maps)

    load()
    before = held()
    for _ in range(100):
        load()
    assert held() == before and before[2] == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9 * MIB), st.sampled_from([1, 500, 4096, 300_000, MIB, 3 * MIB])), max_size=12)
)
def test_any_sequence_of_runs(tmp_path_factory, runs):
    """Overlapping, repeated, small and large, in any order: always the bytes of the file."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "runs"
    if not path.exists():
        path.write_bytes(os.urandom(12 * MIB))
    mapped = torch.from_file(str(path), shared=False, size=12 * MIB, dtype=torch.uint8)
    sources = Prefetch(torch.device("cpu"), num_threads=2)
    try:
        end = 0
        for start, size in runs:
            for begin in (start, min(end, 9 * MIB)):  # elsewhere, and where the run before ended
                end = begin + size
                assert torch.equal(brought(sources, mapped[begin:end]), mapped[begin:end])
    finally:
        sources.close()
