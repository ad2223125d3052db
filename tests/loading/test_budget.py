"""Bounded staging: what spills, what comes back, and what the arena gives out."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8_kernels.loading.arena import ALIGNMENT, HOST_SLAB, Arena

from .helpers import Model, assert_quantized, load, values

UNIT = 64 * 96 * 2  # bytes of a weight below; a multiple of the arena's alignment


def _halves(weights):
    """A loader that brings the upper half of every weight and then the lower half of every one."""

    def loading(params):
        for rows in (slice(0, 32), slice(32, 64)):
            for name, w in weights.items():
                params[f"{name}.weight"].data[rows].copy_(w[rows])

    return loading


def test_the_oldest_units_spill_and_come_back():
    """Eight weights are open at once, and there is room for three: five wait on the host, each comes back once, and
    nothing of it shows in the result."""
    weights = {f"fc{i}": values(64, 96) for i in range(8)}
    model = Model(**dict.fromkeys(weights, (64, 96)))
    report = load(model, _halves(weights), "per_tensor", staging_budget=3 * UNIT).report
    for name, w in weights.items():
        assert_quantized(model, f"{name}.weight", w, "per_tensor")
    assert report.peak_staging_bytes == 3 * UNIT
    assert report.spills >= 5
    assert report.spilled_bytes == report.spills * UNIT // 2  # of a unit that is half written, that half
    assert f"{report.spills} spills to the host" in str(report)


@pytest.mark.parametrize("scheme", ["per_tensor", "per_block"])
def test_a_budget_of_nothing_is_enough(scheme):
    """One op's own data is held whatever the budget: shards in any order load within none."""
    weights = {f"fc{i}": values(150, 96) for i in range(4)}
    model = Model(**dict.fromkeys(weights, (150, 96)))
    shards = [(name, row) for name in weights for row in range(0, 150, 30)]
    random.shuffle(shards)

    def loading(params):
        for name, row in shards:
            params[f"{name}.weight"].data[row : row + 30].copy_(weights[name][row : row + 30])

    report = load(model, loading, scheme, staging_budget=0).report
    for name, w in weights.items():
        assert_quantized(model, f"{name}.weight", w, scheme)
    assert report.spills > 4 and report.peak_staging_bytes <= 2 * 150 * 96 * 2


def test_a_unit_that_stays_open_makes_room_for_a_larger_one(monkeypatch):
    """Its file ended in the middle; what comes next is as large as all staging so far. It waits on the host, instead
    of having all of that once more; and what is complete is out of the way."""
    slabs, allocate = [], Arena._allocate
    monkeypatch.setattr(Arena, "_allocate", lambda *args: slabs.append(t := allocate(*args)) or t)
    small, large = values(64, 96), values(512, 96)
    model = Model(first=(64, 96), small=(64, 96), large=(512, 96))

    def loading(params):
        params["first.weight"].data.copy_(small)
        params["small.weight"].data[:32].copy_(small[:32])  # behind the first, which is open still
        for rows in (slice(0, 256), slice(256, 512)):
            params["large.weight"].data[rows].copy_(large[rows])
        params["small.weight"].data[32:].copy_(small[32:])

    report = load(model, loading, "per_tensor").report
    for name, w in (("first", small), ("small", small), ("large", large)):
        assert_quantized(model, f"{name}.weight", w, "per_tensor")
    assert [slab.nbytes for slab in slabs] == [large.nbytes, HOST_SLAB] and report.spills == 1


def test_the_default_budget_spills_nothing_small():
    """256 MiB by default: a model smaller than that never waits on the host, whatever the order."""
    weights = {f"fc{i}": values(64, 96) for i in range(8)}
    model = Model(**dict.fromkeys(weights, (64, 96)))
    assert load(model, _halves(weights), "per_tensor").report.spills == 0


@pytest.mark.parametrize("write", ["read", "strided", "add_", "duplicate", "fp32"])
def test_a_spilled_unit_is_what_it_was(write):
    """Reading, writing every other row, changing in place, writing again and widening a unit that waits on the host
    do what they do to one that never left."""
    weights = {name: values(64, 96) for name in "ab"}
    wanted = {name: w.clone() for name, w in weights.items()}
    model = Model(a=(64, 96), b=(64, 96))

    def loading(params):
        a, b = params["a.weight"].data, params["b.weight"].data
        a[1::2].copy_(weights["a"][1::2])
        a[:40:2].copy_(weights["a"][:40:2])
        b[:32].copy_(weights["b"][:32])  # a spills
        if write == "read":
            assert torch.equal(a[5:10].clone(), weights["a"][5:10])
            assert not a[40::2].any()
        elif write == "strided":
            a[1:9:4].copy_(weights["a"][1:9:4])
        elif write == "add_":
            a[3:5].add_(1)
            wanted["a"][3:5] += 1
        elif write == "duplicate":
            a[:8].copy_(weights["a"][:8])
        elif write == "fp32":
            a[:1].copy_(torch.full((1, 96), 1 + 2.0**-20))
            wanted["a"] = wanted["a"].float()
            wanted["a"][0] = 1 + 2.0**-20
        b[32:].copy_(weights["b"][32:])
        a[40::2].copy_(weights["a"][40::2])

    report = load(model, loading, "per_tensor", staging_budget=UNIT).report
    assert report.spills >= 2
    for name, w in wanted.items():
        assert_quantized(model, f"{name}.weight", w, "per_tensor")


def test_a_budget_below_zero_is_refused():
    """An impossible number of bytes is refused before anything is loaded."""
    with pytest.raises(ValueError, match="`staging_budget` must be a number of bytes, got -1"):
        load(Model(fc=(6, 36)), lambda params: None, staging_budget=-1)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60), st.sampled_from([None, 20, 64]))
def test_buffers_of_an_arena_never_overlap(steps, limit):
    """Whatever is taken and given back: buffers that are out keep their values, `reserved` stays within the limit, and
    a whole arena that came back serves a buffer of its first slab's size again."""
    arena = Arena(torch.device("cpu"), limit and limit * ALIGNMENT, first=4 * ALIGNMENT)
    out = []
    for i, (takes, size) in enumerate(steps):
        if takes or not out:
            buffer = arena.take((size, ALIGNMENT // 4), torch.int16)
            if buffer is None:
                assert limit is not None
                continue
            out.append((buffer.fill_(i), i))
        else:
            arena.give(out.pop(size % len(out))[0])
        assert all((buffer == value).all() for buffer, value in out)
        assert arena.bytes == sum(buffer.nbytes for buffer, _ in out) <= arena.peak
        assert limit is None or arena.reserved <= limit * ALIGNMENT
    while out:
        arena.give(out.pop()[0])
    assert arena.bytes == 0
    if arena.reserved:
        reserved = arena.reserved
        assert arena.take((4 * ALIGNMENT,), torch.uint8) is not None and arena.reserved == reserved


def test_a_buffer_beyond_the_limit():
    """Where the limit leaves no room there is no buffer, or on request one apart, which is counted too."""
    arena = Arena(torch.device("cpu"), 4 * ALIGNMENT)
    held = arena.take((3 * ALIGNMENT,), torch.uint8)
    assert arena.take((2 * ALIGNMENT,), torch.uint8) is None
    apart = arena.take((2 * ALIGNMENT,), torch.uint8, beyond_limit=True)
    assert arena.bytes == 5 * ALIGNMENT and arena.reserved <= 4 * ALIGNMENT
    arena.give(apart)
    arena.give(held)
    assert arena.bytes == 0
