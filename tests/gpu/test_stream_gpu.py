"""`quantize_weights` with CUDA tensors, and with CPU tensors for a CUDA engine."""

import pytest
import torch

import fp8_kernels as fk

from ..checkpoint import tiny
from ..checkpoint.test_stream import CHOICES, equal_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scheme,format", CHOICES)
@pytest.mark.parametrize("source", ["cuda", "cpu", "pinned"])
def test_stream_on_cuda_equals_the_one_on_cpu(scheme, format, source):
    """The same names and bits on the GPU; what passes through stays where it was."""
    state = tiny.tensors()
    wanted = dict(fk.quantize_weights(state.items(), scheme, format))
    moved = {n: t.cuda() if source == "cuda" else t.pin_memory() if source == "pinned" else t for n, t in state.items()}
    stream = fk.quantize_weights(moved.items(), scheme, format, device="cuda")
    found = dict(stream)
    weights = set(tiny.weights(state))
    for name, tensor in found.items():
        made = name in weights or "weight_scale" in name
        assert tensor.is_cuda == (made or source == "cuda"), name
    equal_bits({name: tensor.cpu() for name, tensor in found.items()}, wanted)
    assert stream.report.quantized_tensors == len(weights)


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
def test_buffer_on_the_gpu_may_be_reused(scheme):
    """A source that overwrites one CUDA buffer, on the same stream, when the next tensor is asked for."""
    names = [f"layers.0.{m}.weight" for m in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")]
    state = {name: torch.randn(576, 1032, dtype=torch.bfloat16) * 2.0**i for i, name in enumerate(names)}

    def reusing():
        buffer = torch.empty(576, 1032, dtype=torch.bfloat16, device="cuda")
        for name, t in state.items():
            yield name, buffer.copy_(t)
            buffer.fill_(float("nan"))

    found = {name: t.cpu() for name, t in fk.quantize_weights(reusing(), scheme)}
    equal_bits(found, dict(fk.quantize_weights(state.items(), scheme)))


@pytest.mark.parametrize("scheme,held", [("per_channel", 1), ("per_tensor", 3)])
def test_peak_is_what_the_engine_keeps_and_what_is_held(scheme, held):
    """From host memory, 12 layers: beyond the codes and scales that the engine keeps, the GPU holds one weight, under
    per_tensor one family, and a weight's codes that are on their way."""
    names = [f"layers.{i}.{m}.weight" for i in range(12) for m in ("q_proj", "k_proj", "v_proj", "o_proj")]
    w = torch.randn(2048, 2048, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = dict(fk.quantize_weights(((name, w) for name in names), scheme, device="cuda"))
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated() - before
    assert resident >= 48 * w.numel() and len(kept) == 2 * len(names)
    assert torch.cuda.max_memory_allocated() - before <= resident + held * w.nbytes + w.numel() + (4 << 20)


@pytest.mark.parametrize("target", ["per_channel", "per_block"])
def test_fp8_sources_on_cuda(target):
    """Blocks of a checkpoint as they are, or to other groups: the bits of the CPU."""
    state = {f"layers.{i}.o_proj.weight": torch.randn(384, 640, dtype=torch.bfloat16) for i in range(3)}
    stored = dict(fk.quantize_weights(state.items(), "per_block", "fp8"))
    wanted = dict(fk.quantize_weights(stored.items(), target))
    found = dict(fk.quantize_weights(stored.items(), target, device="cuda"))
    assert all(tensor.is_cuda for tensor in found.values())
    equal_bits({name: tensor.cpu() for name, tensor in found.items()}, wanted)
