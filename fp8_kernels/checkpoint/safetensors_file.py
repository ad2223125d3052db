"""Write a safetensors file one tensor at a time.

`safetensors.torch.save_file` wants every tensor of the file in memory at once. Dtypes and shapes are known long
before the values, though, so the header and with it every offset can be written first, and each tensor goes to
its place when it is ready. Reading needs nothing of its own: see `reader`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..schemes import dtype_name

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_BYTES = 16 << 20
TEMPORARY_SUFFIX = ".tmp"


class SafetensorsWriter:
    """Writes `path` as its tensors come, in any order, and lets it appear only when it is complete.

    Use it as a context manager: leaving it normally finishes the file, leaving it by an exception removes it.

    Args:
        path: of the file; it is written beside it, under a temporary name, and renamed at the end.
        entries: name -> (dtype, shape) of every tensor of the file.
        metadata: strings for the header.

    Raises:
        CheckpointError: the file cannot be written (a full disk, say), or an entry is of a dtype that
            safetensors has no name for.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self._temporary = self.path.with_name(self.path.name + TEMPORARY_SUFFIX)
        self._entries = {name: (dtype, tuple(shape)) for name, (dtype, shape) in entries.items()}
        self._pending = set(self._entries)
        header, self._offsets, self.num_bytes = _layout(self._entries, metadata, self.path)
        self._file = None
        try:
            self._file = open(self._temporary, "wb", buffering=0)
            self._write_at(0, header)
        except OSError as error:
            self.abort()
            raise self._cannot_write(error) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place; each exactly once.

        Args:
            name: one of the entries.
            tensor: of that entry's dtype and shape, on any device; copied only where it is not on the CPU or
                not contiguous.
        """
        if name not in self._entries:
            raise ValueError(f"`{name}` must be an entry of {self.path}")
        if name not in self._pending:
            raise ValueError(f"`{name}` must be written once to {self.path}")
        if (tensor.dtype, tuple(tensor.shape)) != self._entries[name]:
            dtype, shape = self._entries[name]
            raise ValueError(
                f"`{name}` must be {dtype_name(dtype)} {list(shape)}, "
                f"got {dtype_name(tensor.dtype)} {list(tensor.shape)}"
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            self._write_at(self._offsets[name], memoryview(data))
        except OSError as error:
            raise self._cannot_write(error) from error
        self._pending.discard(name)

    def close(self) -> None:
        """Make the file durable and give it its name; every entry must have been written."""
        if self._pending:
            self.abort()
            missing = ", ".join(sorted(self._pending)[:5])
            raise ValueError(f"{self.path}: {len(self._pending)} tensors were not written ({missing})")
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.abort()
            raise self._cannot_write(error) from error

    def abort(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, exception_type, exception, traceback):
        if exception_type is None:
            self.close()
        else:
            self.abort()

    def _write_at(self, offset, data):
        self._file.seek(offset)
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            while len(chunk):  # an unbuffered write may take less than it was given
                chunk = chunk[self._file.write(chunk) :]
            self._begin_writeback(offset + start, len(data[start : start + _CHUNK_BYTES]))

    def _begin_writeback(self, offset, count):
        """Have it go to the disk now, beside what comes next; at the end only the last of it is waited for."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, count, os.POSIX_FADV_DONTNEED)

    def _cannot_write(self, error):
        return CheckpointError(f"cannot write {self.path} ({self.num_bytes} bytes): {error.strerror or error}")


def data_offset(path: Path) -> int:
    """Where in a safetensors file the first tensor begins."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # a system that cannot open folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def num_bytes(dtype: torch.dtype, shape) -> int:
    """Bytes of a contiguous tensor."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def _layout(entries, metadata, path):
    """(header bytes, name -> file offset, file size).

    Readers map the file and view it in each tensor's dtype, so offsets must be multiples of item sizes; the
    format allows no gaps. Hence wide dtypes come first, and the header is padded to 8 bytes.
    """
    spans, end = {}, 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda entry: -entry[1][0].itemsize):
        if dtype not in _NAMES:
            raise CheckpointError(f"{path}: `{name}` is {dtype_name(dtype)}, which safetensors cannot hold")
        start, end = end, end + num_bytes(dtype, shape)
        spans[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    table = {"__metadata__": dict(metadata), **spans} if metadata else spans
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    offsets = {name: first + span["data_offsets"][0] for name, span in spans.items()}
    return len(text).to_bytes(8, "little") + text, offsets, first + end
