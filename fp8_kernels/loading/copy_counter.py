"""Seeing every read and write of a tracked tensor, below whatever the engine calls to make it.

Tracked weights live on the meta device. Views of them stay there; an op that reads or writes their elements is
carried out on real memory instead (see `writes`). For that to work nothing real may become meta on its way into a
weight, so data that the engine sends to its parameter's device, or wraps into a tensor there, stays real.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from .echoes import COPYING
from .op_info import op_info
from .writes import Writes

_FOREACH = {  # name -> the op for each of its tensors
    "_foreach_copy_": torch.ops.aten.copy_.default,
    "_foreach_zero_": torch.ops.aten.zero_.default,
}


class CopyCounter(TorchDispatchMode):
    """Carries out reads and writes of tracked tensors through `writes`, and leaves every other op alone.

    A mode belongs to the thread that enters it; a second thread enters one of its own.
    """

    def __init__(self, writes: Writes):
        super().__init__()
        self._writes = writes
        self._function_mode = _KeepReal(writes)

    @classmethod
    def _should_skip_dynamo(cls):
        # torch wraps the handler to keep torch.compile out of it, for which it imports all of torch._dynamo
        # (1.7 s) at the first op; loading code is not compiled.
        return False

    def __enter__(self):
        self._function_mode.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        self.leave()

    def leave(self):
        """Leave the mode, however much of it was entered or left before. On the thread that entered it."""
        _take_out(self, _get_current_dispatch_mode_stack(), TorchDispatchMode)
        _take_out(self._function_mode, _get_current_function_mode_stack(), TorchFunctionMode)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        info = op_info(func)
        if info is None or (info.is_view and not _sets_storage(info)):
            return func(*args, **kwargs)
        targets: list = []
        if info.writes:
            for i in info.written_args:
                self._find(args[i] if i < len(args) else None, True, targets)
            for name in info.written_kwargs:
                self._find(kwargs.get(name), True, targets)
        if _sets_storage(info):
            return self._set(func, args, kwargs, targets)
        written = {id(t.tensor) for t in targets}
        self._find_read(args, written, targets)
        if kwargs:
            self._find_read(kwargs.values(), written, targets)
        if not targets:
            if info.name in ("_to_copy", "scalar_tensor") and _is_meta(kwargs.get("device")):
                return self._stay_real(func, info, args, kwargs)
            result = func(*args, **kwargs)
            if info.name in COPYING and isinstance(result, torch.Tensor) and isinstance(args[0], torch.Tensor):
                self._writes.copied(args[0], result)
            return result
        if info.is_like:
            device = kwargs.get("device")
            return func(*args, **{**kwargs, "device": self._writes.device if _is_meta(device or "meta") else device})
        if info.name in _FOREACH:
            for part in zip(*(arg for arg in args if isinstance(arg, (list, tuple))), strict=True):
                self.__torch_dispatch__(_FOREACH[info.name], types, part)
            return None
        if info.name == "_to_copy" and _is_meta(kwargs.get("device")):
            kwargs = {**kwargs, "device": self._writes.device}
        return self._writes.run(func, info, args, kwargs, targets)

    def _find(self, x, written, targets):
        if isinstance(x, torch.Tensor):
            target = self._writes.find(x, written)
            if target is not None:
                targets.append(target)
        elif isinstance(x, (list, tuple)):
            for item in x:
                self._find(item, written, targets)

    def _find_read(self, args, written, targets):
        """Only weights on meta have to be found when they are read; and real ones that are tied."""
        for x in args:
            if isinstance(x, torch.Tensor):
                if (x.is_meta or self._writes.has_tied_real) and id(x) not in written:
                    self._find(x, False, targets)
            elif isinstance(x, (list, tuple)):
                self._find_read(x, written, targets)

    def _stay_real(self, func, info, args, kwargs):
        """A number or a real tensor on its way to the meta device."""
        if info.name == "_to_copy" and args[0].is_meta:
            return func(*args, **kwargs)
        device = torch.device("cpu") if info.name == "scalar_tensor" else self._writes.device
        return func(*args, **{**kwargs, "device": device})

    def _set(self, func, args, kwargs, targets):
        """`weight.set_(data)` with real data is a write; other uses only make views."""
        source = args[1] if len(args) > 1 else None
        if targets and targets[0].tensor.is_meta and isinstance(source, torch.Tensor) and not source.is_meta:
            self._writes.assign(targets[0].tracked, args[0], source)
            return args[0]
        return func(*args, **kwargs)


def _take_out(mode, stack, kind):
    """Leave a mode of that kind; those that were entered after it, as another load's, stay."""
    if mode not in stack:
        return
    above = stack[stack.index(mode) + 1 :]
    for each in (*reversed(above), mode):
        kind.__exit__(each, None, None, None)
    for each in above:
        kind.__enter__(each)


class _KeepReal(TorchFunctionMode):
    """What dispatch comes too late for: it sees indices, data and replaced storage only after their values are lost."""

    def __init__(self, writes: Writes):
        super().__init__()
        self._writes = writes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        handler = _HANDLERS.get(func)
        if handler is _ITEM:
            handler = _VIEW if type(args[1]) is int or _is_view(args[1]) else _with_real_index
        if handler is _VIEW and _num_modes() == 1 and type(args[0]).__torch_dispatch__ is _NO_DISPATCH:
            # A view reads and writes nothing, so `CopyCounter` need not see it, which takes most of a view's time.
            guard = None
            try:
                guard = _BelowDispatch()
                return func(*args, **kwargs) if kwargs else func(*args)
            finally:
                del guard
        if handler is None or handler is _VIEW:
            return func(*args, **kwargs) if kwargs else func(*args)
        return handler(self._writes, func, args, kwargs or {})


class BelowModes:
    """Inside, no mode and no function of a class of its own sees what torch does, on this thread."""

    def __enter__(self):
        self._functions = torch._C.DisableTorchFunction()
        self._functions.__enter__()
        self._dispatch = _BelowDispatch()  # which is in force as long as there is this object

    def __exit__(self, *exc):
        del self._dispatch
        self._functions.__exit__(*exc)


def _is_view(index):
    """Has it only numbers and slices?"""
    return type(index) in _SIMPLE or (type(index) is tuple and all(type(i) in _SIMPLE for i in index))


_SIMPLE = {int, slice, type(None), type(...)}
_num_modes, _num_function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_BelowDispatch = torch._C._DisableTorchDispatch
_NO_DISPATCH = torch.Tensor.__torch_dispatch__


def _copy(writes, func, args, kwargs):
    """A shard of a weight, in the usual case; seen by nothing but `CopyCounter`: no other mode, no class of its own."""
    destination = args[0]
    if (
        len(args) == 2
        and isinstance(args[1], torch.Tensor)
        and (not kwargs or (len(kwargs) == 1 and "non_blocking" in kwargs))
        and _num_modes() == 1
        and type(destination).__torch_dispatch__ is _NO_DISPATCH
    ):
        guard = None
        try:
            guard = _BelowDispatch()
            if writes.take(destination, args[1], **kwargs):
                return destination
        finally:
            del guard
    return func(*args, **kwargs) if kwargs else func(*args)


def _with_real_index(writes, func, args, kwargs):
    if isinstance(args[0], torch.Tensor) and args[0].is_meta:
        args = (args[0], _real_index(args[1]), *args[2:])
    return func(*args, **kwargs)


def _real_index(index):
    """Lists and arrays as tensors, which torch would else make on the device of what they index."""
    if isinstance(index, tuple):
        return tuple(map(_real_index, index))
    if isinstance(index, torch.Tensor) or not (isinstance(index, Sequence) or hasattr(index, "__array__")):
        return index
    return torch.as_tensor(index, device="cpu")


def _with_real_data(writes, func, args, kwargs):
    if _is_meta(kwargs.get("device")) and not (isinstance(args[0], torch.Tensor) and args[0].is_meta):
        kwargs = {**kwargs, "device": writes.device}
    return func(*args, **kwargs)


def _unseen(func, args, kwargs):
    """Call below this thread's dispatch modes."""
    guard = None
    try:
        guard = _BelowDispatch()
        return func(*args, **kwargs)
    finally:
        del guard


def _asarray(writes, func, args, kwargs):
    """What a storage or an array holds, as `safe_open` gives it: that is nothing tracked, whatever ops it takes."""
    held = args[0]
    if isinstance(held, torch.Tensor) or _is_meta(kwargs.get("device")) or _num_modes() != 1:
        return _with_real_data(writes, func, args, kwargs)
    its_bytes = type(held) is torch.UntypedStorage and kwargs in _ITS_BYTES and held.device.type == "cpu"
    stays = "device" in kwargs or not _num_function_modes()  # which might send it elsewhere
    return _unseen(_bytes_of, args, {}) if its_bytes and stays else _unseen(func, args, kwargs)


def _bytes_of(storage):
    """What `asarray` does after it has read the first byte: of a mapped file a page fault, longer than all the rest."""
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


_ITS_BYTES = ({"dtype": torch.uint8, "device": "cpu"}, {"dtype": torch.uint8})


def _reshape(writes, func, args, kwargs):
    """Of real memory, a view or a copy that nothing has to know of; of a tracked weight it may read."""
    known = args[0].is_meta or writes.has_tied_real or type(args[0]).__torch_dispatch__ is not _NO_DISPATCH
    if known or _num_modes() != 1:
        return func(*args, **kwargs)
    return _unseen(func, args, kwargs)


def _new_tensor(writes, func, args, kwargs):
    if not args[0].is_meta or not _is_meta(kwargs.get("device") or "meta"):
        return func(*args, **kwargs)
    return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs, "device": writes.device})


def _set_data(writes, func, args, kwargs):
    """`weight.data = tensor`: torch refuses a real tensor for a meta one; here it is a write of the whole."""
    destination, value = args
    if destination.is_meta and isinstance(value, torch.Tensor) and not value.is_meta:
        target = writes.find(destination, written=True)
        if target is not None:
            writes.assign(target.tracked, destination, value)
            return None
    return func(*args, **kwargs)


_VIEW, _ITEM = object(), object()  # an item is a view or not, depending on the index
_VIEWS = ("narrow", "select", "t", "transpose", "permute", "view", "unsqueeze", "squeeze", "unbind", "chunk", "split")
_HANDLERS = {
    **{getattr(torch.Tensor, name): _VIEW for name in _VIEWS},
    torch.Tensor.detach: _VIEW,
    torch.Tensor.data.__get__: _VIEW,
    torch.Tensor.copy_: _copy,
    torch.Tensor.reshape: _reshape,
    torch.Tensor.__getitem__: _ITEM,
    torch.Tensor.__setitem__: _with_real_index,
    torch.tensor: _with_real_data,
    torch.as_tensor: _with_real_data,
    torch.asarray: _asarray,
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.data.__set__: _set_data,
}


def _sets_storage(info):
    return info.name == "set_"


def _is_meta(device):
    return device is not None and torch.device(device).type == "meta"
