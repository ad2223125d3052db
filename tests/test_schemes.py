"""Schemes: the rectangle each one stands for, its scale shapes, and how names are read."""

import pytest
import torch

from fp8_kernels.schemes import (
    SCHEMES,
    WHOLE,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    as_scheme,
    mxfp8,
    scheme_name,
)


@pytest.mark.parametrize(
    "scheme, block, shape",
    [
        (PerTensor(), (WHOLE, WHOLE), (3,)),
        (PerChannel(), (1, WHOLE), (3, 130, 1)),
        (PerBlock(), (128, 128), (3, 2, 5)),
        (PerBlock(7, 1000), (7, 1000), (3, 19, 1)),
        (PerGroup(), (1, 128), (3, 130, 5)),
        (mxfp8(), (1, 32), (3, 130, 18)),
    ],
)
def test_scale_shape_counts_partial_groups(scheme, block, shape):
    """`[3, 130, 576]`: 576 is no multiple of 128, and 130 none either."""
    assert scheme.block == block
    assert scheme.scale_shape((3, 130, 576)) == shape


def test_names_of_other_projects_mean_the_same():
    """vLLM's and llm-compressor's names are aliases, not schemes of their own."""
    assert as_scheme("fp8_per_tensor") == as_scheme("per_tensor") == PerTensor()
    assert as_scheme("FP8_DYNAMIC") == as_scheme("fp8_per_channel") == PerChannel()
    assert as_scheme("FP8_BLOCK") == as_scheme("fp8_per_block") == PerBlock(128, 128)


def test_scheme_name_is_the_inverse():
    """Every scheme with a name can be printed and read back."""
    for scheme in SCHEMES.values():
        assert as_scheme(scheme_name(scheme)) == scheme
    assert "64" in scheme_name(PerBlock(64, 128))


@pytest.mark.parametrize(
    "scheme, text",
    [
        (PerChannel(), "PerChannel()"),
        (PerGroup(64), "PerGroup(group_size=64)"),
        (PerTensor((2, 3)), "PerTensor(segments=(2, 3))"),
        (PerBlock(64, 128, pow2=True, numerics="exact"), "PerBlock(pow2=True, block_n=64)"),
    ],
)
def test_a_scheme_prints_as_it_is_made(scheme, text):
    """Plans and errors show it where it has no name."""
    assert repr(scheme) == text and eval(text) == scheme


def test_unknown_name_lists_the_known_ones():
    """The message is the documentation that a user sees first."""
    with pytest.raises(ValueError, match="per_channel.*got 'per_row'"):
        as_scheme("per_row")
    with pytest.raises(TypeError, match="must be a name or a Scheme"):
        as_scheme(128)


@pytest.mark.parametrize("bad", [lambda: PerBlock(0, 128), lambda: PerGroup(-4), lambda: PerGroup(1.5)])
def test_sizes_must_be_positive_ints(bad):
    """Caught where the scheme is made, not in a kernel."""
    with pytest.raises(ValueError, match="positive ints"):
        bad()


def test_scale_dtype_is_checked():
    """e8m0 stores powers of two and nothing else."""
    with pytest.raises(ValueError, match="pow2=True"):
        PerGroup(32, scale_dtype=torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="scale_dtype"):
        PerTensor(scale_dtype=torch.float16)
