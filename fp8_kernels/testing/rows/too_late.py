"""Finished too late, or never: what nobody loads is waited for, and what is missing is not missed."""

from __future__ import annotations

import torch
from torch import nn

from ..case import Do, Load, Refused, Weights, Write, values
from .registry import Draft, row
from .too_early import rows_of


def is_final(*names):
    """A step: these modules are final by now, one held open for composed loaders being the most that may wait."""

    def look(session):
        late = [name for name in names if name not in session.finished]
        assert not late, f"every element of {', '.join(late)} has arrived, and it is still open"

    return Do(f"look whether {', '.join(names)} is final", look)


@row("B", "only what a checkpoint can hold is waited for")
def never_loaded_buffer(scheme):
    w, other = values(4, 6, 36), values(3, 5)

    def make():
        model = Weights(experts=(4, 6, 36), fc=(3, 5))
        model.experts.register_buffer("_expert_map", torch.arange(32), persistent=False)
        model.experts.register_buffer("routing_table", torch.arange(7))
        return model

    steps = [Write("experts.weight", w), Write("fc.weight", other), is_final("experts")]
    load = Load(steps, {"experts.weight": w, "fc.weight": other}, {"experts.routing_table": torch.arange(7)})
    yield Draft("", make, load, {"progress"})


@row("B", "a tensor in two modules is one tensor to wait for")
def alias_counted_twice(scheme):
    w, bias = values(6, 36), torch.arange(64.0)

    def make():
        model = Weights(a=(6, 36), b=(6, 36), c=(6, 36))
        model.a.e_score_correction_bias = nn.Parameter(torch.empty(64, device="meta"))
        model.b.e_score_correction_bias = model.a.e_score_correction_bias
        return model

    steps = [Write("a.e_score_correction_bias", bias), Write("a.weight", w), Write("b.weight", w * 2)]
    steps += [Write("c.weight", w), is_final("a", "b")]

    def aliased(session):
        a, b = session.model.a, session.model.b
        assert a.e_score_correction_bias is b.e_score_correction_bias, "the tensor is not the same in both any more"

    holds = {"a.weight": w, "b.weight": w * 2, "c.weight": w}
    load = Load(steps, holds, {"a.e_score_correction_bias": bias}, check=aliased)
    yield Draft("", make, load, {"progress"})


@row("B", "what to wait for is settled when loading starts; a tensor that comes later is the engine's, or refused")
def bias_registered_later(scheme):
    w = values(6, 36)

    def register(device):
        def run(session):
            bias = nn.Parameter(torch.empty(6, dtype=torch.bfloat16, device=device))
            session.model.fc.register_parameter("bias", bias)

        return Do(f"register a bias on {device}", run)

    fill = Do("load the bias", lambda s: s.model.fc.bias.data.copy_(w[:, 0]))
    steps = [register("cpu"), Write("fc.weight", w), fill]
    yield Draft("real", {"fc": (6, 36)}, Load(steps, {"fc.weight": w}, {"fc.bias": w[:, 0].clone()}))
    steps = [register("meta"), Write("fc.weight", w)]
    yield Draft("on_meta", {"fc": (6, 36)}, Load(steps, refused=Refused("load", ("fc.bias",), restored=True)))


def _linear():
    model = nn.Module()
    model.fc = nn.Linear(36, 6, device="meta", dtype=torch.bfloat16)
    return model


@row("B", "what may be absent has a default; what may not is missed")
def bias_absent_from_checkpoint(scheme):
    w = values(6, 36)
    write, facts = Write("fc.weight", w), {"optional": ["*.bias"]}
    zero = torch.zeros(6).bfloat16()
    yield Draft("named", _linear, Load([write], {"fc.weight": w}, {"fc.bias": zero}, facts=facts))
    yield Draft("not_named", _linear, Load([write], refused=Refused("incomplete", ("fc.bias",))))
    half = Write("fc.bias", 0, lambda p, source: p.data[:2].fill_(source))
    load = Load([write, half], refused=Refused("incomplete", ("fc.bias",)), facts=facts)
    yield Draft("half_of_it", _linear, load)
    nothing = {"fc.weight": torch.zeros(6, 36).bfloat16()}
    load = Load([Write("fc.bias", w[:, 0])], nothing, {"fc.bias": w[:, 0].clone()}, facts={"optional": ["fc.weight"]})
    yield Draft("the_weight", _linear, load)


@row("B", "the part that a checkpoint holds completes it; padding is 0 and in no scale")
def padded_weight(scheme):
    shapes, other = {"fc": (128, 576), "fc2": (3, 5), "fc3": (3, 5)}, values(3, 5)
    for rows, cols in ((100, 576), (128, 500), (100, 500)):
        w = values(rows, cols)
        padded = torch.zeros(128, 576).bfloat16()
        padded[:rows, :cols] = w

        def corner(p, source):
            p.data[: source.size(0), : source.size(1)].copy_(source)

        garbage = torch.full((128, 576), 1000.0).bfloat16()
        garbage[:rows, :cols] = w
        facts = {"logical_shapes": {"fc": (rows, cols)}}
        rest = [Write("fc2.weight", other), is_final("fc"), Write("fc3.weight", other)]
        holds = {"fc.weight": padded, "fc2.weight": other}
        load = Load([Write("fc.weight", w, corner), *rest], holds, facts=facts)
        yield Draft(f"{rows}x{cols}", shapes, load, {"progress"})
        load = Load([Write("fc.weight", garbage), *rest, Write("fc.weight", garbage)], holds, facts=facts)
        yield Draft(f"{rows}x{cols}_written", shapes, load, {"progress"})

    w = values(100, 500)
    padded = torch.zeros(128, 576).bfloat16()
    padded[:100, :500] = w
    outside = [
        Write("fc.weight", 7.0, lambda p, x: p.data[104:].fill_(x)),
        Write("fc.weight", 7.0, lambda p, x: p.data[:, 500:].fill_(x)),
        Write("fc.weight", 7.0, lambda p, x: p.data[101::2].fill_(x)),
    ]
    steps = [Write("fc.weight", w, corner), Write("fc2.weight", other), *outside, Write("fc3.weight", other)]
    facts = {"logical_shapes": {"fc": (100, 500)}}
    yield Draft("written_when_final", shapes, Load(steps, {"fc.weight": padded}, facts=facts))

    def embedding():
        model = nn.Module()
        model.embed = nn.Embedding(64, 36, device="meta", dtype=torch.bfloat16)
        return model

    w = values(50, 36)
    padded = torch.cat([w, torch.zeros(14, 36).bfloat16()])
    load = Load(
        [Write("embed.weight", w, rows_of(0, 50))],
        passes={"embed.weight": padded},
        facts={"logical_shapes": {"embed": (50, 36)}},
    )
    yield Draft("vocabulary", embedding, load)


@row("B", "complete from the start, written or not")
def zero_size_tensor(scheme):
    for shape in ((0, 36), (6, 0), (0, 0), (0, 6, 36), (3, 0, 36)):
        nothing = torch.empty(shape).bfloat16()
        variant = "x".join(map(str, shape))
        for suffix, steps in (("", []), ("_written", [Write("experts.weight", nothing)])):
            yield Draft(variant + suffix, {"experts": shape}, Load(steps, {"experts.weight": nothing}))


@row("B", "a rank whose part is empty finishes like the others")
def rank_with_nothing_to_load(scheme):
    w = values(6, 36)
    narrowed = Write("empty.weight", w, lambda p, source: p.data.copy_(source.narrow(0, 6, 0)))
    load = Load([narrowed, Write("fc.weight", w)], {"empty.weight": w[6:], "fc.weight": w})
    yield Draft("", {"empty": (0, 36), "fc": (6, 36)}, load)


@row("B", "experts of other ranks are never held")
def non_local_expert(scheme):
    w, local = values(8, 6, 36), {4: 0, 5: 1}

    def loader(expert):
        def run(p, source):
            if expert in local:
                p.data[local[expert]].copy_(source)

        return run

    writes = [Write("experts.weight", lambda e=e: w[e], loader(e)) for e in range(8)]
    load = Load(writes, {"experts.weight": w[4:6]}, retained_bytes=0)
    yield Draft("", {"experts": (2, 6, 36)}, load)


@row("B", "a slot for a redundant expert is missed if it stays empty, and quantized if not")
def redundant_expert_slot(scheme):
    w, shapes = values(3, 6, 36), {"experts": (3, 6, 36)}
    first = Write("experts.weight", w, lambda p, source: p.data[:2].copy_(source[:2]))
    yield Draft("forgotten", shapes, Load([first], refused=Refused("incomplete", ("experts.weight",))))
    copy = Write("experts.weight", w[0], lambda p, source: p.data[2].copy_(source))
    yield Draft("filled", shapes, Load([first, copy], {"experts.weight": w[[0, 1, 0]]}))


@row("B", "what the model computed (rotary caches) is not tracked and not touched, also on failure")
def init_valued_tensor(scheme):
    w, cos, table = values(6, 36), torch.randn(7, 5), torch.randn(3)

    def make():
        model = Weights(fc=(6, 36))
        model.fc.register_buffer("cos", cos.clone(), persistent=False)
        model.fc.register_buffer("table", table.clone())
        return model

    failed = Load([], refused=Refused("incomplete", ("fc.weight",), restored=True))
    load = Load([Write("fc.weight", w)], {"fc.weight": w}, {"fc.cos": cos, "fc.table": table})
    yield Draft("", make, [failed, load])


@row("B", "an error that names parameters, not garbage")
def missing_shard(scheme):
    shapes = {"gate_up_proj": (5632, 8), "down": (8, 30), "experts": (5, 6, 36)}
    zero = {
        "rows": Write("gate_up_proj.weight", None, lambda p, _: p.data[:2816].zero_()),
        "columns": Write("down.weight", None, lambda p, _: p.data[:, 10:20].zero_()),
        "experts": Write("experts.weight", None, lambda p, _: (p.data[0].zero_(), p.data[1, 3:, :7].zero_())),
    }
    refused = Refused("incomplete", tuple(f"{name}.weight" for name in shapes), restored=True)
    yield Draft("", shapes, Load([*zero.values()], refused=refused))
    whole = Write("gate_up_proj.weight", None, lambda p, _: p.data.zero_())
    one = {"gate_up_proj": (5632, 8), "down": (8, 30)}
    load = Load([whole, zero["columns"]], refused=Refused("incomplete", ("down.weight",)))
    yield Draft("columns", one, load)


@row("B", "an error that names it")
def missing_layer(scheme):
    shapes, refused = {"a": (6, 36), "b": (6, 36)}, Refused("incomplete", ("b.weight",), restored=True)
    write = Write("a.weight", values(6, 36))
    yield Draft("", shapes, Load([write], refused=refused))
    yield Draft("nothing_at_all", shapes, Load([], refused=Refused("incomplete", ("a.weight", "b.weight"))))


@row("B", "its high-precision part is bounded, however much comes between")
def one_layer_across_files(scheme):
    num, shape = 12, (16, 64)
    w = {f"fc{i}": values(*shape) for i in range(num)}
    size = shape[0] * shape[1] * 2
    halves = [
        Write(f"{name}.weight", lambda x=x, a=a: x[a : a + 8], rows_of(a, a + 8))
        for a in (0, 8)
        for name, x in w.items()
    ]
    budget = 3 * size
    load = Load(
        halves,
        {f"{name}.weight": x for name, x in w.items()},
        facts={"staging_budget": budget},
        staged_bytes=budget,
        retained_bytes=0,
    )
    yield Draft("", {name: shape for name in w}, load)
