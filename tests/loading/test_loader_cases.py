"""What loaders do to weights, one test a case: each ended too early, too late, or wrong somewhere once."""

import gc
import weakref

import pytest
import torch
from torch import nn

import fp8_kernels as fk
from fp8_kernels.errors import ConflictingShardError, IncompleteLoadError, LoadError, NonFiniteWeightError
from fp8_kernels.loading import LayerwiseLoader, make_plan

from .helpers import SCHEMES, Model, assert_quantized, load, values

# Finished too early.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_composed_loader(scheme):
    """`p.copy_(w)` and then `p.copy_(fn(p))`: the read sees what was written, the second value is quantized, and
    the parameter loaded after it is not forgotten."""
    model, w, other = Model(fc=(7, 576), fc2=(9, 33)), values(7, 576), values(9, 33)

    def loading(params):
        p = params["fc.weight"]
        p.data.copy_(w)
        p.data.copy_(p.data * 2 + 1)
        params["fc2.weight"].data.copy_(other)

    loader = load(model, loading, scheme)
    assert_quantized(model, "fc.weight", w * 2 + 1, scheme)
    assert_quantized(model, "fc2.weight", other, scheme)
    assert loader.report.rewrites == ["fc.weight"]


def test_composed_loader_on_shard():
    """Each half is copied and rewritten on its own: two writes of half a weight are not a whole one."""
    model, w = Model(fc=(10, 33), fc2=(3, 5)), values(10, 33)

    def loading(params):
        for rows in (slice(0, 5), slice(5, 10)):
            shard = params["fc.weight"].data[rows]
            shard.copy_(w[rows])
            shard.copy_(-shard)
        params["fc2.weight"].data.copy_(w[:3, :5])

    load(model, loading)
    assert_quantized(model, "fc.weight", -w)
    assert_quantized(model, "fc2.weight", w[:3, :5])


def test_duplicate_shard():
    """q, q, k, v: the second q is verified and reported; k and v load."""
    model, w = Model(qkv=(9, 576)), values(9, 576)

    def loading(params):
        for start in (0, 0, 3, 6):
            params["qkv.weight"].data.narrow(0, start, 3).copy_(w[start : start + 3])

    loader = load(model, loading)
    assert_quantized(model, "qkv.weight", w)
    assert loader.report.duplicates == ["qkv.weight rows 0:3 of 9, all columns"]
    assert loader.report.rewrites == []


def test_conflicting_shard():
    """q and then another q: in an open unit the last one wins and is reported; in a final one it is refused."""
    model, w, q2 = Model(qkv=(9, 576), fc=(3, 5)), values(9, 576), values(3, 576)

    def loading(params):
        qkv = params["qkv.weight"].data
        qkv[:3].copy_(q2)
        qkv.copy_(w)

    def both(params):
        loading(params)
        params["fc.weight"].data.fill_(1)

    loader = load(model, both)
    assert_quantized(model, "qkv.weight", w)
    assert loader.report.rewrites == ["qkv.weight"]

    model = Model(qkv=(9, 576), fc=(3, 5))

    def conflict(params):
        both(params)
        params["qkv.weight"].data[:3].copy_(q2)

    with pytest.raises(ConflictingShardError, match=r"qkv.weight rows 0:3 of 9, all columns"):
        load(model, conflict)
    assert model.qkv.weight.is_meta


def test_overlapping_shards():
    """Rows 0:6 and 4:12 are twelve rows; 0:6 and 2:8 are eight."""
    model, w = Model(fc=(12, 33)), values(12, 33)

    def loading(params):
        params["fc.weight"].data[0:6].copy_(w[0:6])
        params["fc.weight"].data[4:12].copy_(w[4:12])

    loader = load(model, loading)
    assert_quantized(model, "fc.weight", w)
    assert loader.report.duplicates and not loader.report.rewrites

    def gap(params):
        params["fc.weight"].data[0:6].copy_(w[0:6])
        params["fc.weight"].data[2:8].copy_(w[2:8])

    with pytest.raises(IncompleteLoadError, match=r"fc.weight: rows 8:12 of 12, all columns"):
        load(Model(fc=(12, 33)), gap)


@pytest.mark.parametrize("shared", ["parameter", "storage"])
def test_tied_parameter(shared):
    """One weight under two names is quantized once and stays tied, its scale too; differing copies are refused."""
    w = values(7, 64)

    def build():
        model = Model(a=(7, 64), b=(7, 64), c=(3, 5))
        model.b.weight = model.a.weight if shared == "parameter" else nn.Parameter(model.a.weight.data)
        return model

    def loading(second):
        def run(params):
            params["a.weight"].data.copy_(w)
            params["c.weight"].data.copy_(w[:3, :5])
            params.get("b.weight", params["a.weight"]).data.copy_(second)

        return run

    model = build()
    loader = load(model, loading(w))
    for name in ("a.weight", "b.weight"):
        assert_quantized(model, name, w)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    assert model.a.weight_scale is model.b.weight_scale
    assert (model.a.weight is model.b.weight) == (shared == "parameter")
    assert loader.report.quantized_tensors == 2 and len(loader.report.duplicates) == 1
    with pytest.raises(ConflictingShardError, match="a.weight"):
        load(build(), loading(w + 1))

    def twice(read):
        def run(params):
            p = params["a.weight"].data
            p.copy_(w)
            p.copy_(p * 2 if read else w * 2)
            params["c.weight"].data.copy_(w[:3, :5])

        return run

    model = build()
    load(model, twice(read=True))  # a composed loader
    assert_quantized(model, "b.weight", w * 2)
    with pytest.raises(ConflictingShardError, match="one tensor under the names `a.weight`, `b.weight`"):
        load(build(), twice(read=False))


@pytest.mark.parametrize("real", [True, False])
def test_tied_pass_through(real):
    """Tied weights that stay in high precision: differing copies are refused, a composed loader is not."""
    w = values(7, 64)

    def build():
        model = nn.Module()
        device = "cpu" if real else "meta"
        model.embed = nn.Embedding(7, 64, device=device, dtype=torch.bfloat16)
        model.lm_head = nn.Linear(64, 7, bias=False, device=device, dtype=torch.bfloat16)
        model.lm_head.weight = model.embed.weight
        return model

    def run(second):
        def loading(params):
            params["embed.weight"].data.copy_(w)
            params["embed.weight"].data.copy_(second(params["embed.weight"]))

        return loading

    model = build()
    load(model, run(lambda p: w))
    assert torch.equal(model.embed.weight, w) and model.lm_head.weight is model.embed.weight
    load(build(), run(lambda p: p.data * 2))
    with pytest.raises(ConflictingShardError, match="`embed.weight`, `lm_head.weight`"):
        load(build(), run(lambda p: w + 1))


def test_retry_after_failure():
    """A load that failed half-way leaves nothing that a second one could take for its own."""
    model, w = Model(qkv=(9, 576), fc=(3, 5)), values(9, 576)

    def failing(params):
        params["qkv.weight"].data[:6].copy_(w[:6] + 1)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        load(model, failing)
    assert model.qkv.weight.is_meta

    def partial(params):
        params["qkv.weight"].data[6:].copy_(w[6:])

    with pytest.raises(IncompleteLoadError, match="rows 0:6 of 9"):
        load(model, partial)

    def whole(params):
        params["qkv.weight"].data.copy_(w)
        params["fc.weight"].data.copy_(w[:3, :5])

    loader = load(model, whole)
    assert_quantized(model, "qkv.weight", w)
    assert not loader.report.duplicates and not loader.report.rewrites


@pytest.mark.parametrize("view_dtype", [torch.uint8, torch.int16, torch.int32, torch.float16])
def test_dtype_view(view_dtype):
    """Data copied as bytes, or as wider or narrower words, is measured in the parameter's elements."""
    model, w = Model(fc=(6, 36)), values(6, 36)

    def loading(params):
        for rows in (slice(0, 2), slice(2, 6)):
            params["fc.weight"].data[rows].view(view_dtype).copy_(w[rows].view(view_dtype))

    load(model, loading)
    assert_quantized(model, "fc.weight", w)

    def half(params):
        params["fc.weight"].data.view(torch.uint8)[:, :36].copy_(w.view(torch.uint8)[:, :36])

    with pytest.raises(IncompleteLoadError, match="all rows, columns 18:36 of 36"):
        load(Model(fc=(6, 36)), half)
    with pytest.raises(LoadError, match="whole elements"):
        load(Model(fc=(6, 36)), lambda params: params["fc.weight"].data.view(torch.uint8)[:, :35].zero_())


@pytest.mark.parametrize("shape", [(6, 36), (4, 6, 36)])
def test_storage_copy(shape):
    """`p.untyped_storage().copy_` writes every element."""
    model, w = Model(experts=shape), values(*shape)
    load(model, lambda params: params["experts.weight"].untyped_storage().copy_(w.untyped_storage()))
    assert_quantized(model, "experts.weight", w)


def test_scratch_copy():
    """A scratch tensor is not the parameter; making it the parameter's data is a full write."""
    model, w = Model(fc=(6, 36), fc2=(6, 36)), values(6, 36)

    def loading(params):
        scratch = torch.empty_like(params["fc.weight"].data)
        scratch.copy_(w)
        params["fc2.weight"].data.copy_(w * 2)
        params["fc.weight"].data = scratch

    load(model, loading)
    assert_quantized(model, "fc.weight", w)
    assert_quantized(model, "fc2.weight", w * 2)

    def scratch_only(params):
        torch.empty_like(params["fc.weight"]).copy_(w)
        params["fc2.weight"].data.copy_(w)

    with pytest.raises(IncompleteLoadError, match="fc.weight: everything"):
        load(Model(fc=(6, 36), fc2=(6, 36)), scratch_only)


def test_broadcast_copy():
    """What counts is the destination: one row for all, and a number for all."""
    model, row = Model(a=(6, 36), b=(6, 36)), values(1, 36)

    def loading(params):
        params["a.weight"].data.copy_(row.expand(6, 36))
        params["b.weight"].data.copy_(1.0)

    load(model, loading)
    assert_quantized(model, "a.weight", row.expand(6, 36))
    assert_quantized(model, "b.weight", torch.ones(6, 36).bfloat16())
    for source in (row, row[0]):
        model = Model(a=(6, 36))
        load(model, lambda params, source=source: params["a.weight"].data.copy_(source))
        assert_quantized(model, "a.weight", row.expand(6, 36))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_late_second_pass(scheme):
    """After a weight is final an equal shard is verified, of any shape; a corrected one is refused."""
    w, other = values(130, 260), values(3, 5)

    def loading(again):
        def run(params):
            params["fc.weight"].data.copy_(w)
            params["fc2.weight"].data.copy_(other)
            again(params["fc.weight"].data)

        return run

    def equal(p):
        p.copy_(w)
        p[3:7, 2:200].copy_(w[3:7, 2:200])
        p.t()[5].copy_(w[:, 5])
        p[::2].copy_(w[::2])
        p.index_copy_(0, torch.tensor([2, 129]), w[[2, 129]])
        p[[2, 5]] = w[[2, 5]]

    model = Model(fc=(130, 260), fc2=(3, 5))
    loader = load(model, loading(equal), scheme)
    assert_quantized(model, "fc.weight", w, scheme)
    assert len(loader.report.duplicates) == 6
    wrong = w.clone()
    wrong[129, 259] *= -2
    for again in (
        lambda p: p.copy_(wrong),
        lambda p: p[129:, 128:].copy_(wrong[129:, 128:]),
        lambda p: p[1::2].copy_(wrong[1::2]),
        lambda p: p.index_copy_(0, torch.tensor([129]), wrong[129:]),
    ):
        with pytest.raises(ConflictingShardError, match="fc.weight"):
            load(Model(fc=(130, 260), fc2=(3, 5)), loading(again), scheme)
    rows = torch.tensor([1, 5])
    for name, change in (
        ("mul_", lambda p: p.mul_(2)),
        ("index_put_", lambda p: p.index_put_((rows,), w[rows], accumulate=True)),
        ("scatter_", lambda p: p.scatter_(0, rows[:, None].expand(-1, 260), w[rows], reduce="add")),
        ("index_add_", lambda p: p.index_add_(0, rows, w[rows])),
    ):
        with pytest.raises(LoadError, match=f"quantized already; {name} cannot change it"):
            load(Model(fc=(130, 260), fc2=(3, 5)), loading(change), scheme)
    with pytest.raises(LoadError, match="cannot be read: it is quantized already"):
        load(Model(fc=(130, 260), fc2=(3, 5)), loading(lambda p: p.sum()), scheme)


# Finished too late, or never.


def test_never_loaded_buffer():
    """Buffers that no checkpoint holds (expert maps, routing tables) keep nothing open."""
    model, w = Model(experts=(4, 6, 36)), values(4, 6, 36)
    model.experts.register_buffer("_expert_map", torch.arange(32), persistent=False)
    model.experts.register_buffer("routing", torch.arange(7))
    done = []
    load(model, lambda params: params["experts.weight"].data.copy_(w), on_module=done.append)
    assert done == [model.experts]
    assert torch.equal(model.experts.routing, torch.arange(7))
    assert_quantized(model, "experts.weight", w)


def test_alias_counted_twice():
    """A bias registered in two modules is one tensor to wait for."""
    model, w = Model(a=(6, 36), b=(6, 36)), values(6, 36)
    model.a.e_score_correction_bias = nn.Parameter(torch.empty(64, device="meta"))
    model.b.e_score_correction_bias = model.a.e_score_correction_bias
    done = []

    def loading(params):
        params["a.e_score_correction_bias"].data.copy_(torch.arange(64.0))
        params["a.weight"].data.copy_(w)
        params["b.weight"].data.copy_(w)
        assert done == [model.a]  # b's weight is held open for composed loaders, and nothing else is

    load(model, loading, on_module=done.append)
    assert done == [model.a, model.b]
    assert model.b.e_score_correction_bias is model.a.e_score_correction_bias
    assert torch.equal(model.a.e_score_correction_bias, torch.arange(64.0))


def test_bias_registered_later():
    """The plan is frozen when loading starts: a real late parameter is the engine's own, one on meta an error."""
    w = values(6, 36)

    def run(model, device):
        def loading(params):
            model.fc.register_parameter("bias", nn.Parameter(torch.empty(6, dtype=torch.bfloat16, device=device)))
            params["fc.weight"].data.copy_(w)
            model.fc.bias.data.copy_(w[:, 0])

        return load(model, loading)

    model = Model(fc=(6, 36))
    run(model, "cpu")
    assert_quantized(model, "fc.weight", w)
    assert torch.equal(model.fc.bias, w[:, 0])
    model = Model(fc=(6, 36))
    with pytest.raises(LoadError, match="fc.bias"):
        run(model, "meta")
    assert list(model.fc._parameters) == ["weight"]


def test_bias_absent_from_checkpoint():
    """A tensor named optional may stay away: it is 0, and listed. One that is not named may not."""

    def build():
        model = nn.Module()
        model.fc = nn.Linear(36, 6, device="meta", dtype=torch.bfloat16)
        return model

    w, model = values(6, 36), build()

    def loading(params):
        params["fc.weight"].data.copy_(w)

    loader = load(model, loading, optional=["*.bias"])
    assert_quantized(model, "fc.weight", w)
    assert not model.fc.bias.any() and loader.report.defaulted == ["fc.bias"]
    with pytest.raises(IncompleteLoadError, match="fc.bias: everything"):
        load(build(), loading)

    def half(params):
        loading(params)
        params["fc.bias"].data[:2].zero_()

    with pytest.raises(IncompleteLoadError, match="fc.bias: rows 2:6 of 6"):
        load(build(), half, optional=["*.bias"])
    model = build()
    load(model, lambda params: params["fc.bias"].data.zero_(), optional=["fc.weight"])
    assert_quantized(model, "fc.weight", torch.zeros(6, 36).bfloat16())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("logical", [(100, 576), (128, 500), (100, 500)])
def test_padded_weight(scheme, logical):
    """The logical corner completes a padded weight; padding is 0 and in no scale, whatever was written to it."""
    rows, cols = logical
    model, w = Model(fc=(128, 576), fc2=(3, 5)), values(rows, cols)
    seen = []

    def loading(params):
        p = params["fc.weight"].data
        p.fill_(1000.0) if rows < 128 else None
        p[:rows, :cols].copy_(w)
        params["fc2.weight"].data.fill_(1)
        assert seen == ["fc.weight"]
        again = torch.full((128, 576), 1000.0).bfloat16()  # a duplicate may bring padding of its own
        again[:rows, :cols] = w
        p.copy_(again)
        p[::2].copy_(again[::2])

    loader = load(
        model,
        loading,
        scheme,
        logical_shapes={"fc": logical},
        on_unit=lambda unit, q, scale: seen.append(unit.name),
    )
    padded = torch.zeros(128, 576).bfloat16()
    padded[:rows, :cols] = w
    assert_quantized(model, "fc.weight", padded, scheme)
    assert loader.report.duplicates == ["fc.weight", "fc.weight, a part"]


def test_padded_pass_through():
    """Vocabulary padding of an embedding: 0 without being loaded."""
    model = nn.Module()
    model.embed = nn.Embedding(64, 36, device="meta", dtype=torch.bfloat16)
    w = values(50, 36)
    load(model, lambda params: params["embed.weight"].data[:50].copy_(w), logical_shapes={"embed": (50, 36)})
    assert torch.equal(model.embed.weight[:50], w) and not model.embed.weight[50:].any()


def test_scalar_setitem():
    """`p[e] = 3.0`, fill_ and zero_ are writes, of an expert, a row, a slice, everything."""
    model = Model(experts=(4, 6, 36))

    def loading(params):
        p = params["experts.weight"].data
        p[0] = 3.0
        p[1].fill_(2)
        p[2].zero_()
        p[3, :2] = 1
        p[3, 2:].copy_(torch.tensor(7.0))

    load(model, loading)
    want = torch.zeros(4, 6, 36).bfloat16()
    want[0], want[1], want[3, :2], want[3, 2:] = 3, 2, 1, 7
    assert_quantized(model, "experts.weight", want)


INDEX_WRITES = {
    "index_put_": lambda p, w, rows: p.index_put_((rows,), w[rows]),
    "index_copy_": lambda p, w, rows: p.index_copy_(0, rows, w[rows]),
    "scatter_": lambda p, w, rows: p.scatter_(0, rows[:, None].expand(-1, p.size(1)), w[rows]),
    "masked_scatter_": lambda p, w, rows: p.masked_scatter_(_row_mask(p, rows), w[rows.sort()[0]]),
    "list_setitem": lambda p, w, rows: p.__setitem__(rows.tolist(), w[rows]),
    "mask_setitem": lambda p, w, rows: p.__setitem__(_row_mask(p, rows), w[rows.sort()[0]].flatten()),
    "put_": lambda p, w, rows: p.put_((rows[:, None] * p.size(1) + torch.arange(p.size(1))).flatten(), w[rows]),
    "zero_and_add_": lambda p, w, rows: [(p[r].zero_(), p[r].add_(w[r])) for r in rows.tolist()],
    "zero_and_index_add_": lambda p, w, rows: (p.index_fill_(0, rows, 0), p.index_add_(0, rows, w[rows])),
    "zero_and_lerp_": lambda p, w, rows: [(p[r].zero_(), p[r].lerp_(w[r], 1.0)) for r in rows.tolist()],
    "strided": lambda p, w, rows: [p[r].copy_(w[r]) for r in rows.tolist()],
}


def _row_mask(p, rows):
    mask = torch.zeros(p.shape, dtype=torch.bool)
    mask[rows] = True
    return mask


@pytest.mark.parametrize("expert", [False, True])
@pytest.mark.parametrize("kind", INDEX_WRITES)
def test_index_writes(kind, expert):
    """Each kind of partial write covers exactly what it writes: two disjoint sets of rows make a whole, one
    alone leaves the other missing."""
    shape = (2, 6, 36) if expert else (6, 36)
    w = values(*shape)
    write, first, second = INDEX_WRITES[kind], torch.tensor([0, 2, 3]), torch.tensor([5, 1, 4])

    def matrices(params):
        p = params["experts.weight"].data
        return [(p[0], w[0]), (p[1], w[1])] if expert else [(p, w)]

    def whole(params):
        for p, wanted in matrices(params):
            write(p, wanted, first)
            write(p, wanted, second)

    model = Model(experts=shape)
    load(model, whole)
    assert_quantized(model, "experts.weight", w)

    def partly(params):
        for p, wanted in matrices(params):
            write(p, wanted, first)

    with pytest.raises(IncompleteLoadError, match=r"rows 1:2 of 6, all columns.*rows 4:6 of 6, all columns"):
        load(Model(experts=shape), partly)


def test_masked_fill():
    """A mask and its complement fill a weight."""
    model, w = Model(fc=(6, 36)), values(6, 36)

    def loading(params):
        params["fc.weight"].data.masked_fill_(w > 0, 1.0)
        params["fc.weight"].data[w <= 0] = -1.0

    load(model, loading)
    assert_quantized(model, "fc.weight", torch.where(w > 0, 1.0, -1.0).bfloat16())


OUT_VARIANTS = {
    "stack": lambda w, out: torch.stack(list(w), out=out),
    "cat": lambda w, out: torch.cat([w[:2], w[2:]], out=out),
    "where": lambda w, out: torch.where(w > 0, w, w, out=out),
    "mul": lambda w, out: torch.mul(w, 1.0, out=out),
    "index_select": lambda w, out: torch.index_select(w, 0, torch.arange(6), out=out),
}


@pytest.mark.parametrize("kind", OUT_VARIANTS)
def test_out_variants(kind):
    """Results that are written straight into a parameter, or into a part of one."""
    w = values(6, 36)
    model = Model(fc=(6, 36), experts=(2, 6, 36))

    def loading(params):
        OUT_VARIANTS[kind](w, params["fc.weight"].data)
        for expert in range(2):
            OUT_VARIANTS[kind](w, params["experts.weight"].data[expert])

    load(model, loading)
    assert_quantized(model, "fc.weight", w)
    assert_quantized(model, "experts.weight", torch.stack([w, w]))
    with pytest.raises((LoadError, RuntimeError)), pytest.warns(UserWarning, match="resized"):
        load(Model(fc=(3, 36)), lambda params: torch.mul(w, 1.0, out=params["fc.weight"].data))


def test_foreach_copy_():
    """Fused copies into several parameters, also with other in-place foreach ops after them."""
    model, ws = Model(a=(6, 36), b=(3, 5), c=(7, 7)), [values(6, 36), values(3, 5), values(7, 7)]

    def loading(params):
        torch._foreach_copy_([p.data for p in params.values()], ws)

    load(model, loading)
    for name, w in zip("abc", ws, strict=True):
        assert_quantized(model, f"{name}.weight", w)
    model = Model(a=(6, 36), b=(3, 5), c=(7, 7))

    def zero_and_add(params):
        tensors = [p.data for p in params.values()]
        torch._foreach_add_(tensors, ws)
        torch._foreach_mul_(tensors, 2.0)

    load(model, zero_and_add)
    for name, w in zip("abc", ws, strict=True):
        assert_quantized(model, f"{name}.weight", w * 2)


REBINDINGS = {
    "data": lambda module, w: setattr(module.weight, "data", w),
    "set_": lambda module, w: module.weight.set_(w),
    "swap_tensors": lambda module, w: torch.utils.swap_tensors(module.weight, nn.Parameter(w)),
    "assign": lambda module, w: module.load_state_dict({"weight": w}, assign=True),
    "new_parameter": lambda module, w: setattr(module, "weight", nn.Parameter(w)),
    "registry": lambda module, w: module._parameters.__setitem__("weight", nn.Parameter(w)),
}


@pytest.mark.parametrize("passes_through", [False, True])
@pytest.mark.parametrize("kind", REBINDINGS)
def test_rebinding(kind, passes_through):
    """Data that takes a parameter's place without any copy is a full write, and the parameter keeps its identity."""
    w, other = values(6, 36), values(3, 5)
    model = Model(fc=(6, 36), fc2=(3, 5))
    held = dict(model.named_parameters())
    options = {"ignore": ["fc.weight"]} if passes_through else {}

    @torch.no_grad()
    def loading(params):
        REBINDINGS[kind](model.fc, w.clone())
        params["fc2.weight"].data.copy_(other)

    load(model, loading, **options)
    assert model.fc.weight is held["fc.weight"]
    assert_quantized(model, "fc2.weight", other)
    if passes_through:
        assert torch.equal(model.fc.weight, w)
    else:
        assert_quantized(model, "fc.weight", w)
    for wrong in (values(6, 35), torch.empty(6, 36, device="meta", dtype=torch.bfloat16)):
        model = Model(fc=(6, 36), fc2=(3, 5))
        before = model.fc.weight

        @torch.no_grad()
        def refused(params, model=model, wrong=wrong):
            params["fc2.weight"].data.copy_(other)
            REBINDINGS[kind](model.fc, wrong)

        with pytest.raises((LoadError, RuntimeError)):
            load(model, refused, **options)
        assert model.fc.weight is before and before.is_meta and before.shape == (6, 36)


def test_tied_while_loading():
    """An engine that ties a weight to another in the middle of loading gets one weight under both names."""
    model, w = Model(a=(6, 36), b=(6, 36), c=(3, 5)), values(6, 36)

    def loading(params):
        params["a.weight"].data.copy_(w)
        model.b.weight = model.a.weight
        params["c.weight"].data.copy_(w[:3, :5])

    load(model, loading)
    assert model.a.weight is model.b.weight and model.a.weight_scale is model.b.weight_scale
    assert_quantized(model, "b.weight", w)


def test_tied_while_loading_in_high_precision():
    """The same for tensors that pass through: tied before anything arrived, so the second name holds no data yet."""
    model, w = nn.Module(), values(10, 36)
    model.embed = nn.Embedding(10, 36, device="meta", dtype=torch.bfloat16)
    model.lm_head = nn.Linear(36, 10, bias=False, device="meta", dtype=torch.bfloat16)

    def loading(params):
        model.lm_head.weight = model.embed.weight
        params["embed.weight"].data.copy_(w)

    load(model, loading)
    assert model.lm_head.weight is model.embed.weight and torch.equal(model.embed.weight, w)


def test_numpy_or_dlpack_alias():
    """A tracked weight has no memory that something could write behind the loader's back."""
    for alias in (lambda p: p.numpy(), lambda p: torch.from_dlpack(p)):
        model = Model(fc=(6, 36))
        with pytest.raises((TypeError, ValueError), match=r"meta"):
            load(model, lambda params, alias=alias: alias(params["fc.weight"].data))


def test_device_dependent_op():
    """`p[i] = 3.0` is a copy_ on meta and a fill_ elsewhere: there is no dry run that could disagree."""
    model = Model(fc=(6, 36))

    def loading(params):
        for row in range(6):
            params["fc.weight"].data[row] = float(row)

    load(model, loading)
    assert_quantized(model, "fc.weight", torch.arange(6.0).view(6, 1).expand(6, 36).bfloat16())


@pytest.mark.parametrize("shape", [(0, 36), (6, 0), (0, 0), (0, 6, 36), (3, 0, 36)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_size_tensor(shape, scheme):
    """A weight without elements is complete from the start, written or not."""
    for write in (lambda params: None, lambda params: params["experts.weight"].data.copy_(torch.empty(shape))):
        model = Model(experts=shape)
        load(model, write, scheme)
        assert_quantized(model, "experts.weight", torch.empty(shape).bfloat16(), scheme)


def test_rank_with_nothing_to_load():
    """A rank whose part is empty finishes like the others."""
    model = Model(empty=(0, 36), fc=(6, 36))
    w = values(6, 36)

    def loading(params):
        params["empty.weight"].data.copy_(w.narrow(0, 6, 0))
        params["fc.weight"].data.copy_(w)

    load(model, loading)
    assert model.empty.weight.shape == (0, 36) and model.empty.weight.dtype == torch.float8_e4m3fn
    assert_quantized(model, "fc.weight", w)


def test_non_local_expert():
    """Experts of other ranks are never held: the plan is of the local parameter."""
    model, w = Model(experts=(2, 6, 36)), values(8, 6, 36)
    local = {4: 0, 5: 1}
    references = []

    def loading(params):
        for expert in range(8):
            source = w[expert].clone()
            references.append(weakref.ref(source))
            if expert in local:
                params["experts.weight"].data[local[expert]].copy_(source)
            del source
            gc.collect()
            assert all(r() is None for r in references)

    load(model, loading)
    assert_quantized(model, "experts.weight", w[4:6])


def test_redundant_expert_slot():
    """A slot for a redundant expert is in the plan: forgotten, it is reported; filled, it is quantized."""
    w = values(3, 6, 36)

    def forgetful(params):
        params["experts.weight"].data[:2].copy_(w[:2])

    with pytest.raises(IncompleteLoadError, match="experts 2:3 of 3"):
        load(Model(experts=(3, 6, 36)), forgetful)
    model = Model(experts=(3, 6, 36))

    def filled(params):
        forgetful(params)
        params["experts.weight"].data[2].copy_(w[0])

    load(model, filled)
    assert_quantized(model, "experts.weight", w[[0, 1, 0]])


def test_init_valued_tensor():
    """Tensors that the model computes (rotary caches) are neither tracked nor touched, also on failure."""
    model, w = Model(fc=(6, 36)), values(6, 36)
    cos, table = torch.randn(7, 5), torch.randn(3)
    model.fc.register_buffer("cos", cos, persistent=False)
    model.fc.register_buffer("table", table)
    saved = cos.clone(), table.clone()
    with pytest.raises(IncompleteLoadError, match="^1 of 1 tensors"):
        load(model, lambda params: None)
    load(model, lambda params: params["fc.weight"].data.copy_(w))
    assert model.fc.cos is cos and model.fc.table is table
    assert torch.equal(cos, saved[0]) and torch.equal(table, saved[1])


def test_missing_shard():
    """What never arrived is named by parameter, rows and columns."""

    def loading(params):
        params["gate_up_proj.weight"].data[:2816].zero_()
        params["down.weight"].data[:, 10:20].zero_()
        params["experts.weight"].data[0].zero_()
        params["experts.weight"].data[1, 3:, :7].zero_()

    model = Model(gate_up_proj=(5632, 8), down=(8, 30), experts=(5, 6, 36))
    with pytest.raises(IncompleteLoadError) as error:
        load(model, loading)
    text = str(error.value)
    assert "gate_up_proj.weight: rows 2816:5632 of 5632, all columns" in text
    assert "down.weight: all rows, columns 0:10 of 30; all rows, columns 20:30 of 30" in text
    assert (
        "experts.weight: experts 2:5 of 5; expert 1: rows 0:3 of 6, all columns; "
        "expert 1: rows 3:6 of 6, columns 7:36 of 36" in text
    )
    assert all(p.is_meta for p in model.parameters())


def test_missing_layer():
    """A layer that the checkpoint lacks is an error, and the hint fits the cause."""
    with pytest.raises(IncompleteLoadError, match=r"1 of 2 tensors[^:]*`optional`\):\n  b.weight: everything"):
        load(Model(a=(6, 36), b=(6, 36)), lambda params: params["a.weight"].data.zero_())
    with pytest.raises(IncompleteLoadError, match="nothing was written at all"):
        load(Model(a=(6, 36)), lambda params: None)


# Complete, but wrong.


def test_reused_source_buffer():
    """A shard is consumed when it arrives: the buffer may be filled with the next one at once."""
    model, w, bucket = Model(fc=(6, 36)), values(6, 36), torch.empty(2, 36).bfloat16()

    def loading(params):
        for row in range(0, 6, 2):
            bucket.copy_(w[row : row + 2])
            params["fc.weight"].data[row : row + 2].copy_(bucket)
        bucket.fill_(float("nan"))

    load(model, loading)
    assert_quantized(model, "fc.weight", w)


def test_bf16_into_fp8_parameter():
    """A silent cast that drops the scale is refused."""
    model = Model(fc=(6, 36), dtype=torch.float8_e4m3fn, device="cpu")
    with pytest.raises(LoadError, match="fc.weight` is torch.float8_e4m3fn: a cast from torch.bfloat16"):
        load(model, lambda params: params["fc.weight"].data.copy_(values(6, 36)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32, torch.bool])
def test_source_is_not_high_precision(dtype):
    """FP8 without its scale and integers are not weights."""
    with pytest.raises(LoadError, match=f"fc.weight` must be loaded from .* got {dtype}"):
        load(Model(fc=(6, 36)), lambda params: params["fc.weight"].data.copy_(torch.ones(6, 36).to(dtype)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp32_checkpoint(scheme):
    """fp32 data for a bf16 parameter is quantized from fp32, also when other shards of it are bf16 or fp16."""
    w, h = values(6, 36, dtype=torch.float32), values(6, 36, dtype=torch.float16)
    model = Model(a=(6, 36), b=(6, 36), c=(6, 36), d=(6, 36))

    def loading(params):
        params["a.weight"].data.copy_(w)
        params["b.weight"].data[:3].copy_(w[:3].bfloat16())
        params["b.weight"].data[3:].copy_(w[3:])
        params["c.weight"].data.copy_(h)
        params["d.weight"].data[:3].copy_(w[:3])
        params["d.weight"].data.index_copy_(0, torch.tensor([3, 4, 5]), w[3:].bfloat16())
        assert torch.equal(params["d.weight"].data[:3] * 2, w[:3] * 2)
        params["a.weight"].data.copy_(w)  # verified against fp32's codes

    load(model, loading, scheme)
    assert_quantized(model, "a.weight", w, scheme)
    assert_quantized(model, "b.weight", torch.cat([w[:3].bfloat16().float(), w[3:]]), scheme)
    assert_quantized(model, "c.weight", h, scheme)
    assert_quantized(model, "d.weight", torch.cat([w[:3], w[3:].bfloat16().float()]), scheme)


def test_value_dependent_loader():
    """A loader that looks at the parameter sees what it wrote, and 0 where it has not written."""
    model, w = Model(experts=(4, 6, 36)), values(4, 6, 36)

    def loading(params):
        p = params["experts.weight"]
        for expert in (0, 1, 1, 2, 3, 3):
            if not bool((p.data[expert] != 0).any()):
                p.data[expert].copy_(w[expert])
        assert p.data[3, 2, 1].item() == w[3, 2, 1].item()
        assert p.data[3].tolist() == w[3].tolist()

    loader = load(model, loading)
    assert_quantized(model, "experts.weight", w)
    assert loader.report.shards == 4


def test_loader_side_effects():
    """Each loader call runs once."""
    model, w, calls = Model(fc=(6, 36)), values(6, 36), []
    model.fc.weight.weight_loader = lambda p, loaded: (calls.append(1), p.data.copy_(loaded))

    def loading(params):
        params["fc.weight"].weight_loader(params["fc.weight"], w)

    load(model, loading)
    assert calls == [1]
    assert model.fc.weight.weight_loader is not None  # attributes stay


def test_scale_of_fused_weight():
    """Under per_tensor a fused weight has one scale, of all its shards, whatever the order they come in."""
    model, w = Model(qkv=(9, 36)), values(9, 36)

    def loading(params):
        for start in (6, 0, 3):
            params["qkv.weight"].data.narrow(0, start, 3).copy_(w[start : start + 3])

    load(model, loading, "per_tensor")
    assert_quantized(model, "qkv.weight", w, "per_tensor")


def test_meta_source():
    """A source on meta holds no data; copying from it is refused, never taken as loaded."""
    with pytest.raises(LoadError, match="fc.weight`: a tensor on the meta device holds no data"):
        load(Model(fc=(6, 36)), lambda p: p["fc.weight"].data.copy_(torch.empty(6, 36, device="meta")))
    model = Model(fc=(6, 36), fc2=(6, 36))
    w = values(6, 36)

    def through_the_device(params):
        p = params["fc.weight"]
        p.data.copy_(w.to(p.device))
        rows = torch.tensor([0, 1, 2, 3, 4, 5], device=p.device)
        params["fc2.weight"].data.index_copy_(0, rows, w)

    load(model, through_the_device)  # what the engine sends to its parameter's device stays real
    assert_quantized(model, "fc.weight", w)
    assert_quantized(model, "fc2.weight", w)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_non_finite_weight(bad, scheme):
    """Every weight and every expert with NaN or Inf is named; the model is as before."""
    model = Model(a=(6, 36), b=(6, 36), experts=(4, 6, 36))

    def loading(params):
        for p in params.values():
            p.data.fill_(1)
        params["b.weight"].data.fill_(1)
        params["experts.weight"].data.fill_(1)

    def poisoned(params):
        params["a.weight"].data.fill_(1)
        b, experts = values(6, 36), values(4, 6, 36)
        b[5, 35] = experts[2, 0, 0] = bad
        params["b.weight"].data.copy_(b)
        params["experts.weight"].data.copy_(experts)

    with pytest.raises(NonFiniteWeightError, match=r"2 weights hold NaN or Inf: b.weight, experts.weight\[2\]$"):
        load(model, poisoned, scheme)
    assert all(p.is_meta for p in model.parameters()) and len(list(model.parameters())) == 3
    load(model, loading, scheme)


def test_monkey_patched_copy(monkeypatch):
    """The loader sees ops, not methods: a patched `Tensor.copy_` changes nothing."""
    original, calls = torch.Tensor.copy_, []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a, **k: (calls.append(1), original(self, *a, **k))[1])
    model, w = Model(fc=(6, 36)), values(6, 36)
    load(model, lambda params: params["fc.weight"].data.copy_(w))
    assert_quantized(model, "fc.weight", w)
    assert calls


# The memory bound.


def test_held_references():
    """Parameters, views and `.data` that the engine keeps cost nothing during the load, and params_dict stays
    the model's parameters after it."""
    model, w = Model(**{f"fc{i}": (64, 64) for i in range(16)}), values(64, 64)
    params, kept = dict(model.named_parameters()), []
    with LayerwiseLoader(model, device="cpu") as loader:
        for p in params.values():
            kept.append((p.data, p.data[3:5], p.data.t()))
            p.data.copy_(w)
    assert loader.report.peak_staging_bytes <= 2 * 64 * 64 * 2
    assert all(module.weight is params[f"{name}.weight"] for name, module in model.named_children())
    for name in params:
        assert_quantized(model, name, w)


def test_iterator_turned_into_list():
    """The stream of weights is consumed one at a time: none is kept when the next is asked for."""
    model = Model(**{f"fc{i}": (6, 36) for i in range(9)})
    alive = []

    def stream():
        for name, _ in model.named_parameters():
            gc.collect()
            assert sum(r() is not None for r in alive) <= 1
            w = values(6, 36)
            alive.append(weakref.ref(w))
            yield name, w
            del w

    def loading(params):
        for name, w in stream():
            params[name].data.copy_(w)

    load(model, loading)


def test_whole_layer_is_not_the_unit():
    """Experts are units: staging holds two of them, not the layer."""
    model, w = Model(experts=(16, 6, 36)), values(16, 6, 36)
    one = 6 * 36 * 2
    loader = load(model, lambda params: params["experts.weight"].data.copy_(w))
    assert loader.report.peak_staging_bytes <= 2 * one
    assert loader.report.quantized_units == 16
    assert make_plan(Model(experts=(16, 6, 36))).largest_unit == one
    assert_quantized(model, "experts.weight", w)
    assert fk.quantize(w[3], "per_channel")[1].shape == model.experts.weight_scale[3].shape
