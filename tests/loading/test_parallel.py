"""Tensor-, pipeline- and expert-parallel loads are the engine's own, and work unchanged in the loader."""

import datetime
import random
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fp8_kernels as fk
from fp8_kernels.loading import LayerwiseLoader

from ..parallel_model import LAYERS, ParallelModel, Ranks, checkpoint
from .helpers import assert_quantized

SCHEMES = ("per_tensor", "per_channel", "per_block", "per_group")
# Every rank of 1, 2 and 4; of two k and v heads, four ranks have two copies.
TP = [(rank, size) for size in (1, 2, 4) for rank in range(size)]
WORLD = 2


def loaded(ranks, weights, scheme, **options):
    with torch.device("meta"):
        model = ParallelModel(ranks)
    with LayerwiseLoader(model, scheme, device="cpu", **options) as loader:
        model.load_weights(weights)
    return model, loader.report


def assert_equals_quantizing_after(model, ranks, state, scheme):
    """What a plain load leaves on this rank, quantized weight by weight and expert by expert."""
    plain = ParallelModel(ranks)
    plain.load_weights(state.items())
    assert {n for n, _ in model.named_parameters()} >= {n for n, _ in plain.named_parameters()}
    num_fp8 = 0
    for name, p in plain.named_parameters():
        if model.get_parameter(name).dtype == torch.float8_e4m3fn:
            assert_quantized(model, name, p.data, scheme)
            num_fp8 += 1
        else:
            assert torch.equal(model.get_parameter(name), p), name
    return num_fp8


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tp", TP)
def test_tensor_parallel(tp, scheme):
    """Fused, row-parallel, replicated, vocabulary-parallel and expert weights of each rank, shards in any order."""
    state, ranks = checkpoint(), Ranks(tp=tp)
    items = list(state.items())
    random.shuffle(items)
    model, report = loaded(ranks, items, scheme)
    assert assert_equals_quantizing_after(model, ranks, state, scheme) == 4 * LAYERS
    assert not report.duplicates and not report.rewrites


@pytest.mark.parametrize("scheme", ["per_tensor", "per_block"])
@pytest.mark.parametrize("ep", [(0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("tp", [(0, 1), (1, 2)])
def test_expert_parallel(ep, tp, scheme):
    """A rank holds, and quantizes, its own experts; those of others are the engine's to skip, and cost nothing."""
    state, ranks = checkpoint(), Ranks(tp=tp, ep=ep)
    model, report = loaded(ranks, state.items(), scheme)
    assert_equals_quantizing_after(model, ranks, state, scheme)
    num_local = 4 // ep[1]
    assert report.quantized_units == 2 * LAYERS + LAYERS // 2 * 2 + LAYERS // 2 * 2 * num_local
    assert model.model.layers["1"].mlp.experts.w13_weight.shape[0] == num_local


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("pp", [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
def test_pipeline_parallel(pp, scheme):
    """A stage makes some layers and is given all names: what it has no parameter for, its own loop passes by, and
    nothing is missing. Stages together are the model."""
    state, ranks = checkpoint(), Ranks(pp=pp)
    model, _ = loaded(ranks, state.items(), scheme)
    assert_equals_quantizing_after(model, ranks, state, scheme)
    whole, _ = loaded(Ranks(), state.items(), scheme)
    for name, p in model.named_parameters():
        assert torch.equal(p.reshape(-1).view(torch.uint8), whole.get_parameter(name).reshape(-1).view(torch.uint8))


def test_what_a_stage_lacks_is_its_own(tmp_path):
    """A stage that is not given one of its layers says which; names of other stages are not asked for."""
    state = {name: t for name, t in checkpoint().items() if "layers.1.self_attn.k_proj" not in name}
    with pytest.raises(fk.IncompleteLoadError) as error:
        loaded(Ranks(pp=(0, 2)), state.items(), "per_channel")
    assert "model.layers.1.self_attn.qkv_proj.weight" in str(error.value) and "layers.2" not in str(error.value)
    loaded(Ranks(pp=(1, 2)), state.items(), "per_channel")


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_together_hold_the_whole(tp_size):
    """Rows have scales of their own, so with per_channel the ranks' parts of a column-parallel weight are those of the
    whole one; k and v heads that two ranks share are the same on both."""
    state = checkpoint()
    parts = [loaded(Ranks(tp=(rank, tp_size)), state.items(), "per_channel")[0] for rank in range(tp_size)]
    q, scale = fk.quantize(state["model.layers.0.mlp.up_proj.weight"], "per_channel")
    weights = [m.model.layers["0"].mlp.gate_up_proj for m in parts]
    size = len(q) // tp_size
    assert torch.equal(torch.cat([w.weight[size:] for w in weights]).view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(torch.cat([w.weight_scale[size:] for w in weights]), scale)
    if tp_size == 4:
        first, second = (m.model.layers["0"].self_attn.qkv_proj.weight[24:].view(torch.uint8) for m in parts[:2])
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["transactional", "streaming"])
@pytest.mark.parametrize("tp", [(0, 2), (3, 4)])
def test_reload_of_a_rank(tp, mode):
    """New weights of the whole model through the same loop: this rank's part, at the same addresses."""
    state, ranks = checkpoint(), Ranks(tp=tp, ep=(1, 2))
    model, _ = loaded(ranks, state.items(), "per_channel")
    pointers = [p.data_ptr() for p in model.parameters()]
    state = checkpoint()
    with LayerwiseLoader(model, reload=mode):
        model.load_weights(state.items())
    assert_equals_quantizing_after(model, ranks, state, "per_channel")
    assert pointers == [p.data_ptr() for p in model.parameters()]


# Two processes.


def run_rank(rank, folder):
    """Every check on this rank; what failed goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        for name, dimension in (("tp", "tp"), ("pp", "pp"), ("ep", "ep")):
            ranks = Ranks(**{dimension: (dist.get_rank(), dist.get_world_size())})
            torch.manual_seed(0)
            state = checkpoint()
            items = list(state.items())[:: 1 if rank else -1]  # in another order on each rank
            groups = [None, dist.group.WORLD] if name == "tp" else [None]
            for group in groups:
                scheme = "per_tensor"
                model, _ = loaded(ranks, items, scheme, scale_group=group)
                if group is None:
                    assert_equals_quantizing_after(model, ranks, state, scheme)
                else:
                    assert_scales_are_of_the_whole(model, state)
    except BaseException:
        (folder / f"{rank}").write_text(traceback.format_exc())
        raise
    (folder / f"{rank}").write_text("ok")
    dist.destroy_process_group()


def assert_scales_are_of_the_whole(model, state):
    for i in range(0, LAYERS, 2):
        layer = model.model.layers[str(i)]
        gate, up = (state[f"model.layers.{i}.mlp.{part}_proj.weight"] for part in ("gate", "up"))
        assert torch.equal(layer.mlp.gate_up_proj.weight_scale, fk.quantize(torch.cat([gate, up]), "per_tensor")[1])
        down = state[f"model.layers.{i}.mlp.down_proj.weight"]
        assert torch.equal(layer.mlp.down_proj.weight_scale, fk.quantize(down, "per_tensor")[1])


def test_two_processes(tmp_path):
    """Over gloo: tensor-, pipeline- and expert-parallel ranks that load at once, in different orders, without meeting;
    and with `scale_group`, where scales are those of the whole weights."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, tmp_path)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        process.kill()
    said = [(tmp_path / f"{rank}").read_text() if (tmp_path / f"{rank}").exists() else "none" for rank in range(WORLD)]
    assert said == ["ok"] * WORLD, "\n".join(said)
