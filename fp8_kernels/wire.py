"""`load_checkpoint` of files to a GPU: spans of many tensors at once, each tensor quantized where it arrived."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from .checkpoint import Checkpoint
from .checkpoint.spans import SPAN_BYTES, Piece, make_spans
from .errors import LoadError
from .loading import LayerwiseLoader
from .loading.copy_counter import BelowModes
from .loading.feed import Feed, Plain, Rows
from .loading.plan import listed
from .loading.reserve import SMALL_BYTES, reserve
from .loading.rules import Rules
from .loading.staging import Tracked
from .loading.transfer import RING_BYTES, Memory, Options, Span, Transfer
from .names import Destination, Names
from .stored import check_dtype, wrong_shape

WAYS = ("auto", "spans", "mapped")
_EARLY_BYTES = 16 << 20
# What arrives before the load is planned, on a slow host in a tenth of a second, lies where the model's later weights
# will, if there are enough of them: at most this much, and this part of them.
_AHEAD_BYTES, _AHEAD_PART = 4 << 30, 4
_SPANS, _SMALLEST_SPAN_BYTES = 8, 1 << 20  # at least so many; but none smaller than that
_SLACK_BYTES = 64 << 20  # for the ring, and for weights that files cut apart


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
    can = all(info.offset is not None for info in infos) and hasattr(os, "preadv")
    if way == "spans" and not can:
        raise ValueError(
            f"`transfer` must be 'auto' or 'mapped' for files that are no safetensors, {checkpoint.folder}"
        )
    return can and way != "mapped" and (device.type == "cuda" or way == "spans")


class SpanLoad:
    """A context manager in which a checkpoint's bytes are on their way.

    They are as soon as it is entered. Large tensors that will pass through come first, and go straight to where they
    stay; of the others some have memory that the model will take later. So the wire has work while the load is planned.

    Args:
        checkpoint: of safetensors files.
        device: where to.
        rules: what will pass through.
        model: that they are for.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, rules: Rules, model: torch.nn.Module):
        self._checkpoint, self._device, self._infos = checkpoint, device, checkpoint.metadata()
        self._early: dict[str, tuple[torch.Tensor, int] | None] = {}
        self._made_bytes = 0  # of FP8, if all else becomes that
        for name, info in self._infos.items():
            size = info.num_bytes
            if size >= _EARLY_BYTES and rules.decide(name, info.shape, info.dtype)[0] is None:
                self._early[name] = None
            elif size > SMALL_BYTES:
                self._made_bytes += size // info.dtype.itemsize
        early = {self._infos[name].shape for name in self._early}
        self._largest = max((p.numel() for p in model.parameters() if tuple(p.shape) not in early), default=0)
        self._spans, self._arriving = [], None
        files = [checkpoint.folder / file for file in checkpoint.files]
        # Of a small checkpoint a share is under way at a time; no tensor is cut for that.
        sizes = [info.num_bytes for info in self._infos.values()]
        self._span_bytes = min(max(sum(sizes) // _SPANS, *sizes, _SMALLEST_SPAN_BYTES), SPAN_BYTES)
        ring_bytes = RING_BYTES * self._span_bytes // SPAN_BYTES
        self._transfer = Transfer(device, Options.for_files(files), ring_bytes)
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> SpanLoad:
        try:
            transfer = self._exits.enter_context(self._transfer)
            for name in self._early:
                info = self._infos[name]
                tensor = torch.empty(info.shape, dtype=info.dtype, device=self._device)
                path = str(self._checkpoint.folder / info.file)
                self._early[name] = tensor, transfer.fetch(Span(path, info.offset, info.num_bytes), tensor)
            ahead = 0
            if reserve(self._device, self._made_bytes, self._largest, _SLACK_BYTES) or self._device.type == "cpu":
                ahead = min(self._made_bytes // _AHEAD_PART, _AHEAD_BYTES) if self._made_bytes >= _AHEAD_BYTES else 0
            self._spans = make_spans(self._checkpoint, self._span_bytes, without=self._early)
            self._arriving = transfer.start([span for span, _ in self._spans if span.num_bytes], ahead)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        self._exits.close()
        if self._arriving is not None:
            self._arriving.close()  # it holds memory, and whoever keeps the exception keeps this
        self._early = {}

    def given(self, loader: LayerwiseLoader, names: Names) -> dict[str, torch.Tensor]:
        """Name in the model -> what is on its way to be that tensor."""
        found = {}
        entries = {name: entry for entry in loader.plan.entries for name in entry.names}
        for name, (tensor, _) in self._early.items():
            destination = names.find(name)
            entry = None if destination is None or destination.expert is not None else entries[destination.name]
            if (
                entry is not None
                and entry.scheme is None
                and entry.on_meta
                and entry.tracked
                and entry.tensors[0].is_contiguous()
                and (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
            ):
                found.setdefault(entry.name, tensor)
        return found

    def into(self, loader: LayerwiseLoader, names: Names, progress: Callable[[int, int, str], None] | None = None):
        """Hand everything to a loader whose context is entered.

        Raises:
            LoadError, CheckpointError: as `load_checkpoint`.
        """
        places = _Places(loader, self._infos, names)
        total, done = sum(info.num_bytes for info in self._infos.values()), 0
        with BelowModes(), torch.no_grad():
            feed = Feed(loader._session.writes)
            # What the model holds comes first: where it is tied, what comes under its other name, perhaps in another
            # dtype, is compared with it.
            holders = {name: places.holder(name, tensor) for name, (tensor, _) in self._early.items()}
            for name in sorted(holders, key=lambda name: holders[name] is None):
                tensor, sent = self._early[name]
                self._transfer.wait(sent)
                if holders[name] is not None:
                    feed.has_arrived(holders[name])
                else:
                    whole = Piece(name, 0, tuple(tensor.shape), tensor.dtype)
                    feed.take(places.of([whole]), Memory(tensor.reshape(-1).view(torch.uint8)))
                self._early[name] = None
                del tensor
                done += self._infos[name].num_bytes
                if progress:
                    progress(done, total, name)
            nothing = Memory(torch.empty(0, dtype=torch.uint8, device=self._device))
            for span, pieces in self._spans:
                feed.take(places.of(pieces), next(self._arriving)[1] if span.num_bytes else nothing)
                done += span.num_bytes
                if progress:
                    progress(done, total, pieces[-1].name)
            for _ in self._arriving:  # lets go of the last span
                pass
            self._transfer.wind_up()
        places.check_all_expected()
        report, transfer = loader.report, self._transfer
        report.transfer, report.transfer_bytes = str(transfer), transfer.num_bytes
        report.transfer_seconds = transfer.seconds


class _Places:
    """Where the tensors of a checkpoint belong in the model that a loader fills."""

    def __init__(self, loader, infos, names):
        model = loader.model
        self._infos, self._names = infos, names
        self._tensors = dict(model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(model.named_buffers(remove_duplicate=False))
        self._tracked = {name: tracked for tracked in loader._session.tracked for name in tracked.entry.names}
        self._found: dict[str, Destination | None] = {}
        self._unexpected: list[str] = []

    def of(self, pieces: list[Piece]) -> Iterator[Rows | Plain]:
        """The pieces as what a `Feed` takes; without those that the model has no place for."""
        for piece in pieces:
            destination = self._find(piece.name)
            if destination is None:
                continue
            tracked = self._tracked.get(destination.name)
            if tracked is None or tracked.entry.scheme is None:
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

    def holder(self, name: str, tensor: torch.Tensor) -> Tracked | None:
        """What in the model this very tensor is."""
        destination = self._find(name)
        tracked = None if destination is None else self._tracked.get(destination.name)
        return tracked if tracked is not None and tracked.handle.data_ptr() == tensor.data_ptr() else None

    def check_all_expected(self):
        """Raise for tensors that the model has no place for."""
        if self._unexpected:
            raise LoadError(
                f"the model has no place for {listed(self._unexpected)}; leave them out by passing an iterable without "
                "them"
            )

    def _find(self, name):
        if name in self._found:
            return self._found[name]
        destination = self._names.find(name)
        if destination is None and not self._names.may_be_dropped(name):
            self._unexpected.append(name)
        elif destination is not None:
            self._check(name, self._infos[name], destination)
        self._found[name] = destination
        return destination

    def _check(self, name, info, destination):
        tensor = self._tensors[destination.name]
        check_dtype(name, info.dtype, tensor.dtype)
        shape = destination.shape_in(tuple(tensor.shape))
        if info.shape != shape:
            is_scale = "weight_scale" in name and all(size == 1 for size in info.shape)  # one for all, stored as [1]
            if not is_scale:
                raise wrong_shape(name, info.shape, shape)
