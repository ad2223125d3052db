"""The kernel API on one weight: `quantize`, `dequantize` and `amax`, every scheme.

What to copy: one call, `q, scale = fk.quantize(w, scheme)`. It runs on the tensor's device.
"""

import torch

import fp8_kernels as fk

if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w = torch.randn(1025, 576, device=device, dtype=torch.bfloat16) / 24  # [N, K]: out features, in features

    for scheme in ("per_tensor", "per_channel", "per_block", "mxfp8", fk.PerGroup(64)):
        q, scale = fk.quantize(w, scheme)
        back = fk.dequantize(q, scale, torch.float32, scheme)
        error = ((back - w.float()).norm() / w.float().norm()).item()
        print(f"scale {tuple(scale.shape)!s:<11} relative error {error:.4f}  {scheme}")
        assert error < 0.04

    experts = torch.randn(4, 136, 96, device=device, dtype=torch.bfloat16)  # a leading dimension is a batch
    q, scale = fk.quantize(experts, "per_tensor")
    assert scale.shape == (4,)  # one scale an expert

    buffer = torch.empty(2, 1025, 576, device=device, dtype=torch.float8_e4m3fn)  # into memory that is there already
    scales = torch.empty(2, 1025, 1, device=device)
    fk.quantize(w, "per_channel", out=(buffer[1], scales[1]))

    amax = torch.zeros((), device=device)  # a maximum that grows as shards arrive; then only the cast is left
    for rows in w.split(256):
        fk.amax(rows, "per_tensor", out=amax, accumulate=True)
    assert torch.equal(fk.quantize(w, "per_tensor", amax=amax)[1], fk.quantize(w, "per_tensor")[1])
