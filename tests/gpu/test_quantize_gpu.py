"""Writing checkpoints on a CUDA device: the bytes of the CPU, within bounded memory of device and host."""

import pytest
import torch

from fp8_kernels.checkpoint import output as output_module
from fp8_kernels.checkpoint import quantize_checkpoint, write_amax
from fp8_kernels.errors import NonFiniteWeightError

from ..checkpoint import tiny

pytestmark = pytest.mark.gpu

CHOICES = [("per_channel", "compressed-tensors"), ("per_tensor", "compressed-tensors"), ("per_block", "fp8")]


@pytest.mark.parametrize("sidecar", [False, True])
@pytest.mark.parametrize("scheme,format", CHOICES)
def test_the_bytes_of_the_cpu(scheme, format, sidecar, tmp_path):
    """Every file of the folder, small weights and weights that are read ahead."""
    state = tiny.tensors(3) | {
        f"model.layers.{i}.large_proj.weight": torch.randn(1024, 1280).bfloat16() for i in range(6)
    }
    src = tiny.write_sharded(tmp_path / "in", state)
    if sidecar:
        write_amax(src)
    quantize_checkpoint(src, tmp_path / "cpu", scheme, format)
    seen = []
    quantize_checkpoint(src, tmp_path / "gpu", scheme, format, device="cuda", progress=lambda *args: seen.append(args))
    assert tiny.files(tmp_path / "gpu") == tiny.files(tmp_path / "cpu")
    assert {name for *_, name in seen} == state.keys() and seen[-1][0] == sum(t.nbytes for t in state.values())


def test_weights_that_are_not_finite_are_all_named(tmp_path):
    """Found where the result is written; nothing is left behind."""
    state = tiny.tensors()
    bad = tiny.weights(state)[3::5]
    for name in bad:
        state[name][1, 2] = float("nan")
    src = tiny.write_sharded(tmp_path / "in", state)
    with pytest.raises(NonFiniteWeightError) as caught:
        quantize_checkpoint(src, tmp_path / "out", device="cuda")
    assert all(name in str(caught.value) for name in bad)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Forty weights of 16 MiB: two of them on the device with their results, and on the host what may wait."""
    state = {f"model.layers.{i}.o_proj.weight": torch.randn(2048, 4096).bfloat16() for i in range(40)}
    src = tiny.write_single(tmp_path / "in", state)
    quantize_checkpoint(src, tmp_path / "warm", device="cuda")

    def anonymous():
        with open("/proc/self/status") as file:
            return int(file.read().split("RssAnon:")[1].split()[0]) << 10

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, peak = anonymous(), 0

    def look(*_):
        nonlocal peak
        peak = max(peak, anonymous() - before)

    base = torch.cuda.memory_allocated()
    quantize_checkpoint(src, tmp_path / "out", device="cuda", progress=look)
    assert torch.cuda.max_memory_allocated() - base < 4 * (16 << 20)
    assert peak < 2 * output_module.MAX_BYTES + (256 << 20)
