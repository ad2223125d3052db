"""Reload: new weights over a model that serves, at the same addresses."""

from __future__ import annotations

import torch
from torch import nn

from ..bits import assert_same_bits
from ..case import Do, Load, Refused, Weights, Write, values
from .registry import Draft, row
from .too_early import rows_of

MODES = ("transactional", "streaming")
SHAPES = {"qkv": (9, 64), "fc": (7, 33), "experts": (3, 5, 36)}


def _make():
    """Weights, and a norm that passes through."""
    model = Weights(**SHAPES)
    model.norm = nn.LayerNorm(64, device="meta", dtype=torch.bfloat16)
    return model


def _state():
    state = {f"{name}.weight": values(*shape) for name, shape in SHAPES.items()}
    return state | {"norm.weight": values(64), "norm.bias": values(64)}


def _holds(state):
    """The two halves of what a `Load` expects."""
    quantized = {name: w for name, w in state.items() if not name.startswith("norm")}
    return {"holds": quantized, "passes": {name: w for name, w in state.items() if name not in quantized}}


def _writes(state):
    """Shards, as an engine copies them: qkv in three parts, experts one by one."""
    writes = []
    for name, w in state.items():
        if name == "qkv.weight":
            writes += [Write(name, w[i : i + 3], rows_of(i, i + 3)) for i in (0, 3, 6)]
        elif name == "experts.weight":
            writes += [Write(name, w[e], lambda p, source, e=e: p.data[e].copy_(source)) for e in range(3)]
        else:
            writes.append(Write(name, w))
    return writes


def _first(state):
    return Load(_writes(state), **_holds(state))


def _addresses(session):
    """Where every weight, scale and pass-through tensor lies."""
    tensors = {**dict(session.model.named_parameters()), **dict(session.model.named_buffers())}
    where = {name: t.data_ptr() for name, t in tensors.items()}
    for name in session.load.holds:
        q, scale = session.adapter.result(session.model, name)
        where[name], where[f"{name}_scale"] = q.data_ptr(), scale.data_ptr()
    return where


class _Unmoved:
    """Notes addresses after one load, and compares them after the next."""

    def note(self, session):
        self._where = _addresses(session)

    def compare(self, session):
        now = _addresses(session)
        moved = [name for name, address in self._where.items() if now.get(name) != address]
        assert not moved, f"{len(moved)} of {len(self._where)} tensors have moved: {', '.join(moved[:4])}"


def _reloads(mode, *states):
    """A first load and reloads with other values, nothing moving."""
    unmoved = _Unmoved()
    first = Load(_writes(states[0]), **_holds(states[0]), check=unmoved.note)
    return [first, *(Load(_writes(s), **_holds(s), mode=mode, check=unmoved.compare) for s in states[1:])]


def _fail(session):
    raise OSError("the connection is gone")


@row("F", "transactional: the old weights serve, bit for bit; streaming: the model is marked, by name")
def exception_mid_reload(scheme):
    old, new = _state(), _state()
    writes = _writes(new)
    for position in (0, 1, 2, len(writes) - 1, len(writes)):
        steps = [*writes[:position], Do("the sender goes away", _fail)]
        broken = Load(steps, refused=Refused(OSError, restored=True), mode="transactional")
        again = Load(writes, **_holds(new), mode="transactional")
        yield Draft(f"transactional_after_{position}", _make, [_first(old), broken, again])

    def marked(session):
        names = session.adapter.half_loaded(session.model)
        assert "qkv.weight" in names, f"qkv.weight is half loaded, and only these are known to be: {names}"

    def healed(session):
        names = session.adapter.half_loaded(session.model)
        assert not names, f"everything has been loaded again, and {names} count as half loaded"

    steps = [*writes[:4], Do("the sender goes away", _fail)]
    broken = Load(steps, refused=Refused(OSError), mode="streaming", check=marked)
    again = Load(writes, **_holds(new), mode="streaming", check=healed)
    yield Draft("streaming", _make, [_first(old), broken, again], {"poison"})


@row("F", "refused before it serves: the old weights stay")
def bad_tensor_buffered_before_validation(scheme):
    old, new = _state(), _state()
    bad = dict(new)
    bad["fc.weight"] = new["fc.weight"].clone()
    bad["fc.weight"][3, 4] = float("nan")
    refused = Refused("non_finite", ("fc.weight",), restored=True)
    load = Load(_writes(bad), refused=refused, mode="transactional")
    yield Draft("nan", _make, [_first(old), load, Load(_writes(new), **_holds(new), mode="transactional")])
    narrow = {**new, "fc.weight": new["fc.weight"][:, :32]}
    load = Load(_writes(narrow), refused=Refused("any", restored=True), mode="transactional")
    yield Draft("shape", _make, [_first(old), load])
    missing = {name: w for name, w in new.items() if name != "fc.weight"}
    refused = Refused("incomplete", ("fc.weight",), restored=True)
    yield Draft("missing", _make, [_first(old), Load(_writes(missing), refused=refused, mode="transactional")])


@row("F", "every address stays, so what was captured replays with the new weights")
def cuda_graph_pointers(scheme):
    for mode in MODES:
        yield Draft(mode, _make, _reloads(mode, _state(), _state(), _state()))

    old, new = _state(), _state()
    for mode in MODES:
        graph = _Graph("experts.weight")
        loads = [Load(_writes(old), **_holds(old), check=graph.capture)]
        loads.append(Load(_writes(new), **_holds(new), mode=mode, check=graph.replay))
        yield Draft(f"graph_{mode}", _make, loads, {"cuda"})


class _Graph:
    """A CUDA graph that reads a weight and its scale, captured after one load and replayed after the next."""

    def __init__(self, name: str):
        self._name = name

    def capture(self, session):
        q, scale = session.adapter.result(session.model, self._name)
        self._seen = torch.empty_like(q.detach()), torch.empty_like(scale.detach())
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            for seen, t in zip(self._seen, (q, scale), strict=True):
                seen.copy_(t)

    def replay(self, session):
        self._graph.replay()
        torch.cuda.synchronize()
        wanted = session.adapter.expected(session.load.holds[self._name], session.case.scheme)
        for what, seen, t in zip(("codes", "scales"), self._seen, wanted, strict=True):
            assert_same_bits(seen.cpu().reshape(t.shape), t.cpu(), f"the {what} that the graph reads")


@row("F", "loaders see the checkpoint's layout, always, whatever layout the kernels made of it")
def stale_weight_loader(scheme):
    old, new = values(9, 36), values(9, 36)

    def transpose(session, module):
        """What an engine does for its kernels: another layout in the weight's place."""
        module.weight = nn.Parameter(module.weight.data.t().contiguous(), requires_grad=False)

    def check(w):
        def look(session):
            held = session.model.fc.weight
            wanted = session.adapter.expected(w, session.case.scheme)[0].t().contiguous()
            assert_same_bits(held.detach().cpu(), wanted.cpu(), "fc.weight in the kernels' layout")

        return look

    # A loader that works on the checkpoint's layout only: three shards of rows.
    def loads(w, mode):
        writes = [Do(f"load rows {i}:{i + 3}", _onto_current("fc.weight", w[i : i + 3], i)) for i in (0, 3, 6)]
        return Load(writes, on_module=transpose, check=check(w), mode=mode)

    yield Draft("", {"fc": (9, 36)}, [loads(old, "first"), loads(new, "transactional")])


def _onto_current(name, source, start):
    """Copy rows into the parameter that the model has now, as engines that look it up in each load do."""

    def run(session):
        p = session.model.get_parameter(name)
        session.params[name] = p
        session.write(name, source, rows_of(start, start + len(source)))

    return run


@row("F", "one session takes any number of calls; what it has at its end counts")
def chunked_updates(scheme):
    old, new = _state(), _state()
    for mode in MODES:
        chunks = [Do("a call with one chunk", lambda s, w=write: w(s)) for write in _writes(new)]
        yield Draft(mode, _make, [_first(old), Load(chunks, **_holds(new), mode=mode)])


@row("F", "what is named is loaded, the rest is neither needed nor touched")
def partial_update(scheme):
    old, new = _state(), _state()
    for mode in MODES:
        mixed = {**old, "qkv.weight": new["qkv.weight"], "norm.bias": new["norm.bias"]}
        some = {name: new[name] for name in ("qkv.weight", "norm.bias")}
        unmoved = _Unmoved()
        first = Load(_writes(old), **_holds(old), check=unmoved.note)
        facts = {"scope": ["qkv.weight", "norm.bias"]}
        load = Load(_writes(some), **_holds(mixed), facts=facts, mode=mode, check=unmoved.compare)
        yield Draft(mode, _make, [first, load])
        beyond = Load(_writes({**some, "fc.weight": new["fc.weight"]}), refused=Refused("load"), facts=facts, mode=mode)
        yield Draft(f"{mode}_beyond", _make, [first, beyond], {"scope"})


def _counted(session, module):
    name = next(name for name, m in session.model.named_modules() if m is module)
    session.notes.setdefault("processed", []).append(name)


@row("F", "modules that need others come last, in a fixed order, once: in `on_finish`")
def deferred_module(scheme):
    old, new = _state(), _state()

    def finish(session, model):
        session.notes["processed"].append("the model")
        for name in session.load.holds:
            q, scale = session.adapter.result(model, name)
            assert q.dtype == torch.float8_e4m3fn and not scale.is_meta, f"{name} is not final in `on_finish`"

    def last_and_once(session):
        order = session.notes["processed"]
        assert order[-1] == "the model" and order.count("the model") == 1, f"processed in the order {order}"

    hooks = {"on_module": _counted, "on_finish": finish, "check": last_and_once}
    for mode in MODES:
        loads = [Load(_writes(old), **_holds(old), **hooks), Load(_writes(new), **_holds(new), **hooks, mode=mode)]
        yield Draft(mode, _make, loads)


@row("F", "exactly once a load for each module, never again at its end")
def engine_post_processing(scheme):
    old, new = _state(), _state()

    def once_each(session):
        order = session.notes["processed"]
        wanted = [name.rpartition(".")[0] for name in session.load.holds]
        assert all(order.count(name) == 1 for name in wanted), f"processed {order}, each of {wanted} has to be once"
        assert len(set(order)) == len(order), f"processed {order}, some twice"

    for mode in MODES:
        hooks = {"on_module": _counted, "check": once_each}
        loads = [Load(_writes(old), **_holds(old), **hooks), Load(_writes(new), **_holds(new), **hooks, mode=mode)]
        yield Draft(mode, _make, loads)


@row("F", "only what received data is processed again")
def non_idempotent_post_processing(scheme):
    old, new = _state(), _state()

    def only(*names):
        def look(session):
            order = session.notes.get("processed", [])
            assert order == list(names), f"processed {order}, and only {', '.join(names)} received data"

        return look

    for mode in MODES:
        mixed = {**old, "qkv.weight": new["qkv.weight"]}
        load = Load(
            _writes({"qkv.weight": new["qkv.weight"]}),
            **_holds(mixed),
            facts={"scope": ["qkv.weight"]},
            mode=mode,
            on_module=_counted,
            check=only("qkv"),
        )
        yield Draft(mode, _make, [_first(old), load])


@row("F", "aliases of weights and buffers stay aliases; what no checkpoint holds keeps its value")
def alias_and_non_persistent_buffers(scheme):
    old, new = values(7, 64), values(7, 64)

    def make():
        model = Weights(a=(7, 64), b=(7, 64))
        model.b.weight = model.a.weight
        model.a.register_buffer("cos", torch.arange(5.0), persistent=False)
        return model

    def alias(session):
        session.model.a.register_buffer("codes", session.model.a.weight.data, persistent=False)

    def still(session):
        a, b = session.model.a, session.model.b
        assert a.weight.data_ptr() == b.weight.data_ptr(), "the weights are not tied any more"
        assert a.codes.data_ptr() == a.weight.data_ptr(), "the buffer does not alias the weight any more"
        assert_same_bits(a.codes.cpu(), a.weight.detach().cpu(), "the aliasing buffer")
        assert torch.equal(a.cos.cpu(), torch.arange(5.0)), "a buffer that no checkpoint holds has changed"

    for mode in MODES:
        first = Load([Write("a.weight", old)], {"a.weight": old, "b.weight": old}, check=alias)
        load = Load([Write("a.weight", new)], {"a.weight": new, "b.weight": new}, mode=mode, check=still)
        yield Draft(mode, make, [first, load])
