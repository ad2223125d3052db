"""Read Hugging Face checkpoint folders: names, dtypes and shapes from headers alone, tensors one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .safetensors_file import DTYPES, data_offset, num_bytes
from .slices import LazyTensor

# What a folder may hold, in the order in which Hugging Face libraries look for it.
LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Files that hold weights in some format, or speak of them; a conversion does not carry them over.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
AMAX_SIDECAR = "fp8_amax.json"  # see `amax`; of these very weights, so it does not go where others are written
_LFS_MAGIC = b"version https://git-lfs"
# Pages of a mapped file count as resident until it is unmapped, so it is, once this much has been read.
_REMAP_BYTES = 32 << 20


class TensorInfo(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        dtype, shape: of it.
        num_bytes: of its elements.
        file: the name of the file in the checkpoint's folder.
        offset: of its first byte in the file; None where the file is no safetensors file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    file: str
    offset: int | None = None


class Checkpoint:
    """A checkpoint whose headers have been read and found consistent. Made by `open_checkpoint`.

    Attributes:
        folder: that holds it.
        files: names of its weight files, in order.
        config: config.json as a dict; empty where there is none.
        sharded: whether an index lists its files.
        is_single_file: whether it is a file alone, so that the rest of its folder does not belong to it.
    """

    def __init__(
        self, folder: Path, files: list[str], config: dict, index: dict[str, str] | None = None, is_single_file=False
    ):
        self.folder, self.files, self.config, self.is_single_file = folder, files, config, is_single_file
        self.sharded = index is not None
        self._opened, self._mapped = None, 0  # the file that was read last, and how much of it
        self._metadata = {}
        for file in files:
            for name, info in _read_header(folder / file).items():
                if name in self._metadata:
                    raise CheckpointError(f"{folder}: `{name}` is in two files, {self._metadata[name].file} and {file}")
                self._metadata[name] = info
        for name, file in (index or {}).items():
            if name not in self._metadata:
                raise CheckpointError(f"{folder}: the index puts `{name}` in {file}, which does not hold it")
            if self._metadata[name].file != file:
                found = self._metadata[name].file
                raise CheckpointError(f"{folder}: the index puts `{name}` in {file}, but it is in {found}")

    def metadata(self) -> dict[str, TensorInfo]:
        """Name -> dtype, shape and file of every tensor, in file order."""
        return dict(self._metadata)

    def tensors(self, file: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in file order, each read when it is asked for.

        Args:
            file: one of `files`; by default all of them, one after another.
        """
        for name, info in self._metadata.items():
            if file in (None, info.file):
                yield name, self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor by name; its memory is the mapped file wherever the file's layout allows that."""
        if name not in self._metadata:
            raise KeyError(f"{self.folder} holds no tensor `{name}`")
        info = self._metadata[name]
        if self._opened is None or self._opened[0] != info.file:
            path = self.folder / info.file
            self._opened = None  # before the next one is mapped
            self._opened, self._mapped = (info.file, _open_tensors(path)), 0
        get_tensor = self._opened[1]
        self._mapped += info.num_bytes
        if self._mapped >= _REMAP_BYTES:
            self._opened = None  # tensors keep the mapping that they are of
        return get_tensor(name)

    def lazy(self, name: str) -> LazyTensor:
        """One tensor by name, of which only what is used will be read."""
        if name not in self._metadata:
            raise KeyError(f"{self.folder} holds no tensor `{name}`")
        return LazyTensor(self, name)

    def lazy_tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """(name, tensor) in file order, for loaders that keep a part of each: a rank then reads no other."""
        for name in self._metadata:
            yield name, self.lazy(name)

    def other_files(self) -> list[str]:
        """Paths, relative to `folder`, of everything but weights, their index and hidden files."""
        if self.is_single_file:
            return []
        found = []
        for folder, subfolders, names in os.walk(self.folder):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__pycache__")))
            for name in sorted(names):
                if not name.startswith(".") and not name.endswith((*_WEIGHT_SUFFIXES, AMAX_SIDECAR)):
                    found.append(os.path.relpath(os.path.join(folder, name), self.folder))
        return found


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a Hugging Face folder, or a single .safetensors file.

    Every header is read, no tensor is. Of several layouts in one folder the first of `LAYOUTS` counts, as it
    does for Hugging Face libraries; a folder with a single .safetensors file of another name is taken too.

    Raises:
        CheckpointError: there is no checkpoint at `path`, or it is damaged; names the file and the tensor.
    """
    path = Path(path)
    if path.is_file():
        if not _is_safetensors(path):
            raise CheckpointError(f"{path} must be a folder or a .safetensors file")
        return Checkpoint(path.parent, [path.name], {}, is_single_file=True)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    for layout in LAYOUTS:
        if not os.path.lexists(path / layout):
            continue
        if not layout.endswith(".index.json"):
            return Checkpoint(path, [layout], config)
        index = _read_index(path / layout)
        return Checkpoint(path, sorted(set(index.values())), config, index)
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if len(others) == 1:
        return Checkpoint(path, others, config)
    if others:
        raise CheckpointError(f"{path} holds {len(others)} safetensors files but no index: {LAYOUTS[1]}")
    raise CheckpointError(f"{path} is not a checkpoint: it holds none of {', '.join(LAYOUTS)}")


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _refuse_lfs_pointer(path)
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_index(path):
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} must hold a `weight_map` from tensor names to files")
    for file in {file if isinstance(file, str) else "" for file in weight_map.values()}:
        if not file or file != os.path.basename(file):
            name, file = next((n, f) for n, f in weight_map.items() if not isinstance(f, str) or f == file)
            raise CheckpointError(f"{path}: `{name}` must be in a file of the same folder, got {file!r}")
    return weight_map


def _read_header(path):
    """Name -> TensorInfo, in file order."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if not _is_safetensors(path):
        tensors = _load_pickle(path)
        return {name: TensorInfo(t.dtype, tuple(t.shape), t.nbytes, path.name) for name, t in tensors.items()}
    infos = {}
    with _open_safetensors(path) as file:
        offset, path_name = data_offset(path), path.name
        for name in file.offset_keys():  # the format allows no gaps, and the library has checked that there are none
            header = file.get_slice(name)
            dtype, shape = DTYPES.get(header.get_dtype()), tuple(header.get_shape())
            if dtype is None:
                raise CheckpointError(f"{path}: `{name}` is {header.get_dtype()}, which torch cannot hold")
            size = num_bytes(dtype, shape)
            infos[name] = TensorInfo(dtype, shape, size, path_name, offset)
            offset += size
    return infos


def _is_safetensors(path):
    return path.suffix == ".safetensors"


def _open_tensors(path):
    """A function from a tensor's name to the tensor."""
    return _open_safetensors(path).get_tensor if _is_safetensors(path) else _load_pickle(path).__getitem__


def _open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        _refuse_lfs_pointer(path)
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes): {error}"
        ) from error


def _load_pickle(path):
    """Name -> tensor, mapped from the file where its layout allows it."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files older than torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        _refuse_lfs_pointer(path)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a whole file of tensors alone: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: `{name}` must be a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_meta:
            what = "on the meta device" if tensor.is_meta else tensor.layout
            raise CheckpointError(f"{path}: `{name}` must hold its values one after the other, got one that is {what}")
    return state


def _refuse_lfs_pointer(path):
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(_LFS_MAGIC)) == _LFS_MAGIC:
                raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`")
