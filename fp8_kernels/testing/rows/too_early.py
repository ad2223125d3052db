"""Finished too early: what is counted twice, or counted and not the weight, completes a weight that is not whole."""

from __future__ import annotations

import torch
from torch import nn

from ..case import Do, Load, Refused, Weights, Write, values
from .registry import Draft, row


def rows_of(start, end):
    """A loader that copies into these rows."""
    return lambda p, source: p.data[start:end].copy_(source)


@row("A", "distinct elements count; the read sees what was written")
def composed_loader(scheme):
    w, other = values(7, 576), values(9, 33)

    def twice(p, source):
        p.data.copy_(source)
        p.data.copy_(p.data * 2 + 1)

    steps = [Write("fc.weight", w, twice), Write("fc2.weight", other)]
    holds = {"fc.weight": w * 2 + 1, "fc2.weight": other}
    yield Draft("", {"fc": (7, 576), "fc2": (9, 33)}, Load(steps, holds))
    late = [Write("fc.weight", w), Write("fc.weight", w, lambda p, _: p.data.copy_(p.data * 2 + 1)), steps[1]]
    yield Draft("in_two_calls", {"fc": (7, 576), "fc2": (9, 33)}, Load(late, holds))

    def several():
        model = Weights(fc=(7, 576))
        model.fc.bias = nn.Parameter(torch.empty(7, dtype=torch.bfloat16, device="meta"))
        return model

    # One module with two tensors: counted by the module, the bias is forgotten.
    bias = values(7)
    steps = [Write("fc.weight", w, twice), Write("fc.bias", bias)]
    yield Draft("before_a_bias", several, Load(steps, {"fc.weight": w * 2 + 1}, {"fc.bias": bias}))


@row("A", "distinct elements count, also when each shard is written and rewritten")
def composed_loader_on_shard(scheme):
    w, other = values(10, 33), values(3, 5)

    def negate(start, end):
        def loader(p, source):
            shard = p.data[start:end]
            shard.copy_(source)
            shard.copy_(-shard)

        return loader

    steps = [Write("fc.weight", w[a:b], negate(a, b)) for a, b in ((0, 5), (5, 10))]
    steps.append(Write("fc2.weight", other))
    yield Draft("", {"fc": (10, 33), "fc2": (3, 5)}, Load(steps, {"fc.weight": -w, "fc2.weight": other}))


@row("A", "q, q, k, v: the second q is verified, k and v load")
def duplicate_shard(scheme):
    w = values(9, 576)
    steps = [Write("qkv.weight", w[i : i + 3], rows_of(i, i + 3)) for i in (0, 0, 3, 6)]
    yield Draft("", {"qkv": (9, 576)}, Load(steps, {"qkv.weight": w}))


@row("A", "open weight: the last write wins; quantized already: refused")
def conflicting_shard(scheme):
    w, q2, other = values(9, 576), values(3, 576), values(3, 5)
    shapes = {"qkv": (9, 576), "fc": (3, 5)}
    steps = [Write("qkv.weight", q2, rows_of(0, 3)), Write("qkv.weight", w), Write("fc.weight", other)]
    yield Draft("open", shapes, Load(steps, {"qkv.weight": w, "fc.weight": other}))
    again = Write("qkv.weight", q2, rows_of(0, 3))
    refused = Refused("conflict", ("qkv.weight",), restored=True)
    yield Draft("quantized", shapes, Load([*steps, again], refused=refused))


@row("A", "the union of rows 0:6 and 4:12 is complete, that of 0:6 and 2:8 is not")
def overlapping_shards(scheme):
    w = values(12, 33)
    write = [Write("fc.weight", w[a:b], rows_of(a, b)) for a, b in ((0, 6), (4, 12), (2, 8))]
    yield Draft("whole", {"fc": (12, 33)}, Load(write[:2], {"fc.weight": w}))
    yield Draft("gap", {"fc": (12, 33)}, Load([write[0], write[2]], refused=Refused("incomplete", ("fc.weight",))))
    # As many elements as the weight has, and rows 8:12 still missing.
    steps = [write[0], write[2], Write("fc2.weight", w[:3, :5])]
    refused = Refused("incomplete", ("fc.weight",))
    yield Draft("gap_of_full_count", {"fc": (12, 33), "fc2": (3, 5)}, Load(steps, refused=refused))


@row("A", "one storage: quantized once, tied again; differing copies refused")
def tied_parameter(scheme):
    w, other = values(7, 64), values(3, 5)
    for shared in ("parameter", "storage"):

        def make(shared=shared):
            model = Weights(a=(7, 64), b=(7, 64), c=(3, 5))
            model.b.weight = model.a.weight if shared == "parameter" else nn.Parameter(model.a.weight.data)
            return model

        second = "a.weight" if shared == "parameter" else "b.weight"

        def tied(session):
            a, b = session.model.a, session.model.b
            same = session.adapter.result(session.model, "a.weight"), session.adapter.result(session.model, "b.weight")
            assert same[0][0].data_ptr() == same[1][0].data_ptr(), "the weights are not tied any more"
            assert same[0][1].data_ptr() == same[1][1].data_ptr(), "the scales are not tied"
            assert a is not b

        first, last = Write("a.weight", w), Write("c.weight", other)
        holds = {"a.weight": w, "b.weight": w, "c.weight": other}
        steps = [first, last, Write(second, w)]
        yield Draft(f"equal_{shared}", make, Load(steps, holds, check=tied))
        refused = Refused("conflict", ("a.weight",))
        yield Draft(f"differing_{shared}", make, Load([first, last, Write(second, w + 1)], refused=refused))
        yield Draft(f"differing_at_once_{shared}", make, Load([first, Write(second, w * 2), last], refused=refused))
        composed = Write(second, None, lambda p, _: p.data.copy_(p.data * 2))
        holds = {"a.weight": w * 2, "b.weight": w * 2}
        yield Draft(f"composed_{shared}", make, Load([first, composed, last], holds, check=tied))

    for device in ("cpu", "meta"):

        def head(device=device):
            model = nn.Module()
            model.embed = nn.Embedding(7, 64, device=device, dtype=torch.bfloat16)
            model.lm_head = nn.Linear(64, 7, bias=False, device=device, dtype=torch.bfloat16)
            model.lm_head.weight = model.embed.weight
            return model

        def still_tied(session):
            assert session.model.lm_head.weight is session.model.embed.weight, "the head is not tied any more"

        both = [Write("embed.weight", w), Write("embed.weight", w)]
        passes = {"embed.weight": w, "lm_head.weight": w}
        yield Draft(f"equal_head_{device}", head, Load(both, passes=passes, check=still_tied))
        differing = [both[0], Write("embed.weight", w + 1)]
        yield Draft(f"differing_head_{device}", head, Load(differing, refused=Refused("conflict", ("embed.weight",))))
        composed = [both[0], Write("embed.weight", None, lambda p, _: p.data.copy_(p.data * 2))]
        yield Draft(f"composed_head_{device}", head, Load(composed, passes={"embed.weight": w * 2}, check=still_tied))
    tie = Do("tie b to a", lambda s: setattr(s.model.b, "weight", s.model.a.weight))
    steps = [Write("a.weight", w), tie, Write("c.weight", other)]
    untied = {"a": (7, 64), "b": (7, 64), "c": (3, 5)}
    yield Draft("while_loading", untied, Load(steps, {"a.weight": w, "b.weight": w}, check=tied))


@row("A", "a failed load leaves nothing behind that a second could take for its own")
def retry_after_failure(scheme):
    w, other = values(9, 576), values(3, 5)

    def fail(session):
        raise OSError("the disk is gone")

    failing = Load(
        [Write("qkv.weight", w[:6] + 1, rows_of(0, 6)), Do("the file ends", fail)],
        refused=Refused(OSError, restored=True),
    )
    rest = Load(
        [Write("qkv.weight", w[6:], rows_of(6, 9)), Write("fc.weight", other)],
        refused=Refused("incomplete", ("qkv.weight",), restored=True),
    )
    whole = Load([Write("qkv.weight", w), Write("fc.weight", other)], {"qkv.weight": w, "fc.weight": other})
    yield Draft("", {"qkv": (9, 576), "fc": (3, 5)}, [failing, rest, whole])


@row("A", "bytes and wider words are measured in the weight's elements")
def dtype_view(scheme):
    w = values(6, 36)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float16):

        def loader(start, end, dtype=dtype):
            return lambda p, source: p.data[start:end].view(dtype).copy_(source.view(dtype))

        steps = [Write("fc.weight", w[a:b].clone(), loader(a, b)) for a, b in ((0, 2), (2, 6))]
        yield Draft(str(dtype).partition(".")[2], {"fc": (6, 36)}, Load(steps, {"fc.weight": w}))
    half = Write(
        "fc.weight", w, lambda p, source: p.data.view(torch.uint8)[:, :36].copy_(source.view(torch.uint8)[:, :36])
    )
    yield Draft("half", {"fc": (6, 36)}, Load([half], refused=Refused("incomplete", ("fc.weight",))))
    # As many bytes as the weight has elements: no more than half of it.
    flat = Write("fc.weight", w, lambda p, source: p.data.view(torch.uint8).view(-1)[:216].copy_(
        source.view(torch.uint8).view(-1)[:216]))  # fmt: skip
    steps = [flat, Write("fc2.weight", w[:3, :5])]
    refused = Refused("incomplete", ("fc.weight",))
    yield Draft("as_many_bytes", {"fc": (6, 36), "fc2": (3, 5)}, Load(steps, refused=refused))


@row("A", "`untyped_storage().copy_` writes every element")
def storage_copy(scheme):
    for variant, shape in (("matrix", (6, 36)), ("experts", (4, 6, 36))):
        w = values(*shape)
        write = Write("experts.weight", w, lambda p, source: p.untyped_storage().copy_(source.untyped_storage()))
        yield Draft(variant, {"experts": shape}, Load([write], {"experts.weight": w}))


@row("A", "only the weight's own storage counts; making the scratch its data is a full write")
def scratch_copy(scheme):
    w = values(6, 36)
    shapes = {"fc": (6, 36), "fc2": (6, 36)}

    def through_scratch(p, source):
        scratch = torch.empty_like(p.data)
        scratch.copy_(source)
        p.data = scratch

    steps = [Write("fc.weight", w, through_scratch), Write("fc2.weight", w * 2)]
    yield Draft("", shapes, Load(steps, {"fc.weight": w, "fc2.weight": w * 2}))
    scratch = Write("fc.weight", w, lambda p, source: torch.empty_like(p).copy_(source))
    refused = Refused("incomplete", ("fc.weight",))
    yield Draft("only", shapes, Load([scratch, steps[1]], refused=refused))


@row("A", "the destination's elements count: one row for all, one number for all")
def broadcast_copy(scheme):
    line = values(1, 36)
    for variant, source in (("expanded", line.expand(6, 36)), ("row", line), ("vector", line[0])):
        want = line.expand(6, 36).contiguous()
        yield Draft(variant, {"a": (6, 36)}, Load([Write("a.weight", source)], {"a.weight": want}))
    for variant, source in (("number", 1.5), ("scalar_tensor", torch.tensor(1.5))):
        want = torch.full((6, 36), 1.5).bfloat16()
        yield Draft(variant, {"a": (6, 36)}, Load([Write("a.weight", source)], {"a.weight": want}))


@row("A", "after completion an equal value is verified and a different one refused, never ignored")
def late_second_pass(scheme):
    w, other = values(130, 260), values(3, 5)
    wrong = w.clone()
    wrong[129, 259] *= -2
    shapes = {"fc": (130, 260), "fc2": (3, 5)}
    steps = [Write("fc.weight", w), Write("fc2.weight", other)]
    again = {
        "whole": lambda p, s: p.data.copy_(s),
        "corner": lambda p, s: p.data[128:, 200:].copy_(s[128:, 200:]),
        "odd_rows": lambda p, s: p.data[1::2].copy_(s[1::2]),
        "transposed": lambda p, s: p.data.t()[259].copy_(s[:, 259]),
        "index_copy_": lambda p, s: p.data.index_copy_(0, torch.tensor([2, 129]), s[[2, 129]]),
        "index_list": lambda p, s: p.data.__setitem__([2, 129], s[[2, 129]]),
    }
    for variant, how in again.items():
        holds = {"fc.weight": w, "fc2.weight": other}
        yield Draft(f"equal_{variant}", shapes, Load([*steps, Write("fc.weight", w, how)], holds))
        refused = Refused("conflict", ("fc.weight",), restored=True)
        yield Draft(f"other_{variant}", shapes, Load([*steps, Write("fc.weight", wrong, how)], refused=refused))
    # Cast with the scales of the first, the second has the same codes: the cast saturates.
    ones = Write("fc.weight", torch.ones(130, 260).bfloat16())
    twos = Write("fc.weight", torch.full((130, 260), 2.0).bfloat16())
    yield Draft("other_twice_as_large", shapes, Load([ones, steps[1], twos], refused=refused))
    where = torch.tensor([1, 5])
    changes = {
        "mul_": lambda p, s: p.data.mul_(2),
        "accumulate": lambda p, s: p.data.index_put_((where,), s[where], accumulate=True),
        "scatter_add": lambda p, s: p.data.scatter_(0, where[:, None].expand(-1, 260), s[where], reduce="add"),
        "index_add_": lambda p, s: p.data.index_add_(0, where, s[where]),
    }
    for variant, how in changes.items():
        load = Load([*steps, Write("fc.weight", w, how)], refused=Refused("load", ("fc.weight",), restored=True))
        yield Draft(f"change_{variant}", shapes, load)
    read = Write("fc.weight", w, lambda p, s: p.data.sum())
    yield Draft("read", shapes, Load([*steps, read], refused=Refused("load", ("fc.weight",), restored=True)))
