"""What threads hold open, and what becomes of it once they let go.

Composed loaders copy a weight and then write a function of it back. So the latest shard of each thread, and the units
that its last write completed, stay open until the thread writes elsewhere: until then they can be read and rewritten.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable

import torch

from .launches import Launches
from .report import Report
from .target import Target
from .unit import Shard, Unit


class Hand:
    """What one thread holds open: its latest shard, not quantized yet, and the units that its last write completed."""

    __slots__ = ("shard", "units")

    def __init__(self):
        self.shard: Shard | None = None
        self.units: list[Unit] = []


def _remembered(method):
    """The method, which notes what it raises: a shard that was on its way may be lost, whatever the engine catches."""

    @functools.wraps(method)
    def called(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            self.failure = self.failure or error
            raise

    return called


class Hands:
    """The hands of all threads.

    Attributes:
        failure: what let no unit be finished as it should, or what a hook raised; the first.

    Args:
        report: counts what happens.
        on_unit: called with (unit, q, scale) after each unit.
        on_final: called with each `Tracked` when its last unit is final.
        progress: called with (unit) after each unit, or None.
        launches: where small units wait that count as final; None where hooks look at their results.
    """

    def __init__(
        self,
        report: Report,
        on_unit,
        on_final: Callable,
        progress: Callable | None,
        launches: Launches | None = None,
    ):
        self._report, self._phases = report, report.seconds_by_phase
        self._phases["quantize"] = 0.0
        self._on_unit, self._on_final, self._progress, self._launches = on_unit, on_final, progress, launches
        self._of_thread: dict[int, Hand] = {}
        self.failure: BaseException | None = None

    def mine(self) -> Hand:
        """The hand of this thread."""
        thread = threading.get_ident()
        hand = self._of_thread.get(thread)
        if hand is None:
            hand = self._of_thread[thread] = Hand()
        return hand

    def hold(self, hand: Hand, shard: Shard):
        """Hold the shard open, and record it as written."""
        hand.shard = shard
        for unit in shard.units:
            unit.coverage.add_box(shard.box)
            unit.shards.append(shard)

    def hold_units(self, units: Iterable[Unit]):
        """This thread holds open those of the units that are complete."""
        held = self.mine().units
        for unit in units:
            if unit not in held and not unit.final and unit.coverage.complete:
                held.append(unit)

    @_remembered
    def let_go(self, hand: Hand, turning_to: Iterable[Unit] = ()):
        """The thread turns to these units: what else it held open is quantized."""
        shard = hand.shard
        if shard is not None:
            if shard.is_whole and shard.units[0] not in turning_to:
                self._finish_whole(hand)
            else:
                self._place(hand)
        if hand.units:
            # Where nothing streams, a whole tensor of experts may be read back.
            stays = {unit.tracked for unit in turning_to if not unit.tracked.streams}
            held, hand.units = hand.units, []
            for unit in held:
                if unit in turning_to or unit.tracked in stays:
                    hand.units.append(unit)
                else:
                    self.finish(unit)

    @_remembered
    def flush(self):
        """All threads let go of everything."""
        for hand in list(self._of_thread.values()):
            if hand.shard is not None:
                self._place(hand)
            held, hand.units = hand.units, []
            for unit in held:
                self.finish(unit)
        self.launch()

    @_remembered
    def settle(self, targets: Iterable[Target]):
        """What threads hold open of the targets' elements goes where it can be read and changed."""
        for target in targets:
            for unit in target.units if target.tracked.entry.scheme else ():
                for shard in list(unit.shards):
                    if target.meets(shard.box):
                        self.keep(shard)

    def keep(self, shard: Shard):
        """Move a held shard into the buffers of its units, where it can be read and changed; they stay held."""
        hand = next(hand for hand in self._of_thread.values() if hand.shard is shard)
        hand.shard = None
        taken = False
        for unit in shard.units:
            unit.shards.remove(shard)
            taken = unit.keep(shard)
            if unit.coverage.complete and unit not in hand.units:
                hand.units.append(unit)
        if not taken:
            shard.tracked.staging.release(shard.buffer)

    @_remembered
    def finish(self, unit: Unit, amax: torch.Tensor | None = None):
        """Quantize what is left of a complete unit, unless a thread holds some of it open still, or it waits for maxima
        of other ranks.

        Args:
            amax: those maxima.
        """
        if unit.final or unit.shards or (unit.tracked.waits_for_ranks and amax is None):
            return
        started = time.perf_counter()
        unit.finalize(amax)
        self._tell(unit, started)

    @_remembered
    def was_made(self, unit: Unit):
        """All of a unit, of which nothing was written before, is quantized."""
        started = time.perf_counter()
        unit.close()  # it may have been read, or zeroed, before anything arrived
        unit.finished()
        self._tell(unit, started)

    def _finish_whole(self, hand):
        """Quantize a held shard that is the whole of its one unit, in one launch."""
        shard, hand.shard = hand.shard, None
        started, unit = time.perf_counter(), shard.units[0]
        unit.shards.clear()
        if unit.buffer is not None:  # it was read, or zeroed, before anything arrived
            unit.close()
        if not self._lets_wait(shard):
            shard.tracked.quantize_unit(shard.first, shard.buffer)
            shard.tracked.staging.release(shard.buffer)
        unit.finished()
        self._tell(unit, started)

    def _lets_wait(self, shard):
        """Leave its one unit, whole, to be quantized with others; returns whether it may be."""
        tracked, launches = shard.tracked, self._launches
        if launches is None or tracked.maxima is not None or tracked.edges:
            return False
        return launches.add(shard.buffer, tracked.entry.scheme, *tracked.result_of_unit(shard.first))

    @_remembered
    def launch(self):
        """Quantize what waits for that."""
        if self._launches is not None:
            self._launches.launch()

    @_remembered
    def launch_less_than(self, num_bytes: int):
        """Quantize what waits for that, where something as large needs room and may find it there."""
        if self._launches is not None and self._launches.num_bytes < num_bytes:
            self._launches.launch()

    def _tell(self, unit, started):
        """A unit is quantized."""
        self._report.quantized_units += 1
        self._phases["quantize"] += time.perf_counter() - started
        if self._on_unit is not None:
            self._on_unit(unit, *unit.result())
        if self._progress is not None:
            self._progress(unit)
        if unit.tracked.final:
            self._on_final(unit.tracked)

    @_remembered
    def pass_through(self, unit: Unit):
        """A tensor that stays as it is has arrived."""
        unit.final = True
        unit.tracked.finished_unit()
        if self._progress is not None:
            self._progress(unit)
        self._on_final(unit.tracked)

    def _place(self, hand):
        """Quantize the whole groups of a held shard; what is left of it waits in its units."""
        shard, hand.shard = hand.shard, None
        tracked, box, units = shard.tracked, shard.box, shard.units
        started = time.perf_counter()
        values = shard.values
        whole = tracked.quantize(shard.first, len(units), box, values)
        for i, unit in enumerate(units):
            unit.shards.remove(shard)
            unit.add_streamed(whole)
            if whole != box:
                for edge in around(whole, box):
                    unit.stage(edge, part(values[i], box, edge))
        tracked.staging.release(shard.buffer)
        self._phases["quantize"] += time.perf_counter() - started
        for unit in units:
            if unit.coverage.complete and unit not in hand.units:
                hand.units.append(unit)


def around(inner, box):
    """The up to four rectangles that are left of `box` without `inner`."""
    row0, row1, col0, col1 = inner
    edges = [(box[0], row0, box[2], box[3]), (row1, box[1], box[2], box[3])]
    edges += [(row0, row1, box[2], col0), (row0, row1, col1, box[3])]
    return [edge for edge in edges if edge[0] < edge[1] and edge[2] < edge[3]]


def part(values, box, inner):
    """What of `values`, those of the rectangle `box`, is in the rectangle `inner`."""
    return values[inner[0] - box[0] : inner[1] - box[0], inner[2] - box[2] : inner[3] - box[2]]
