"""Finished too late, or never: kinds of writes that are not seen, or not for what they write."""

from __future__ import annotations

import torch
from torch import nn

from ..case import Do, Load, Refused, Weights, Write, values
from .registry import Draft, row


@row("B", "numbers assigned to an expert, a row, everything, are writes")
def scalar_setitem(scheme):
    writes = [
        Write("experts.weight", 3.0, lambda p, x: p.data.__setitem__(0, x)),
        Write("experts.weight", 2, lambda p, x: p.data[1].fill_(x)),
        Write("experts.weight", None, lambda p, x: p.data[2].zero_()),
        Write("experts.weight", 1, lambda p, x: p.data.__setitem__((3, slice(0, 2)), x)),
        Write("experts.weight", torch.tensor(7.0), lambda p, x: p.data[3, 2:].copy_(x)),
    ]
    want = torch.zeros(4, 6, 36).bfloat16()
    want[0], want[1], want[3, :2], want[3, 2:] = 3, 2, 1, 7
    yield Draft("", {"experts": (4, 6, 36)}, Load(writes, {"experts.weight": want}))


def _mask(p, rows):
    mask = torch.zeros(p.shape, dtype=torch.bool)
    mask[rows] = True
    return mask


INDEX_WRITES = {
    "index_put_": lambda p, w, rows: p.index_put_((rows,), w[rows]),
    "index_copy_": lambda p, w, rows: p.index_copy_(0, rows, w[rows]),
    "scatter_": lambda p, w, rows: p.scatter_(0, rows[:, None].expand(-1, p.size(1)), w[rows]),
    "masked_scatter_": lambda p, w, rows: p.masked_scatter_(_mask(p, rows), w[rows.sort()[0]]),
    "index_list": lambda p, w, rows: p.__setitem__(rows.tolist(), w[rows]),
    "mask": lambda p, w, rows: p.__setitem__(_mask(p, rows), w[rows.sort()[0]].flatten()),
    "put_": lambda p, w, rows: p.put_((rows[:, None] * p.size(1) + torch.arange(p.size(1))).flatten(), w[rows]),
    "add_": lambda p, w, rows: [(p[r].zero_(), p[r].add_(w[r])) for r in rows.tolist()],
    "index_add_": lambda p, w, rows: (p.index_fill_(0, rows, 0), p.index_add_(0, rows, w[rows])),
    "lerp_": lambda p, w, rows: [(p[r].zero_(), p[r].lerp_(w[r], 1.0)) for r in rows.tolist()],
    "rows": lambda p, w, rows: [p[r].copy_(w[r]) for r in rows.tolist()],
}


@row("B", "each covers exactly what it writes")
def index_writes(scheme):
    for kind, write in INDEX_WRITES.items():
        for shape in ((6, 36), (2, 6, 36)):
            w = values(*shape)

            def loader(rows, write=write):
                def run(p, source):
                    for part, wanted in zip(*((p.data, source) if p.ndim == 3 else ([p.data], [source])), strict=True):
                        write(part, wanted, torch.tensor(rows))

                return run

            # Neither set of rows is a run, and only both together are the whole.
            halves = [Write("experts.weight", w, loader(rows)) for rows in ([0, 2, 3], [5, 1, 4])]
            variant = kind if len(shape) == 2 else f"{kind}_expert"
            yield Draft(variant, {"experts": shape}, Load(halves, {"experts.weight": w}))
            refused = Refused("incomplete", ("experts.weight",))
            yield Draft(f"{variant}_partly", {"experts": shape}, Load(halves[:1], refused=refused))
    w = values(6, 36)
    fills = [
        Write("fc.weight", w, lambda p, s: p.data.masked_fill_(s > 0, 1.0)),
        Write("fc.weight", w, lambda p, s: p.data.__setitem__(s <= 0, -1.0)),
    ]
    yield Draft("masked_fill_", {"fc": (6, 36)}, Load(fills, {"fc.weight": torch.where(w > 0, 1.0, -1.0).bfloat16()}))
    yield Draft("masked_fill__partly", {"fc": (6, 36)}, Load(fills[:1], refused=Refused("incomplete", ("fc.weight",))))


OUT_VARIANTS = {
    "stack": lambda w, out: torch.stack(list(w), out=out),
    "cat": lambda w, out: torch.cat([w[:2], w[2:]], out=out),
    "where": lambda w, out: torch.where(w > 0, w, w, out=out),
    "mul": lambda w, out: torch.mul(w, 1.0, out=out),
    "index_select": lambda w, out: torch.index_select(w, 0, torch.arange(len(w)), out=out),
}


@row("B", "results written straight into a weight are writes")
def out_variants(scheme):
    w = values(6, 36)
    for kind, op in OUT_VARIANTS.items():
        writes = [Write("fc.weight", w, lambda p, s, op=op: op(s, p.data))]
        writes += [Write("experts.weight", w, lambda p, s, op=op, e=e: op(s, p.data[e])) for e in range(2)]
        holds = {"fc.weight": w, "experts.weight": torch.stack([w, w])}
        yield Draft(kind, {"fc": (6, 36), "experts": (2, 6, 36)}, Load(writes, holds))


@row("B", "one op that writes several weights writes each")
def foreach_copy_(scheme):
    sources = {"a": values(6, 36), "b": values(3, 5), "c": values(7, 7)}
    shapes = {name: tuple(w.shape) for name, w in sources.items()}
    wanted = {f"{name}.weight": w for name, w in sources.items()}

    def on_all(function):
        return Do("write several weights", lambda s: function([p.data for p in s.params.values()], [*sources.values()]))

    yield Draft("", shapes, Load([on_all(torch._foreach_copy_)], wanted))

    def add_and_double(tensors, ws):
        torch._foreach_add_(tensors, ws)  # to what was never written, which reads as 0
        torch._foreach_mul_(tensors, 2.0)

    yield Draft("other_ops", shapes, Load([on_all(add_and_double)], {name: w * 2 for name, w in wanted.items()}))


REBINDINGS = {
    "data": lambda module, w: setattr(module.weight, "data", w),
    "set_": lambda module, w: module.weight.set_(w if module.weight.is_meta else w.to(module.weight.device)),
    "swap_tensors": lambda module, w: torch.utils.swap_tensors(module.weight, nn.Parameter(w)),
    "assign": lambda module, w: module.load_state_dict({"weight": w}, assign=True),
    "new_parameter": lambda module, w: setattr(module, "weight", nn.Parameter(w)),
    "registry": lambda module, w: module._parameters.__setitem__("weight", nn.Parameter(w)),
}


@row("B", "data that takes a weight's place is a full write, found by identity")
def rebinding(scheme):
    w, other = values(6, 36), values(3, 5)
    shapes = {"fc": (6, 36), "fc2": (3, 5)}
    last = Write("fc2.weight", other)

    def replace(kind, source):
        @torch.no_grad()
        def run(session):
            REBINDINGS[kind](session.model.fc, source.clone())

        return Do(f"replace the data of fc.weight by {kind}", run)

    for kind in REBINDINGS:
        load = Load([replace(kind, w), last], {"fc.weight": w, "fc2.weight": other})
        yield Draft(kind, shapes, load)
        load = Load([replace(kind, w), last], passes={"fc.weight": w}, facts={"ignore": ["fc.weight"]})
        yield Draft(f"{kind}_high_precision", shapes, load)
        narrow = Load([last, replace(kind, w[:, :35])], refused=Refused("any"))
        yield Draft(f"{kind}_of_another_shape", shapes, narrow)


@row("B", "impossible, with an error: nothing can write behind the loader's back")
def numpy_or_dlpack_alias(scheme):
    w = values(6, 36, dtype=torch.float32)

    def make():
        return Weights(fc=(6, 36), dtype=torch.float32)

    for variant, alias in (("numpy", lambda p: p.data.numpy()), ("dlpack", lambda p: torch.from_dlpack(p.data))):
        write = Write("fc.weight", w, lambda p, source, alias=alias: alias(p).__setitem__(slice(None), source))
        yield Draft(variant, make, Load([write], refused=Refused("any")))


@row("B", "no dry run that could disagree: `p[i] = 3.0` is a copy_ on meta and a fill_ elsewhere")
def device_dependent_op(scheme):
    writes = [Write("fc.weight", float(i), lambda p, x, i=i: p.data.__setitem__(i, x)) for i in range(6)]
    want = torch.arange(6.0).view(6, 1).expand(6, 36).bfloat16()
    yield Draft("", {"fc": (6, 36)}, Load(writes, {"fc.weight": want}))
