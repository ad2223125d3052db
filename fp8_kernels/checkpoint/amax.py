"""The amax sidecar: every weight's maximum, found once, so that one scale for a whole weight needs no second look.

`fp8_amax.json` lies beside the weights. It says for each weight (each expert of a fused one) its `max |w|`, and for
each weight file what it was when it was read: size, time of its last change, and a hash of its header and of samples
of its data. Where any of these differs the sidecar speaks of another checkpoint and is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .. import ops
from ..errors import CheckpointError
from ..loading.rules import HIGH_PRECISION
from .reader import AMAX_SIDECAR, Checkpoint, open_checkpoint, read_json

_VERSION = 1
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_WAY_OUT = "make it anew with `fp8-kernels amax`, or delete it"


def write_amax(
    src: str | os.PathLike | Checkpoint,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Find `max |w|` of every weight of a checkpoint and keep it beside the weights.

    Every floating-point tensor of two or more dimensions has one, per index of its leading dimensions; which of
    them become FP8 is decided when they do. Four bytes a weight or expert; one tensor at a time is in memory.

    Args:
        src: a Hugging Face folder, or one that `open_checkpoint` opened.
        device: where the maxima are found.
        progress: called with (bytes done, bytes in total, tensor name) after every tensor.

    Returns:
        The sidecar's path.

    Raises:
        CheckpointError: `src` cannot be read, is a single file (which has no folder of its own), or its folder
            cannot be written.
    """
    checkpoint = src if isinstance(src, Checkpoint) else open_checkpoint(src)
    path = _path(checkpoint)
    if checkpoint.is_single_file:
        raise CheckpointError(
            f"{checkpoint.folder / checkpoint.files[0]} must be in a folder of its own to have {path.name}"
        )
    identity = {file: _identity(checkpoint.folder / file) for file in checkpoint.files}
    infos = checkpoint.metadata()
    done, total = 0, sum(info.num_bytes for info in infos.values())
    found = {}
    for name, tensor in checkpoint.tensors():
        if tensor.ndim >= 2 and tensor.dtype in HIGH_PRECISION:
            found[name] = ops.amax(tensor.to(device), "per_tensor").tolist()
        del tensor
        done += infos[name].num_bytes
        if progress:
            progress(done, total, name)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps({"version": _VERSION, "files": identity, "amax": found}))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


def read_amax(checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """Name -> fp32 `[...]` of every weight in the checkpoint's sidecar; empty where it has none.

    Raises:
        CheckpointError: the sidecar is not of these weights as they are now, or cannot be read.
    """
    path = _path(checkpoint)
    if checkpoint.is_single_file or not path.exists():
        return {}
    content = read_json(path)
    files = content.get("files")
    if content.get("version") != _VERSION or not isinstance(files, dict) or not isinstance(content.get("amax"), dict):
        raise CheckpointError(f"{path} is not a sidecar of this version; {_WAY_OUT}")
    if set(files) != set(checkpoint.files):
        raise CheckpointError(
            f"{path} is of other files: {', '.join(sorted(set(files) ^ set(checkpoint.files)))}; {_WAY_OUT}"
        )
    for file, recorded in files.items():
        now = _identity(checkpoint.folder / file)
        recorded = recorded if isinstance(recorded, dict) else {}
        changed = [key for key in now if now[key] != recorded.get(key)]
        if changed:
            raise CheckpointError(f"{path} is stale: {file} has another {', '.join(changed)}; {_WAY_OUT}")
    infos = checkpoint.metadata()
    try:
        found = {name: torch.tensor(value, dtype=torch.float32) for name, value in content["amax"].items()}
    except (TypeError, ValueError) as error:  # no number, or lists of several lengths
        raise CheckpointError(f"{path} holds what is no maximum: {error}; {_WAY_OUT}") from error
    for name, value in found.items():
        if name not in infos or value.shape != infos[name].shape[:-2]:
            raise CheckpointError(
                f"{path} holds `{name}`, which the checkpoint has not, or in another shape; {_WAY_OUT}"
            )
    return found


def _path(checkpoint):
    return checkpoint.folder / AMAX_SIDECAR


def _identity(path):
    """What tells that a file is not what it was, at the price of a few reads."""
    stat = os.stat(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(_SAMPLES):  # the first is the header's beginning, with the offsets of most tensors
            file.seek(max(stat.st_size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return {"size": stat.st_size, "mtime": stat.st_mtime_ns, "hash": digest.hexdigest()}
