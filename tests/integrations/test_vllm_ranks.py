"""Two processes, each a rank of vLLM's own process groups over gloo."""

import os
import traceback

import pytest
import torch
import torch.multiprocessing as mp

from .vllm_env import engine_config, make_model, start_groups, without_compiled_ops  # isort: skip

from fp8_kernels.integrations.vllm.options import Options

from .test_vllm_online import EXPERTS, HIDDEN, INNER, SCHEMES, assert_same_layers, loaded, shards

WORLD = 2


def run_rank(rank, folder, source):
    torch.set_num_threads(1)
    said = "ok"
    try:
        start_groups(rank, WORLD, f"file://{folder}/rendezvous")
        patch = pytest.MonkeyPatch()
        without_compiled_ops(patch)
        config = engine_config(source)
        for scheme in SCHEMES:
            check_same_as_vllm(config, scheme, rank)
        check_own_scales(config)
    except BaseException:
        said = traceback.format_exc()
    with open(f"{folder}/{rank}", "w") as file:
        file.write(said)
    os._exit(0)  # the other rank may be waiting for this one


def check_same_as_vllm(config, scheme, rank):
    """Scales that span ranks too: vLLM takes each maximum over all ranks, layer by layer; we take all at the end."""
    checkpoint = list(shards())
    theirs, _ = loaded(config, scheme, ours=False, checkpoint=checkpoint)
    # Ranks need not be in step: nothing is sent before all weights have arrived.
    mine = checkpoint[::-1] if rank else checkpoint
    ours, _ = loaded(config, scheme, ours=True, checkpoint=mine)
    assert_same_layers(ours, theirs)
    # Half of the intermediate size, which vLLM pads to whole blocks.
    rows = 2 * (256 if scheme == "fp8_per_block" else INNER // 2)
    assert ours.moe.routed_experts.w13_weight.shape == (EXPERTS, rows, HIDDEN)
    assert ours.qkv.weight.numel() == 256 * HIDDEN


def check_own_scales(config):
    """`shared_scales=False`: the largest code of every weight and expert is of this rank, and nothing waits."""
    ours, report = loaded(config, "fp8_per_tensor", ours=True, options=Options(shared_scales=False))
    for weight in (ours.down.weight, ours.qkv.weight, *ours.moe.routed_experts.w13_weight):
        assert weight.float().abs().max() == 448
    assert report.peak_staging_bytes < EXPERTS * INNER * HIDDEN * 2


@pytest.mark.slow
def test_two_ranks_hold_what_vllms_own_loading_gives_them(tmp_path):
    """tp_size 2: linear layers and experts, all three schemes."""
    source = make_model(tmp_path / "moe", "qwen3_moe")
    context = mp.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, str(tmp_path), source)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    said = [
        (tmp_path / str(rank)).read_text() if (tmp_path / str(rank)).exists() else "no end" for rank in range(WORLD)
    ]
    assert said == ["ok"] * WORLD, "\n".join(said)
