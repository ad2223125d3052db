"""`load_checkpoint` of files to a GPU: spans of many tensors at once, each tensor quantized where it arrived."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from .checkpoint import Checkpoint
from .checkpoint.spans import Piece, make_spans
from .errors import LoadError
from .loading import LayerwiseLoader
from .loading.feed import Feed, Plain, Rows
from .loading.plan import listed
from .loading.transfer import Memory, Options, Transfer
from .names import Destination, Names

WAYS = ("auto", "spans", "mapped")


def suits(checkpoint: Checkpoint, device: torch.device, way: str) -> bool:
    """Is this checkpoint loaded by spans?

    Args:
        way: "auto" for where it is faster: on CUDA; "spans" wherever it can be; "mapped" for nowhere.

    Raises:
        ValueError: `way` is none of these, or "spans" of files that are none of safetensors.
    """
    if way not in WAYS:
        raise ValueError(f"`transfer` must be one of {WAYS}, got {way!r}")
    infos = checkpoint.metadata().values()
    can = all(info.offset is not None for info in infos)
    if way == "spans" and not can:
        raise ValueError(
            f"`transfer` must be 'auto' or 'mapped' for files that are no safetensors, {checkpoint.folder}"
        )
    return can and way != "mapped" and (device.type == "cuda" or way == "spans")


class SpanLoad:
    """A context manager in which a checkpoint's bytes are on their way.

    Args:
        checkpoint: of safetensors files.
        device: where to.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self._checkpoint, self._spans = checkpoint, make_spans(checkpoint)
        files = [checkpoint.folder / file for file in checkpoint.files]
        self._transfer = Transfer(device, Options.for_files(files))
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> SpanLoad:
        self._exits.enter_context(self._transfer)
        self._arriving = self._transfer.start([span for span, _ in self._spans if span.num_bytes])
        return self

    def __exit__(self, *exception):
        self._exits.close()

    def into(self, loader: LayerwiseLoader, progress: Callable[[int, int, str], None] | None = None):
        """Hand everything to a loader whose context is entered.

        Raises:
            LoadError, CheckpointError: as `load_checkpoint`.
        """
        places = _Places(loader, self._checkpoint)
        total, done = sum(span.num_bytes for span, _ in self._spans), 0
        with loader._session.without_mode(), torch.no_grad():
            feed, nothing = Feed(loader._session.writes), torch.empty(0, dtype=torch.uint8, device=loader.device)
            for span, pieces in self._spans:
                memory = next(self._arriving)[1] if span.num_bytes else Memory(nothing)
                feed.take(places.of(pieces), memory)
                done += span.num_bytes
                if progress:
                    progress(done, total, pieces[-1].name)
            for _ in self._arriving:  # lets go of the last span
                pass
        places.check_all_expected()
        loader.report.transfer = str(self._transfer)
        loader.report.transfer_seconds = self._transfer.seconds
        loader.report.transfer_bytes = self._transfer.num_bytes


class _Places:
    """Where the tensors of a checkpoint belong in the model that a loader fills."""

    def __init__(self, loader, checkpoint):
        model = loader.model
        self._infos = checkpoint.metadata()
        self._names = Names(model)
        self._tensors = dict(model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(model.named_buffers(remove_duplicate=False))
        self._tracked = {name: t for t in loader._session.tracked for name in t.entry.names if t.entry.scheme}
        self._found: dict[str, Destination | None] = {}
        self._unexpected: list[str] = []

    def of(self, pieces: list[Piece]) -> Iterator[Rows | Plain]:
        """The pieces as what a `Feed` takes; without those that the model has no place for."""
        for piece in pieces:
            destination = self._found[piece.name] if piece.name in self._found else self._find(piece.name)
            if destination is None:
                continue
            tracked = self._tracked.get(destination.name)
            if tracked is None:
                tensor = destination.of(self._tensors[destination.name])
                target = piece.of(tensor) if tensor.shape == self._infos[piece.name].shape else tensor
                yield Plain(target, piece.start, piece.shape, piece.dtype)
                continue
            first, count, row, num_rows = 0, 1, piece.first, piece.shape[0]
            if destination.expert is not None:
                first = destination.expert
                row += (destination.half or 0) * (tracked.unit_shape[0] // 2)
            elif piece.lead:
                first = piece.lead[0]
            elif len(tracked.entry.shape) == 3:
                first, count, row, num_rows = piece.first, piece.shape[0], 0, tracked.unit_shape[0]
            yield Rows(tracked, first, count, row, num_rows, piece.start, piece.dtype)

    def check_all_expected(self):
        """Raise for tensors that the model has no place for."""
        if self._unexpected:
            raise LoadError(
                f"the model has no place for {listed(self._unexpected)}; leave them out by passing an iterable without "
                "them"
            )

    def _find(self, name):
        destination = self._names.find(name)
        if destination is None and not self._names.may_be_dropped(name):
            self._unexpected.append(name)
        elif destination is not None:
            self._check_shape(name, self._infos[name].shape, destination)
        self._found[name] = destination
        return destination

    def _check_shape(self, name, shape, destination):
        expected = tuple(destination.of(self._tensors[destination.name]).shape)
        is_scale = "weight_scale" in name and all(size == 1 for size in shape)  # one for all, stored as [1]
        if shape != expected and not is_scale:
            raise LoadError(f"`{name}` must have shape {expected}, got {shape}")
