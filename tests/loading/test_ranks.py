"""Ranks that load together, as two processes over gloo."""

import datetime
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fp8_kernels as fk
from fp8_kernels.errors import IncompleteLoadError, LoadError, NonFiniteWeightError, UnmatchedPatternError
from fp8_kernels.loading import LayerwiseLoader

from .helpers import Model, values

WORLD = 2
SCHEMES = {"row": "per_channel", "vector": "per_channel", "blocks": "per_block"}


class Shard:
    """What a rank holds of each weight: a half of its rows or columns; of `tail`, rank 1 has nothing."""

    def __init__(self, rank, device="cpu"):
        self.rank, self.device = rank, device
        torch.manual_seed(0)
        self.whole = {"column": values(64, 96), "experts": values(4, 20, 96), "row": values(64, 96)}
        self.whole |= {"blocks": values(256, 96), "tail": values(7, 96), "local": values(33, 40)}
        self.whole["column"][60, 3] = 100.0  # the maximum is on one rank
        self.whole["row"][5, 90] = -50.0

    def part(self, name):
        w, half = self.whole[name], slice(self.rank * 48, self.rank * 48 + 48)
        if name == "column":
            return w[self.rank * 32 : self.rank * 32 + 32]
        if name == "experts":
            return w[:, self.rank * 10 : self.rank * 10 + 10]
        if name == "row":
            return w[:, half]
        if name == "blocks":
            return w[self.rank * 128 :][:128]
        return w[:0] if (name, self.rank) == ("tail", 1) else w

    def build(self):
        return Model(**{name: tuple(self.part(name).shape) for name in self.whole})

    def load(self, model, change=None, **options):
        """As an engine: shards in an order of each rank's own, in pieces."""
        names = list(self.whole)[:: -1 if self.rank else 1]
        options = {"schemes": {"row": "per_channel", "blocks": "per_block"}, **options}
        if "reload" in options:
            del options["schemes"]
        else:
            options["scheme"] = "per_tensor"
        with LayerwiseLoader(model, device=self.device, **options) as loader:
            for name in names:
                w, p = self.part(name).to(self.device), model.get_submodule(name).weight.data
                w = w if change is None else change(name, w)
                for start in range(0, len(w), 3):
                    p[start : start + 3].copy_(w[start : start + 3])
        return loader


GROUPS = {"local": None, "column": "world", "experts": "world", "tail": "world", "row": "world"}


def _groups():
    return {name: None if group is None else dist.group.WORLD for name, group in GROUPS.items()}


def check_scales(shard, model):
    """Scales equal those of the whole weight, and codes their part of it; `local` and `blocks` have their own."""
    for name, w in shard.whole.items():
        module, part = model.get_submodule(name), shard.part(name).to(shard.device)
        scheme = SCHEMES.get(name, "per_tensor")
        amax = fk.amax((part if name in ("local", "blocks") else w.to(shard.device)), scheme)
        q, scale = fk.quantize(part, scheme, amax=amax)
        assert torch.equal(module.weight.view(torch.uint8), q.view(torch.uint8)), name
        assert torch.equal(module.weight_scale, scale), name


def unsharded_scales(shard):
    """Scales of sharded weights are those of the whole one, on both ranks, and a reload shares them anew."""
    model = shard.build()
    shard.load(model, scale_group=_groups())
    check_scales(shard, model)
    pointers = [p.data_ptr() for p in model.parameters()]
    for seed, mode in ((1, "transactional"), (2, "streaming")):
        torch.manual_seed(seed)
        shard.whole = {name: torch.randn_like(w) for name, w in shard.whole.items()}
        shard.load(model, reload=mode, scale_group=_groups())
        check_scales(shard, model)
        assert pointers == [p.data_ptr() for p in model.parameters()]
    one = Model(column=tuple(shard.part("column").shape))
    with LayerwiseLoader(one, "per_tensor", device=shard.device, scale_group=dist.group.WORLD, staging_budget=1):
        one.column.weight.data.copy_(shard.part("column"))
    assert torch.equal(one.column.weight_scale, fk.quantize(shard.whole["column"].to(shard.device), "per_tensor")[1])


def local_scales(shard):
    """Without a group there is no collective, and each rank has scales of its own."""
    model = shard.build()
    if shard.rank == 0:
        shard.load(model)
        for name in ("column", "local", "tail"):
            own = fk.quantize(shard.part(name).to(shard.device), "per_tensor")[1]
            assert torch.equal(model.get_submodule(name).weight_scale, own)


def one_rank_fails(shard):
    """Whatever fails on rank 1, before, at or after its check: no rank loads, and each says why."""
    model = shard.build()

    def broken(name, w):
        if shard.rank == 1 and name == "column":
            raise OSError("disk")
        return w

    def short(name, w):
        return w[:-1] if shard.rank == 1 and name == "row" else w

    def nan(name, w):
        w = w.clone()
        if shard.rank == 1 and name == "column":
            w[0, 0] = float("nan")
        return w

    def hook(finished):
        if shard.rank == 1:
            raise ZeroDivisionError("hook")

    cases = [
        ({"change": broken}, OSError, "rank 1 failed with OSError: disk"),
        ({"change": short}, IncompleteLoadError, "rank 1 failed with IncompleteLoadError"),
        ({"on_finish": hook}, ZeroDivisionError, "rank 1 failed with ZeroDivisionError: hook"),
    ]
    for options, error, told in cases:
        expected = (error, None) if shard.rank == 1 else (LoadError, told)
        with pytest.raises(expected[0], match=expected[1]):
            shard.load(model, scale_group=_groups(), **options)
        assert all(p.is_meta for p in model.parameters())
    with pytest.raises(NonFiniteWeightError, match="column.weight"):  # on both: the maximum is
        shard.load(model, change=nan, scale_group=_groups())
    shard.load(model, scale_group=_groups())
    before = [p.detach().clone() for p in model.parameters()]
    for options, error, told in cases:
        expected = (error, None) if shard.rank == 1 else (LoadError, told)
        with pytest.raises(expected[0], match=expected[1]):
            shard.load(model, reload="transactional", scale_group=_groups(), **options)
        assert all(
            torch.equal(p.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
            for p, b in zip(model.parameters(), before, strict=True)
        )


def different_units(shard):
    """A rank that has no such weight at all joins in; one that holds another number of scales is an error on both."""
    model = Model(**({"a": (4, 6), "b": (4, 6)} if shard.rank else {"b": (4, 6)}))
    w = torch.full((4, 6), 1.0 + shard.rank).bfloat16()
    with LayerwiseLoader(model, "per_tensor", device=shard.device, scale_group=dist.group.WORLD):
        for p in model.parameters():
            p.data.copy_(w)
    assert model.b.weight_scale == torch.tensor(2.0, device=shard.device) / 448
    model = Model(a=(4 + shard.rank, 6))
    with pytest.raises(LoadError, match="`a.weight` must have as many scales on every rank, got 4 and 5"):
        with LayerwiseLoader(model, "per_channel", device=shard.device, scale_group={"a": dist.group.WORLD}):
            model.a.weight.data.fill_(1)
    assert model.a.weight.is_meta


def optional_weights(shard):
    """One that arrives nowhere is 0 on all ranks, also within a small budget; one that arrives on a rank has the scale
    of what did."""
    w = torch.full((4, 6), 3.0).bfloat16()
    for arrives, scale in (((), 2**-126), ((0,), torch.tensor(3.0) / 448)):
        model = Model(a=(4, 6), b=(4, 6), c=(4, 6))
        options = {"optional": ["a"], "scale_group": dist.group.WORLD, "staging_budget": w.nbytes}
        with LayerwiseLoader(model, "per_tensor", device=shard.device, **options) as loader:
            if shard.rank in arrives:
                model.a.weight.data.copy_(w)
            model.b.weight.data.copy_(w)
            model.c.weight.data.copy_(w)
        assert loader.report.defaulted == ([] if shard.rank in arrives else ["a.weight"])
        assert model.a.weight_scale == scale and model.b.weight_scale == torch.tensor(3.0) / 448
        assert (model.a.weight.float() == (448 if shard.rank in arrives else 0)).all()
        assert (model.c.weight.float() == 448).all()


CHECKS = (unsharded_scales, local_scales, one_rank_fails, different_units, optional_weights)


def run_rank(rank, folder, backend):
    """One rank's process: every check; what failed goes to a file."""
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        for check in CHECKS:
            check(Shard(rank, device))
            with open(os.path.join(folder, f"{check.__name__}.{rank}"), "w") as out:
                out.write("ok")
    except BaseException:
        with open(os.path.join(folder, f"{check.__name__}.{rank}"), "w") as out:
            out.write(traceback.format_exc())
        os._exit(1)  # the other rank's collective ends with it
    dist.destroy_process_group()


def run_ranks(folder, backend):
    """Both ranks to their end; returns {check: [what each rank says]}."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, str(folder), backend)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
        process.kill()
    said = {}
    for check in CHECKS:
        files = [folder / f"{check.__name__}.{rank}" for rank in range(WORLD)]
        said[check.__name__] = [f.read_text() if f.exists() else "not reached" for f in files]
    return said


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), "gloo")


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks(outcomes, check):
    """See the docstring of each check; both ranks must have come through it."""
    assert outcomes[check] == ["ok"] * WORLD, "\n".join(outcomes[check])


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_what_cannot_be_shared_is_refused(alone):
    """Blocks, patterns that match nothing, several groups, no group: told when the loader is made."""
    model = Model(a=(128, 256))
    with pytest.raises(ValueError, match="`a.weight` must be per_tensor or per_channel to share its scales"):
        _ = LayerwiseLoader(model, "per_block", device="cpu", scale_group={"a": alone}).plan
    with pytest.raises(UnmatchedPatternError, match="'b'.*scale_group"):
        _ = LayerwiseLoader(model, device="cpu", scale_group={"b": alone}).plan
    with pytest.raises(TypeError, match="must be a process group or a mapping to one"):
        LayerwiseLoader(model, device="cpu", scale_group=2)
    with pytest.raises(ValueError, match="one process group, got several"):
        _ = LayerwiseLoader(model, device="cpu", scale_group={"a": alone, "b": dist.new_group([0])}).plan


def test_waiting_units_stay_within_the_budget(alone):
    """Weights that wait for other ranks spill beyond the staging budget, can be read and rewritten until the end, and
    are finished in plan order."""
    shapes = {f"fc{i}": (32, 64) for i in range(6)}
    model, w, seen = Model(**shapes), values(6, 32, 64), []
    options = {"staging_budget": 2 * w[0].nbytes, "on_unit": lambda unit, q, scale: seen.append(unit.name)}
    with LayerwiseLoader(model, "per_tensor", device="cpu", scale_group=alone, **options) as loader:
        for i in (3, 1, 0, 2, 5, 4):
            model.get_submodule(f"fc{i}").weight.data.copy_(w[i])
        p = model.fc3.weight.data
        p.copy_(p + w[0])
        assert not seen
    assert seen == [f"fc{i}.weight" for i in range(6)]
    assert loader.report.spills and loader.report.peak_staging_bytes <= 3 * w[0].nbytes
    wanted = [w[3] + w[0] if i == 3 else w[i] for i in range(6)]
    for i, module in enumerate(model.children()):
        q, scale = fk.quantize(wanted[i], "per_tensor")
        assert torch.equal(module.weight.view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(module.weight_scale, scale) and isinstance(module.weight, nn.Parameter)
