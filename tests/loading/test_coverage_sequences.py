"""Completion by exact coverage: random sequences of writes against one boolean per element, and one plain tensor.

A sequence is decoded from a string of bytes, which hypothesis draws fast and shrinks well. Most sequences run against
`Coverage` alone; some hundreds run through `LayerwiseLoader`, as an engine's copies would.
"""

import functools

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8_kernels.errors import IncompleteLoadError, LoadError
from fp8_kernels.loading import LayerwiseLoader
from fp8_kernels.loading.coverage import Coverage, Region
from fp8_kernels.schemes import PerBlock, PerGroup

from .helpers import Model, assert_quantized


class Tape:
    """Choices read from bytes; 0, the simplest, after their end."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def __bool__(self):
        return self._at < len(self._data)

    def below(self, n: int) -> int:
        self._at += 1
        return self._data[self._at - 1] % n if self._at <= len(self._data) else 0

    def span(self, n: int) -> tuple[int, int]:
        """0 <= start < end <= n."""
        start = self.below(n)
        return start, start + 1 + self.below(n - start)


def take_view(tape: Tape, t: torch.Tensor) -> torch.Tensor:
    """A chain of what engines do to a parameter before they copy into it."""
    for _ in range(tape.below(4)):
        kind = tape.below(7)
        if kind == 6 and t.is_contiguous():
            t = t.view(-1)
        elif kind == 5 and t.ndim == 2:
            t = t.t()
        elif t.ndim and kind < 5:
            dim = tape.below(t.ndim)
            if kind == 4:
                t = t.select(dim, tape.below(t.size(dim)))
                continue
            start, end = tape.span(t.size(dim))
            index = [slice(None)] * t.ndim
            index[dim] = slice(start, end, 2 if kind == 3 else 1)
            t = t[tuple(index)]
    return t


@given(st.binary(min_size=12, max_size=72))
@settings(max_examples=9_500, deadline=None)
def test_coverage_equals_the_mask_oracle(data):
    """Narrow, strided, transposed, flattened, single, masked, overlapping and repeated writes in any order: what is
    complete, empty, missing and seen before is what the mask says, after every write."""
    tape = Tape(data)
    shape = 1 + tape.below(9), 1 + tape.below(9)
    logical = shape if tape.below(3) else (tape.below(shape[0] + 1), tape.below(shape[1] + 1))
    array = numpy.zeros(shape, dtype=bool)
    oracle, inside = torch.from_numpy(array), array[: logical[0], : logical[1]]
    coverage, last = Coverage(shape, logical), None
    assert coverage.complete == (not inside.size)
    while tape:
        kind = tape.below(8)
        if kind == 7 and last is not None:  # the same shard again
            view = last
        elif kind == 6:  # every third element or so
            written = torch.arange(oracle.numel()).view(shape) % (2 + tape.below(3)) == tape.below(3)
            coverage.add_mask(written)
            oracle |= written
            view = None
        elif kind == 5:
            (row0, row1), (col0, col1) = tape.span(shape[0]), tape.span(shape[1])
            coverage.add_box((row0, row1, col0, col1))
            array[row0:row1, col0:col1] = True
            view = None
        else:
            view = last = take_view(tape, oracle)
        if view is not None:
            region = Region(shape, view.storage_offset(), tuple(view.shape), view.stride())
            before = array[: logical[0], : logical[1]].copy()
            seen = numpy.zeros(shape, dtype=bool)
            torch.from_numpy(seen).as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
            assert coverage.overlap(region) == int((seen[: logical[0], : logical[1]] & before).sum())
            coverage.add(region)
            view.fill_(True)
        assert coverage.complete == bool(inside.all())
        assert coverage.empty == (not inside.any())
    missing = numpy.zeros(logical, dtype=int)
    for row0, row1, col0, col1 in coverage.missing():
        missing[row0:row1, col0:col1] += 1
    assert (missing == ~inside).all()  # exactly, and each element once


class Engine:
    """Makes random writes through a loader, and the same ones to plain tensors.

    The checkpoint has values of 0.5 to 1; others are those negated, or -3, so that no two of them share a code.
    """

    def __init__(self, tape: Tape):
        self.tape = tape
        n, k = 1 + tape.below(7), 1 + tape.below(9)
        self.shapes = {"a": (n, k), "experts": (1 + tape.below(4), 1 + tape.below(5), 1 + tape.below(6)), "b": (2, 3)}
        self.logical = dict(self.shapes)
        if tape.below(3) == 0:
            self.logical["a"] = n - tape.below(n), k - tape.below(k)
        self.model = Model(**self.shapes)
        numels = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        self.source = {
            name: (torch.arange(numels[name]) * 37 % 101 / 202 + 0.5).bfloat16().view(shape)
            for name, shape in self.shapes.items()
        }
        self.value = {name: torch.zeros(shape).bfloat16() for name, shape in self.shapes.items()}
        self.written = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        self.finishes, self.final = bool(tape.below(2)), set()
        for name, (rows, cols) in ((name, logical[-2:]) for name, logical in self.logical.items()):
            self.written[name][..., rows:, :] = True  # padding has not to arrive
            self.written[name][..., cols:] = True

    def units(self, name, touched=None):
        """(name, expert) of the units that have an element where `touched` is true; by default of all."""
        if len(self.shapes[name]) == 2:
            return {(name, None)} if touched is None or bool(touched.any()) else set()
        experts = range(self.shapes[name][0])
        return {(name, e) for e in experts if touched is None or bool(touched[e].any())}

    def full(self):
        """The units of which every element has been written."""
        found = set()
        for name, written in self.written.items():
            found |= self.units(name) - self.units(name, ~written)
        return found

    def choose(self, p, name):
        """What to write: (touched elements, the tensor afterwards, what kind of write it is, the write itself)."""
        tape, source, shape = self.tape, self.source[name], self.shapes[name]
        after, touched = self.value[name].clone(), torch.zeros(shape, dtype=torch.bool)
        kind = tape.below(12)
        if kind < 7:
            view = take_view(tape, p)

            def of(t):
                return t.as_strided(view.shape, view.stride(), view.storage_offset())

            of(touched).fill_(True)
            given = -of(source) if kind == 4 else of(source).float() if kind == 3 else of(source)
            if kind < 5:
                of(after).copy_(given)
                return touched, after, "copy", lambda: view.copy_(given)
            if kind == 5:
                of(after).fill_(-3.0)
                return touched, after, "copy", lambda: view.fill_(-3.0)
            of(after).mul_(-1)
            return touched, after, "change", lambda: view.mul_(-1)
        if kind < 10:
            part = tape.below(shape[0]) if len(shape) == 3 else ...
            rows = torch.tensor([tape.below(shape[-2]) for _ in range(1 + tape.below(3))])
            given = source[part][rows]
            touched[part][rows], after[part][rows] = True, given
            ways = (
                lambda: p[part].index_copy_(0, rows, given),
                lambda: p[part].__setitem__(rows.tolist(), given),
                lambda: p[part].scatter_(0, rows[:, None].expand(-1, shape[-1]), given),
            )
            return touched, after, "rows", ways[kind - 7]
        if kind == 10:
            touched = torch.arange(p.numel()).view(shape) % (2 + tape.below(3)) == tape.below(3)
            after[touched] = source[touched]
            return touched, after, "of all", lambda: p.__setitem__(touched, source[touched])
        return ~touched, source.clone(), "of all", lambda: torch.mul(source, 1.0, out=p)

    def write_any(self, params):
        """One random write; see `write`."""
        name = ("a", "experts", "a", "experts", "b")[self.tape.below(5)]
        return self.write(name, *self.choose(params[f"{name}.weight"].data, name))

    def write_rest(self, params):
        """Whatever is not final, from the checkpoint."""
        for name, expert in sorted(set().union(*map(self.units, self.shapes)) - self.final):
            part = slice(None) if expert is None else expert
            after, touched = self.value[name].clone(), torch.zeros(self.shapes[name], dtype=torch.bool)
            touched[part], after[part] = True, self.source[name][part]
            p, given = params[f"{name}.weight"].data[part], self.source[name][part]
            assert (name, expert) in self.final or self.write(
                name, touched, after, "copy", functools.partial(p.copy_, given)
            )

    def write(self, name, touched, after, kind, apply):
        """Check what one write does. Returns False if it was refused, for a reason.

        Raises:
            AssertionError: it was refused for none, or something is not as it is after the same write to plain tensors.
        """
        meant = self.units(name, touched)
        rows, cols = self.logical[name][-2:]
        for t in (touched, after):
            t[..., rows:, :] = 0
            t[..., cols:] = 0
        units = meant if kind == "change" else self.units(name, touched)  # of padding nothing is kept
        if kind == "of all" or len(units) > 1:  # from the first expert to the last
            experts = range(self.shapes[name][0]) if kind == "of all" else range(min(units)[1], max(units)[1] + 1)
            units = {(name, e) for e in experts} if len(self.shapes[name]) == 3 else units
        # An op over several experts is one write to each, so the first may finish what the thread held open.
        known = units & (self.full() if len(units) > 1 else self.final)
        differs = self.units(name, after != self.value[name]) & known
        try:
            apply()
        except LoadError as error:
            if self.stream and "stream={" in str(error):  # it met what was quantized as it arrived
                return False
            assert known, f"a write to units that are open was refused: {error}"
            assert differs or kind != "copy" or len(units) > 1, f"an equal value was refused: {error}"
            return False
        if len(units) == 1:
            assert not differs and not (known and kind == "change"), f"{known}: quantized, took another value silently"
        self.value[name] = after
        self.written[name] |= touched
        full = self.full()
        assert self.final <= full, f"{self.final - full} were finished before they were full"
        late = full - units - self.final
        if not self.stream:  # the experts of one tensor are let go together
            late = {(other, expert) for other, expert in late if other != name}
        assert not units or not late, f"{late} are full, and not finished although the loader has moved on"
        return True

    def load(self, scheme, stream, staging_budget=None):
        """The whole sequence."""
        self.stream = stream
        params = dict(self.model.named_parameters())
        options = {"logical_shapes": {"a": self.logical["a"]}} if self.logical["a"] != self.shapes["a"] else {}
        options |= {"stream": stream, "staging_budget": staging_budget}
        on_unit = lambda unit, q, s: self.final.add((unit.name.partition(".")[0], unit.index))  # noqa: E731
        refused = False
        try:
            with LayerwiseLoader(self.model, scheme, device="cpu", on_unit=on_unit, **options):
                while self.tape and not refused:
                    refused = not self.write_any(params)
                if self.finishes and not refused:
                    self.write_rest(params)
        except IncompleteLoadError:
            assert self.full() != set().union(*map(self.units, self.shapes)), "nothing is missing"
        except LoadError:
            assert refused
        else:
            assert not refused and self.full() == self.final == set().union(*map(self.units, self.shapes))
            for name in self.shapes:
                assert_quantized(self.model, f"{name}.weight", self.value[name], scheme)
            return
        assert all(p.is_meta for p in self.model.parameters()) and len(params) == 3


# Blocks and groups of 2 and 3, since no side is longer than 9.
SCHEMES = ("per_tensor", "per_channel", "per_block", PerBlock(2, 3), PerGroup(2))
LOADS = (st.sampled_from(SCHEMES), st.booleans(), st.sampled_from([None, 0, 64]))


@given(st.binary(min_size=20, max_size=160), *LOADS)
@settings(max_examples=500, deadline=None)
def test_a_load_equals_plain_tensors(data, scheme, stream, staging_budget):
    """Through the loader: a unit is finished when its last element has arrived and the loader moves on, never before
    and never later; it holds what plain tensors hold after the same writes; what cannot be honoured is refused."""
    Engine(Tape(data)).load(scheme, stream, staging_budget)
