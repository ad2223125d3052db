"""`numerics="vllm"` gives the bits of vLLM's own kernels, on more than 10^9 elements of each scheme.

Its library is taken from an installed vLLM, or from the folder that FP8_KERNELS_PEERS names (`vllm*.so`).
"""

import os

import pytest
import torch

import fp8_kernels as fk
from bench import peers
from fp8_kernels.testing import assert_same_bits

pytestmark = pytest.mark.gpu

F8 = torch.float8_e4m3fn
CHUNK = 1 << 26
# Elements by backend: the reference on a GPU is slow, and the same code as on the CPU.
ELEMENTS = {"cuda": 17 * CHUNK, "triton": 17 * CHUNK, "reference": CHUNK}


@pytest.fixture(scope="module")
def vllm():
    """vLLM's compiled ops."""
    try:
        return peers.vllm_ops(os.environ.get("FP8_KERNELS_PEERS"))
    except peers.Absent as reason:
        pytest.skip(f"vLLM's kernels are not here: {reason}")


def mixed(shape, dtype):
    """Normal values, each row at a magnitude of its own, with rows of one bit pattern's neighbours and of zeros."""
    exponents = (-14, 5) if dtype == torch.float16 else (-90, 90)
    w = torch.randn(shape, device="cuda") * torch.randint(*exponents, (*shape[:-1], 1), device="cuda").float().exp2()
    w[..., 1::16, :] = w[..., 1::16, :1]
    w[..., 1::16, ::3] *= 1 + 2**-7
    w[..., 2::16, :] = 0
    w[..., 3::16, :] *= 2**-40  # below the floors
    return w.to(dtype)


def static(vllm, w):
    q = torch.empty_like(w, dtype=F8)
    scale = (w.abs().amax().float() / torch.tensor(448.0, device="cuda")).reshape(1)
    vllm.static_scaled_fp8_quant(q, w, scale, None)
    return q, scale.reshape(())


def token(vllm, w):
    q, scale = torch.empty_like(w, dtype=F8), torch.empty(len(w), 1, device="cuda")
    vllm.dynamic_per_token_scaled_fp8_quant(q, w, scale, None)
    return q, scale


def group(vllm, w):
    q, scale = torch.empty_like(w, dtype=F8), torch.empty(len(w), w.shape[1] // 128, device="cuda")
    vllm.per_token_group_fp8_quant(w, q, scale, 128, 1e-10, -448.0, 448.0, False, False, False)
    return q, scale


def block(_, w):
    """It has no kernel for these: eager torch, with its division by a number."""
    blocks = w.view(w.shape[0] // 128, 128, w.shape[1] // 128, 128)
    scale = blocks.abs().float().amax(dim=(1, 3), keepdim=True).clamp(1e-4) / 448.0
    return (blocks * (1.0 / scale)).to(F8).view(w.shape), scale.view(len(blocks), -1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ELEMENTS)
@pytest.mark.parametrize(
    "scheme, theirs", [("per_tensor", static), ("per_channel", token), ("per_group", group), ("per_block", block)]
)
def test_bits_are_those_of_vllms_kernels(vllm, scheme, theirs, backend):
    """Codes and scales, for each input dtype."""
    if backend not in fk.available_backends("cuda"):
        pytest.skip(f"backend {backend!r} is not available here")
    compared = 0
    while compared < ELEMENTS[backend]:
        dtype = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)[compared // CHUNK % 4]
        # One scale a weight: weights of many sizes, so that there are many scales.
        shapes = [(512, 512 * n) for n in (1, 3, 12, 48, 192)] if scheme == "per_tensor" else [(CHUNK // 4096, 4096)]
        for shape in shapes:
            w = mixed(shape, dtype)
            want = theirs(vllm, w)
            got = fk.quantize(w, scheme, numerics="vllm", backend=backend)
            assert_same_bits(got[1], want[1], f"scale of {shape} {dtype}")
            assert_same_bits(got[0], want[0], f"codes of {shape} {dtype}")
            compared += w.numel()
