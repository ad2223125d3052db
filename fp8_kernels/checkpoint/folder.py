"""A folder that appears only when it is complete, and whose making can be resumed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows; there two processes must not make the same folder at once
    fcntl = None

from ..errors import CheckpointError
from .safetensors_file import TEMPORARY_SUFFIX, sync_folder

PARTIAL_SUFFIX, REPLACED_SUFFIX = ".partial", ".replaced"
_RECORD = ".conversion.json"
_LOCK = ".lock"


class PartialFolder:
    """Stands for `<dst>.partial` until `commit` renames it to `dst`. A context manager: one process at a time.

    Whoever fills it gives every file its name only when that file is complete, so what has a name there can be kept
    when the work is resumed.

    Args:
        dst: the folder to make; must not exist, or be empty.
        identity: all that determines the content, as text. A partial folder of the same identity is resumed.
        overwrite: allow `dst` to hold something, which `commit` replaces, and start over where the partial folder
            is of another identity.

    Raises:
        CheckpointError: `dst` is in use, the partial folder is of something else or of a process that is still
            running, what an earlier replacement set aside is still there, or nothing can be written.
    """

    def __init__(self, dst: Path, identity: str, overwrite: bool = False):
        self._identity, self._overwrite, self._lock = identity, overwrite, None
        self._dst, self.path, self._replaced = folders_of(dst)
        if self._dst.exists() and not self._dst.is_dir():
            raise CheckpointError(f"{dst} must be a folder, but a file has that name")
        self._check_may_replace()

    def __enter__(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if not self._holds_the_same():
                if not (self.path / _RECORD).exists():
                    raise CheckpointError(
                        f"{self.path} is where {self._dst} is made, but holds something else; move or remove it"
                    )
                if not self._overwrite:
                    raise CheckpointError(
                        f"{self.path} was left by a conversion with other options, of another source or by another "
                        "version; remove it, or start over with overwrite=True (--overwrite)"
                    )
                for entry in self.path.iterdir():
                    if entry.name != _LOCK:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.write_text(_RECORD, self._identity)
        except OSError as error:
            self._release_lock()
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error
        except BaseException:
            self._release_lock()
            raise
        return self

    def __exit__(self, *exception):
        self._release_lock()

    def has(self, name: str) -> bool:
        """Is that file there already, complete?"""
        return (self.path / name).exists()

    def write_text(self, name: str, text: str) -> None:
        """Make one text file, durable and all at once."""
        path = self.path / name
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error

    def copy(self, name: str, source: Path) -> None:
        """Carry a file over; links are followed."""
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
        except OSError as error:
            raise CheckpointError(f"cannot copy {source} to {path}: {error.strerror or error}") from error

    def commit(self) -> None:
        """Give the folder its name."""
        try:
            for leftover in self.path.glob(f"*.safetensors{TEMPORARY_SUFFIX}"):
                leftover.unlink()
            sync_folder(self.path)
            is_replaced = self._check_may_replace()
            if is_replaced:
                self._dst.rename(self._replaced)
            elif self._dst.is_dir():
                self._dst.rmdir()
            try:
                self.path.rename(self._dst)
            except OSError:
                if is_replaced:
                    self._replaced.rename(self._dst)
                raise
            for name in (_RECORD, _LOCK):  # not before: what is stopped between can be resumed
                (self._dst / name).unlink()
            sync_folder(self._dst.parent)
        except OSError as error:
            raise CheckpointError(f"cannot rename {self.path} to {self._dst}: {error.strerror or error}") from error
        if is_replaced:
            try:
                shutil.rmtree(self._replaced)
            except OSError as error:
                raise CheckpointError(
                    f"{self._dst} is complete, but what it replaced, {self._replaced}, cannot be removed: "
                    f"{error.strerror or error}"
                ) from error

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _check_may_replace(self):
        """Does `dst` hold something? Also asked at the end, since somebody may have put it there meanwhile."""
        holds_something = self._dst.is_dir() and any(self._dst.iterdir())
        if holds_something and not self._overwrite:
            raise CheckpointError(f"{self._dst} must not exist, or be empty; overwrite=True (--overwrite) replaces it")
        if holds_something and os.path.lexists(self._replaced):
            raise CheckpointError(
                f"{self._replaced} is where {self._dst} waits while it is replaced; move or remove it"
            )
        return holds_something

    def _holds_the_same(self):
        try:
            return (self.path / _RECORD).read_text(encoding="utf-8") == self._identity
        except FileNotFoundError:  # stopped before the record had its name; then nothing else has one either
            return all(entry.name.endswith((_LOCK, TEMPORARY_SUFFIX)) for entry in self.path.iterdir())

    def _take_lock(self):
        # The system drops it when the process ends, however it ends.
        self._lock = open(self.path / _LOCK, "a")
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{self.path} is being written by another process") from error

    def _release_lock(self):
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def folders_of(dst: Path) -> tuple[Path, Path, Path]:
    """Where the folder is made: `dst`, or what it is a link to; beside it the partial one, and what is replaced."""
    dst = dst.resolve()
    return dst, dst.with_name(dst.name + PARTIAL_SUFFIX), dst.with_name(dst.name + REPLACED_SUFFIX)
