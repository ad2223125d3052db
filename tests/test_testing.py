"""`assert_same_bits` tells apart what `==` does not, and says where."""

import pytest
import torch

from fp8_kernels.testing import assert_same_bits


def test_names_the_first_difference_and_both_values():
    """The coordinate, the values and the count are in the message."""
    expected = torch.zeros(3, 4)
    actual = expected.clone()
    actual[1, 2], actual[2, 3] = 5.0, 6.0
    with pytest.raises(AssertionError, match=r"scale: 2 of 12 .* first at \(1, 2\): got 5.0 \(0x40a00000\)"):
        assert_same_bits(actual, expected, "scale")


def test_equal_nans_pass_and_a_negative_zero_does_not():
    """It compares bits, not values."""
    assert_same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        with pytest.raises(AssertionError, match=r"first at \(0,\): got -0.0"):
            assert_same_bits(torch.tensor([-0.0]).to(dtype), torch.tensor([0.0]).to(dtype))


def test_dtype_and_shape_must_agree():
    """The same bytes under another dtype or shape are another tensor."""
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(torch.zeros(2, dtype=torch.int32), torch.zeros(2))
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(torch.zeros(2, 1), torch.zeros(2))
