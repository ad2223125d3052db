"""Complete, but wrong: the values are not those that the checkpoint held."""

from __future__ import annotations

import torch

from ...ops import quantize
from ..bits import assert_same_bits
from ..case import Do, Load, Refused, Weights, Write, values
from .memory import load_folder
from .registry import Draft, row
from .too_early import rows_of


@row("C", "consumed before the loader returns: the buffer takes the next shard at once")
def reused_source_buffer(scheme):
    w = values(6, 36)

    def through_bucket(session):
        bucket = torch.empty(2, 36).bfloat16()
        for start in range(0, 6, 2):
            bucket.copy_(w[start : start + 2])
            session.write("fc.weight", bucket, rows_of(start, start + 2))
        bucket.fill_(float("nan"))

    load = Load([Do("three shards through one buffer", through_bucket)], {"fc.weight": w})
    yield Draft("", {"fc": (6, 36)}, load)


@row("C", "a cast that drops the scale is refused")
def bf16_into_fp8_parameter(scheme):
    def make():
        return Weights(fc=(6, 36), dtype=torch.float8_e4m3fn, device="cpu")

    yield Draft("", make, Load([Write("fc.weight", values(6, 36))], refused=Refused("load", ("fc.weight",))))


@row("C", "refused without its scale; with it, taken as it is")
def fp8_checkpoint_into_quantizing_layer(scheme):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool):
        write = Write("fc.weight", torch.ones(6, 36).to(dtype))
        load = Load([write], refused=Refused("load", ("fc.weight",)))
        yield Draft(f"without_scale_{str(dtype).partition('.')[2]}", {"fc": (6, 36)}, load)
    q, scale = quantize(values(7, 36), "per_channel")  # codes that the kit's own scheme would not always give
    stored = {"fc.weight": q, "fc.weight_scale": scale}

    def with_scale(adapter):
        model = load_folder(adapter, stored, {"fc": (7, 36)}, "per_channel")
        held, held_scale = adapter.result(model, "fc.weight")
        assert_same_bits(held.detach().cpu(), q, "fc.weight")
        assert_same_bits(held_scale.detach().cpu().reshape(scale.shape), scale, "fc.weight_scale")

    yield Draft("with_scale", None, run=with_scale, needs={"checkpoint", "fp8_source"})

    def lost_scale(adapter):
        try:
            load_folder(adapter, {"fc.weight": q}, {"fc": (7, 36)}, "per_channel")
        except Exception as error:
            assert "fc.weight" in str(error), f"the error does not name fc.weight: {error}"
            return
        raise AssertionError("FP8 data without its scale was loaded without an error")

    yield Draft("folder_without_scale", None, run=lost_scale, needs={"checkpoint", "fp8_source"})


@row("C", "quantized from fp32, not from its rounding to bf16")
def fp32_checkpoint(scheme):
    w, half = values(6, 36, dtype=torch.float32), values(6, 36, dtype=torch.float16)
    shapes = {"fc": (6, 36), "fc2": (3, 5)}
    last = Write("fc2.weight", w[:3, :5])
    yield Draft("fp32", shapes, Load([Write("fc.weight", w), last], {"fc.weight": w, "fc2.weight": w[:3, :5]}))
    yield Draft("fp16", shapes, Load([Write("fc.weight", half), last], {"fc.weight": half}))
    for variant, dtypes in (("bf16_then_fp32", (torch.bfloat16, None)), ("fp32_then_bf16", (None, torch.bfloat16))):
        parts = [part.to(dtype or torch.float32) for part, dtype in zip((w[:3], w[3:]), dtypes, strict=True)]
        writes = [Write("fc.weight", part, rows_of(3 * i, 3 * i + 3)) for i, part in enumerate(parts)]
        yield Draft(variant, shapes, Load([*writes, last], {"fc.weight": torch.cat([p.float() for p in parts])}))
    again = [Write("fc.weight", w), last, Write("fc.weight", w)]
    yield Draft("verified_in_fp32", shapes, Load(again, {"fc.weight": w}))


@row("C", "reads give what was written, and 0 where nothing was")
def value_dependent_loader(scheme):
    w = values(4, 6, 36)

    def unless_filled(expert):
        def loader(p, source):
            if not bool((p.data[expert] != 0).any()):
                p.data[expert].copy_(source)

        return loader

    # Each expert comes twice, the second time as garbage that the loader must not take.
    writes = []
    for expert in range(4):
        writes.append(Write("experts.weight", w[expert], unless_filled(expert)))
        writes.append(Write("experts.weight", w[expert] + 1, unless_filled(expert)))

    def equal(p, source):
        assert p.data[3, 2, 1].item() == source[3, 2, 1].item(), "a read does not give what was written"
        assert p.data[3].tolist() == source[3].tolist(), "a read does not give what was written"

    load = Load([*writes, Write("experts.weight", w, equal)], {"experts.weight": w})
    yield Draft("", {"experts": (4, 6, 36)}, load)

    def rescale(p, source):
        p.data[1].copy_(source)
        p.data[0].mul_(2)

    # A loader that comes back to an expert after it has gone on to another one has to say so.
    steps = [
        Write("experts.weight", w[0], lambda p, source: p.data[0].copy_(source)),
        Write("experts.weight", w[1], rescale),
    ]
    want = torch.stack([w[0] * 2, w[1]])
    load = Load(steps, {"experts.weight": want}, facts={"reads_back": ["experts.weight"]})
    yield Draft("reads_back", {"experts": (2, 6, 36)}, load, {"reads_back"})


@row("C", "each loader runs exactly once")
def loader_side_effects(scheme):
    w = values(6, 36)

    def counting(session):
        def how(p, source):
            session.notes["calls"] = session.notes.get("calls", 0) + 1
            return p.data.copy_(source)

        session.write("fc.weight", w, how)
        session.write("fc2.weight", w[:3, :5], lambda p, source: p.data.copy_(source))

    def once(session):
        assert session.notes["calls"] == 1, f"the loader ran {session.notes['calls']} times"

    load = Load([Do("load with a loader that counts", counting)], {"fc.weight": w}, check=once)
    yield Draft("", {"fc": (6, 36), "fc2": (3, 5)}, load)


@row("C", "amax over all shards, in whatever order they come")
def per_tensor_scale_of_fused_qkv(scheme):
    w = values(9, 36)
    writes = [Write("qkv.weight", w[i : i + 3], rows_of(i, i + 3)) for i in (6, 0, 3)]
    yield Draft("", {"qkv": (9, 36)}, Load(writes, {"qkv.weight": w}))
    if scheme != "per_tensor":
        return

    def check(session):
        q, scale = session.adapter.result(session.model, "qkv.weight")
        assert scale.numel() == 3, f"{scale.numel()} scales for three segments"
        for i in range(3):
            alone, alone_scale = session.adapter.expected(w[3 * i : 3 * i + 3], scheme)
            assert_same_bits(q[3 * i : 3 * i + 3].detach().cpu(), alone, f"segment {i}")
            assert_same_bits(scale.detach().cpu().reshape(-1)[i], alone_scale, f"scale of segment {i}")

    load = Load(writes, check=check, facts={"segments": {"qkv": (3, 3, 3)}})
    yield Draft("segments", {"qkv": (9, 36)}, load)


@row("C", "partial blocks at the edges; nothing is silently left in high precision")
def untileable_shape(scheme):
    for shape in ((1, 1), (7, 33), (129, 130), (2, 131, 257)):
        w = values(*shape)
        load = Load([Write("experts.weight", w)], {"experts.weight": w})
        yield Draft("x".join(map(str, shape)), {"experts": shape}, load)


@row("C", "a source without data is refused, one that is sent to the weight's device is not lost")
def meta_source(scheme):
    w = values(6, 36)
    nothing = torch.empty(6, 36, device="meta", dtype=torch.bfloat16)
    yield Draft("refused", {"fc": (6, 36)}, Load([Write("fc.weight", nothing)], refused=Refused("load")))
    sent = Write("fc.weight", w, lambda p, source: p.data.copy_(source.to(p.device)))
    yield Draft("sent", {"fc": (6, 36)}, Load([sent], {"fc.weight": w}))
    indexed = Write("fc.weight", w, lambda p, source: p.data.index_copy_(
        0, torch.tensor([0, 1, 2, 3, 4, 5], device=p.device), source))  # fmt: skip
    yield Draft("index_sent", {"fc": (6, 36)}, Load([indexed], {"fc.weight": w}))


@row("C", "every weight and expert with NaN or Inf is named")
def non_finite_weight(scheme):
    shapes = {"a": (6, 36), "b": (6, 36), "experts": (4, 6, 36)}
    for variant, bad in (("nan", float("nan")), ("inf", float("inf")), ("minus_inf", -float("inf"))):
        a, b, experts = values(6, 36), values(6, 36), values(4, 6, 36)
        b[5, 35] = experts[2, 0, 0] = bad
        writes = [Write("a.weight", a), Write("b.weight", b), Write("experts.weight", experts)]
        refused = Refused("non_finite", ("b.weight", "experts.weight"), restored=True)
        yield Draft(variant, shapes, Load(writes, refused=refused))


@row("C", "what is below the method counts: a patched `Tensor.copy_` changes nothing")
def monkey_patched_copy(scheme):
    w = values(6, 36)

    def patched(session):
        original = torch.Tensor.copy_
        torch.Tensor.copy_ = lambda self, *args, **kwargs: original(self, *args, **kwargs)
        try:
            session.write("fc.weight", w, lambda p, source: p.data.copy_(source))
            session.write("fc2.weight", w[:3, :5], lambda p, source: p.data.copy_(source))
        finally:
            torch.Tensor.copy_ = original

    load = Load([Do("load while copy_ is patched", patched)], {"fc.weight": w, "fc2.weight": w[:3, :5]})
    yield Draft("", {"fc": (6, 36), "fc2": (3, 5)}, load)
