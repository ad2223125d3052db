"""What tests of FP8 kernels need, here and in the projects that use them: comparison by bits."""

import torch

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bit patterns of `t`: integers of the same size, the same shape."""
    return t.contiguous().view(_BITS[t.element_size()])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensor") -> None:
    """Assert that two tensors have the same dtype, shape and bits; NaN equals only the same NaN, and -0 not 0.

    They may be on different devices; `actual` then moves to that of `expected`.

    Raises:
        AssertionError: names the first coordinate that differs, both values and bit patterns, and how many differ.
    """
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual_bits, expected_bits = bits(actual).to(expected.device), bits(expected)
    if torch.equal(actual_bits, expected_bits):
        return
    differs = actual_bits != expected_bits
    flat = int(differs.flatten().int().argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape)) if actual.ndim else ()
    mask = (1 << 8 * actual.element_size()) - 1
    got, want = (
        f"{float(t[at])} ({int(b[at]) & mask:#x})" for t, b in ((actual, actual_bits), (expected, expected_bits))
    )
    raise AssertionError(
        f"{what}: {int(differs.sum())} of {actual.numel()} elements differ, first at {at}: got {got}, expected {want}"
    )
