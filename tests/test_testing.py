"""`assert_same_bits` tells apart what `==` does not, and says where; the conformance kit finds careless loaders."""

import contextlib

import pytest
import torch
from torch import nn

from fp8_kernels.ops import quantize
from fp8_kernels.testing import Adapter, Outcome, as_table, assert_same_bits, loader_cases, run_cases


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


class Plain(Adapter):
    """A loader that copies into real tensors and quantizes at the end: it neither counts nor checks anything."""

    @contextlib.contextmanager
    def enter(self, session):
        model, scheme = session.model, session.case.scheme
        for name, p in list(session.params.items()):
            owner, _, leaf = name.rpartition(".")
            real = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, real)
            session.params[name] = real
        yield
        for name, p in list(model.named_parameters()):
            if p.ndim > 1:
                owner, _, leaf = name.rpartition(".")
                q, scale = quantize(p.data, scheme)
                setattr(model.get_submodule(owner), leaf, nn.Parameter(q, requires_grad=False))
                setattr(model.get_submodule(owner), f"{leaf}_scale", nn.Parameter(scale, requires_grad=False))


def test_the_kit_finds_what_a_careless_loader_does():
    """Data that is missing or contradicts itself passes it by; what is loaded whole it gets right."""
    rows = ("composed_loader", "overlapping_shards", "conflicting_shard", "missing_layer", "non_finite_weight")
    rows += ("whole_layer_moe_unit", "fp32_checkpoint", "storage_copy", "reused_source_buffer", "loader_side_effects")
    rows += ("worker_threads", "exception_mid_reload", "single_file", "padded_weight")
    status = {o.case.name: o.status for o in run_cases(Plain(), loader_cases(rows=rows))}
    passed = {name for name, s in status.items() if s == "pass"}
    assert {"composed_loader", "overlapping_shards-whole", "conflicting_shard-open", "storage_copy-matrix"} <= passed
    assert {"reused_source_buffer", "loader_side_effects"} <= passed
    failed = {name for name, s in status.items() if s == "fail"}
    assert {"overlapping_shards-gap", "overlapping_shards-gap_of_full_count", "conflicting_shard-quantized"} <= failed
    assert {"missing_layer", "missing_layer-nothing_at_all", "non_finite_weight-nan", "fp32_checkpoint-fp32"} <= failed
    assert {"whole_layer_moe_unit", "whole_layer_moe_unit-in_one_copy"} <= failed
    not_offered = {name.partition("-")[0] for name, s in status.items() if s == "not offered"}
    assert not_offered == {"worker_threads", "exception_mid_reload", "single_file", "padded_weight"}


def test_a_table_never_shows_a_pass_for_what_was_not_run():
    """One row a line; a row passes if all of its cases do, and says how many were offered."""
    cases = list(loader_cases(rows=("overlapping_shards", "worker_threads")))
    outcomes = [Outcome(case, "pass") for case in cases[:-1]] + [Outcome(cases[-1], "not offered")]
    table = as_table({"one": outcomes, "two": [Outcome(cases[0], "fail", "why")]})
    assert "| overlapping_shards |" in table and "**A. Finished too early**" in table
    lines = [line for line in table.splitlines() if line.startswith(("| overlapping", "| worker"))]
    assert [line.split(" | ")[-2:] for line in lines] == [
        ["pass", "fail |"],
        ["pass (1 of 2 offered)", "not run |"],
    ]
    with pytest.raises(KeyError):
        list(loader_cases(rows=("no_such_row",)))


def test_an_engine_s_own_error_is_no_refusal():
    """A case that expects the loader to refuse is not passed by a crash of another kind."""

    class Crashing(Plain):
        errors = {"incomplete": ZeroDivisionError}

        @contextlib.contextmanager
        def enter(self, session):
            with super().enter(session):
                yield
            raise RuntimeError("unrelated")

    (outcome,) = run_cases(Crashing(), loader_cases(rows=("init_valued_tensor",)))
    assert (outcome.status, outcome.detail) == ("fail", "RuntimeError: unrelated")
