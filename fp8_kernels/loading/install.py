"""Giving a model its results, and taking them back.

A tensor object that an engine holds, in `dict(model.named_parameters())` say, must be the parameter before and
after, with its class and attributes. So results are exchanged beneath the object and no object is replaced.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator

import torch

from ..errors import LoadError

Pair = tuple[torch.Tensor, torch.Tensor]
_OUR_FRAMES = {"fp8_kernels", "torch"}
COMMIT_BYTES = 16 << 20  # of values that are under way while two tensors change places


def exchange(held: torch.Tensor, data: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
    """Let the tensor object `held` be `data`; returns another object that is what `held` was."""
    # `torch.utils.swap_tensors` also exchanges class and attributes, which must stay, and refuses tensors that
    # something else refers to, such as a view that the engine kept.
    other = data.detach().requires_grad_(requires_grad)
    torch._C._swap_tensor_impl(held, other)
    return other


class Snapshot:
    """What a model holds, in parameters, buffers and plain attributes, to bring it back to exactly that."""

    def __init__(self, model: torch.nn.Module):
        named = list(model.named_modules())
        self._holders = [(f"{name}.{{}}" if name else "{}", r, dict(r)) for name, m in named for r in _registries(m)]
        self._attributes = [(f"{name}.{{}}" if name else "{}", vars(m), dict(_tensors(vars(m)))) for name, m in named]
        tensors = {id(t): t for _, _, saved in self._all() for t in saved.values() if t is not None}
        self._was = {key: (t, t.detach().requires_grad_(t.requires_grad)) for key, t in tensors.items()}
        self._layouts = {key: (_layout(t), t.requires_grad) for key, t in tensors.items()}

    def restore(self):
        """The same tensor objects in the same places, each with the memory, shape and dtype that it had.

        It runs no op, so that what made a load fail cannot make this fail.
        """
        for _, registry, saved in self._holders:
            registry.clear()
            registry.update(saved)
        for _, attributes, saved in self._attributes:
            for leaf in [leaf for leaf, _ in _tensors(attributes) if leaf not in saved]:
                del attributes[leaf]
            attributes.update(saved)
        for key, (t, was) in self._was.items():
            if (_layout(t), t.requires_grad) != self._layouts[key]:  # not the other one's, which is exchanged too
                torch._C._swap_tensor_impl(t, was)

    def put_back(self, module: torch.nn.Module, leaf: str):
        """One parameter or buffer, and its scale, as it was."""
        for _, registry, saved in self._holders:
            if registry is module._parameters or registry is module._buffers:
                for name in (leaf, f"{leaf}_scale"):
                    if saved.get(name) is not None:
                        t, was = self._was[id(saved[name])]
                        registry[name] = t
                        if not _is_same(t, was):
                            exchange(t, was, was.requires_grad)

    def commit(self, copies: Iterable[Pair], results: Iterable[Pair]):
        """Move the values that the model holds now into the memory that it held before, and restore that.

        Addresses stay what they were, whoever keeps them. Either everything moves or nothing.

        Args:
            copies: (storage from before, its copy that the model holds views of now), both as bytes.
            results: (tensor from before, tensor that holds its new values); the same one where they are there already.

        Raises:
            LoadError: something has another shape or dtype now; nothing has been moved.
        """
        copies, results = list(copies), list(results)
        copy_of = {was.untyped_storage()._cdata: now.untyped_storage() for was, now in copies}
        known = {now.untyped_storage()._cdata for _, now in (*copies, *results)}
        moves, added = [], []
        for name, registry, saved in self._all():
            for leaf, now in _tensors(registry):
                if saved.get(leaf) is None:
                    added.append((registry, leaf, now))
                    continue
                was = self._was[id(saved[leaf])][1]
                if _is_same(now, was) or now.untyped_storage()._cdata in known:
                    continue
                # From here on it is what a hook made.
                if (now.shape, now.dtype) != (was.shape, was.dtype):
                    raise LoadError(
                        f"`{name.format(leaf)}` must come out as it was, {was.dtype} of shape {tuple(was.shape)}, "
                        f"got {now.dtype} of shape {tuple(now.shape)}"
                    )
                copy = copy_of.get(was.untyped_storage()._cdata)
                if copy is None:
                    moves.append((was, now.detach()))
                else:
                    view_of(copy, was).copy_(now.detach())
        swap_values(_disjoint([*moves, *copies, *((was, now) for was, now in results if was is not now)]))

        def settle():
            self.restore()
            for registry, leaf, now in added:
                registry[leaf] = now

        uninterrupted(settle)

    def _all(self):
        return [*self._holders, *self._attributes]


def swap_values(pairs: Iterable[Pair]):
    """Exchange the values of tensors, piece by piece; after an exception all have what they had."""
    done: list[Pair] = []  # (memory, where its former values are)
    try:
        with torch.no_grad():
            for a, b in pairs:
                for piece, other in _pieces(a, b):
                    held = piece.clone()
                    done.append((piece, held))
                    piece.copy_(other)
                    other.copy_(held)
                    done[-1] = (piece, other)
    except BaseException:

        def restore():
            with torch.no_grad():
                for piece, former in reversed(done):
                    piece.copy_(former)

        uninterrupted(restore)
        raise


def _pieces(a, b) -> Iterator[Pair]:
    if not a.ndim or a.nbytes <= COMMIT_BYTES:
        yield a, b
    else:
        step = max(COMMIT_BYTES * len(a) // a.nbytes, 1)
        for start in range(0, len(a), step):
            yield a[start : start + step], b[start : start + step]


def _disjoint(moves):
    """The moves without those of memory that an earlier or larger one moves: ties, views of what moves as a whole."""
    whole: dict[int, list[tuple[int, int]]] = {}  # storage -> (first byte, end) of what has no gaps
    seen = set()
    for was, now in sorted(moves, key=lambda move: -move[0].nbytes):
        storage, start, size = was.untyped_storage()._cdata, was.storage_offset() * was.element_size(), was.nbytes
        extent = 1 + sum((n - 1) * stride for n, stride in zip(was.shape, was.stride(), strict=True))
        end, layout = start + extent * was.element_size(), (storage, start, was.shape, was.stride())
        inside = any(first <= start and end <= last for first, last in whole.get(storage, ()))
        if not size or layout in seen or inside:
            continue
        seen.add(layout)
        if extent == was.numel():
            whole.setdefault(storage, []).append((start, end))
        yield was, now


def view_of(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    """The tensor that is of this storage what `like` is of its own."""
    view = torch.empty(0, dtype=like.dtype, device=like.device)
    return view.set_(storage, like.storage_offset(), like.shape, like.stride())


def uninterrupted(step: Callable[..., None], *args):
    """Run the step to its end: Ctrl-C meanwhile is raised after it.

    Args:
        step: called with `args`; may be run again after it broke off anywhere.
    """
    interrupt = None
    while True:
        try:
            step(*args)
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def forget_frames(error: BaseException | None):
    """Let go of what the frames of an exception hold, so that device memory returns while the exception is kept.

    Debuggers, notebooks and test runners keep the last exception, and with its frames every buffer that a failed
    load was working on. Only frames that ended are cleared, and only ours and torch's.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            package = frame.f_globals.get("__name__", "").partition(".")[0]
            if package in _OUR_FRAMES and not frame.f_code.co_flags & inspect.CO_GENERATOR:
                with contextlib.suppress(RuntimeError):  # it still runs
                    frame.clear()
        error = error.__cause__ or error.__context__


def _registries(module):
    return module._parameters, module._buffers


def _tensors(registry):
    return [(leaf, t) for leaf, t in registry.items() if isinstance(t, torch.Tensor)]


def _is_same(t, was):
    return _layout(t) == _layout(was)


def _layout(t):
    return t.untyped_storage()._cdata, t.shape, t.stride(), t.storage_offset(), t.dtype
