"""The streaming writer, read back by the safetensors library."""

import json
import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from fp8_kernels.checkpoint.safetensors_file import DTYPES, SafetensorsWriter
from fp8_kernels.errors import CheckpointError

# Those the safetensors library itself can read into torch, of every item size.
READABLE = sorted(DTYPES, key=str)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(t):
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype, shape):
    count = dtype.itemsize
    for size in shape:
        count *= size
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def layouts_of(state):
    return {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}


@pytest.mark.parametrize("dtype", READABLE)
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    """Odd sizes beside each other: a wide dtype after 7 bytes would be misaligned if order were kept."""
    state = {"byte": random_tensor(torch.uint8, (7,))}
    state |= {f"x{i}": random_tensor(DTYPES[dtype], shape) for i, shape in enumerate([(3, 5), (1,), (), (0, 4)])}
    with SafetensorsWriter(tmp_path / "a.safetensors", layouts_of(state)) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == state.keys()
    assert all(same_bits(read[name], state[name]) for name in state)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_order_of_writing_does_not_change_the_bytes(data, tmp_path_factory):
    """Any tensors, written in any order, make the same file."""
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    entries = data.draw(
        st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(st.sampled_from(READABLE), shapes), max_size=6)
    )
    state = {name: random_tensor(DTYPES[dtype], shape) for name, (dtype, shape) in entries.items()}
    folder = tmp_path_factory.mktemp("writer")
    for file, order in (("a", list(state)), ("b", data.draw(st.permutations(list(state))))):
        with SafetensorsWriter(folder / file, layouts_of(state), {"format": "pt"}) as writer:
            for name in order:
                writer.write(name, state[name])
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    with safe_open(folder / "a", "pt") as read:
        assert read.metadata() == {"format": "pt"}
        assert all(same_bits(read.get_tensor(name), tensor) for name, tensor in state.items())


def test_offsets_are_aligned(tmp_path):
    """Every tensor starts at a multiple of its item size, the data at a multiple of 8."""
    state = {"f8": torch.zeros(3, 3, dtype=torch.float8_e4m3fn), "f64": torch.zeros(2, dtype=torch.float64)}
    state |= {"bf16": torch.zeros(5, dtype=torch.bfloat16), "f32": torch.zeros(1)}
    with SafetensorsWriter(tmp_path / "a", layouts_of(state)) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert all(header[name]["data_offsets"][0] % t.element_size() == 0 for name, t in state.items())


def test_strided_tensors_are_written_as_they_read(tmp_path):
    """A transposed, a sliced and an expanded view."""
    base = torch.randn(7, 9)
    state = {"t": base.t(), "slice": base[1:5, ::2], "expand": base[:1].expand(4, 9)}
    with SafetensorsWriter(tmp_path / "a", layouts_of(state)) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    read = load_file(tmp_path / "a")
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_the_name_appears_only_when_complete(tmp_path):
    """Neither before the end, nor after an exception, nor with a tensor missing; nothing else stays."""
    path, entries = tmp_path / "a.safetensors", {"x": (torch.float32, (2,)), "y": (torch.float32, (2,))}
    with pytest.raises(KeyboardInterrupt):
        with SafetensorsWriter(path, entries) as writer:
            writer.write("x", torch.ones(2))
            assert not path.exists()
            raise KeyboardInterrupt
    with pytest.raises(ValueError, match="1 tensors were not written .y"):
        with SafetensorsWriter(path, entries) as writer:
            writer.write("x", torch.ones(2))
    assert os.listdir(tmp_path) == []


def test_wrong_tensors_are_refused(tmp_path):
    """An unknown name, a second time, another dtype, another shape."""
    with pytest.raises(ValueError, match="were not written"):
        with SafetensorsWriter(tmp_path / "a", {"x": (torch.float32, (2,)), "z": (torch.float32, ())}) as writer:
            with pytest.raises(ValueError, match="`y` must be an entry"):
                writer.write("y", torch.ones(2))
            with pytest.raises(ValueError, match=r"`x` must be float32 \[2\], got float16 \[2\]"):
                writer.write("x", torch.ones(2).half())
            with pytest.raises(ValueError, match=r"`x` must be float32 \[2\], got float32 \[1, 2\]"):
                writer.write("x", torch.ones(1, 2))
            writer.write("x", torch.ones(2))
            with pytest.raises(ValueError, match="`x` must be written once"):
                writer.write("x", torch.ones(2))


def test_dtypes_without_a_name_are_refused(tmp_path):
    """complex128 has none in safetensors."""
    with pytest.raises(CheckpointError, match="`x` is complex128"):
        SafetensorsWriter(tmp_path / "a", {"x": (torch.complex128, (1,))})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    """The error names the file."""
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere.*a\.safetensors"):
        SafetensorsWriter(tmp_path / "nowhere" / "a.safetensors", {"x": (torch.float32, (1,))})


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limits on this system")
def test_a_write_that_fails_leaves_nothing(tmp_path):
    """The system refuses to write on, as a full disk does, here because files may have 64 KiB at most."""
    program = """
        import resource, sys, torch
        from fp8_kernels.checkpoint import SafetensorsWriter
        from fp8_kernels.errors import CheckpointError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            with SafetensorsWriter(sys.argv[1], {"x": (torch.uint8, (1 << 17,))}) as writer:
                writer.write("x", torch.ones(1 << 17, dtype=torch.uint8))
        except CheckpointError as error:
            print(error)
    """
    path = tmp_path / "a.safetensors"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), path], capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write {path} ("), done.stderr
    assert os.listdir(tmp_path) == []
