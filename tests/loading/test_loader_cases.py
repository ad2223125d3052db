"""Every case of the conformance kit against our own loader, one test a case."""

import functools

import pytest

from fp8_kernels.testing import LayerwiseAdapter, NotOffered, loader_cases, run_case
from fp8_kernels.testing.case import NEEDS, SECTIONS

from .helpers import SCHEMES

# What the kit claims to hold, by section.
ROWS = {
    "A": "composed_loader composed_loader_on_shard duplicate_shard conflicting_shard overlapping_shards tied_parameter "
    "retry_after_failure dtype_view storage_copy scratch_copy broadcast_copy late_second_pass",
    "B": "never_loaded_buffer alias_counted_twice bias_registered_later bias_absent_from_checkpoint padded_weight "
    "zero_size_tensor rank_with_nothing_to_load non_local_expert redundant_expert_slot init_valued_tensor "
    "missing_shard missing_layer one_layer_across_files scalar_setitem index_writes out_variants foreach_copy_ "
    "rebinding numpy_or_dlpack_alias device_dependent_op",
    "C": "tensor_parallel_scale reused_source_buffer bf16_into_fp8_parameter "
    "fp8_checkpoint_into_quantizing_layer fp32_checkpoint value_dependent_loader loader_side_effects "
    "per_tensor_scale_of_fused_qkv untileable_shape meta_source non_finite_weight monkey_patched_copy",
    "D": "held_references out_of_order_checkpoint full_tensor_held whole_layer_moe_unit fp32_temporaries "
    "prefetch_outruns_quantization reserved_not_allocated peak_measured_too_soon iterator_turned_into_list "
    "accounting_cost",
    "E": "worker_threads concurrent_shards_of_one_unit thread_without_current_device async_copy_and_buffer_reuse "
    "unordered_completion one_rank_fails",
    "F": "exception_mid_reload bad_tensor_buffered_before_validation cuda_graph_pointers stale_weight_loader "
    "chunked_updates partial_update deferred_module engine_post_processing non_idempotent_post_processing "
    "alias_and_non_persistent_buffers",
    "G": "dummy_load fused_3d_expert_checkpoint per_expert_checkpoint non_gated_moe cpu_offloaded_parameter "
    "single_file sharded_with_index pickled_bin",
}
CASES = list(loader_cases())
ADAPTER = LayerwiseAdapter()


@functools.lru_cache(maxsize=4)
def cases_of(row, scheme):
    """The cases of a row by name; they hold no state, so each can be run any number of times."""
    return {case.name: case for case in loader_cases(scheme, rows=(row,))}


def _runs():
    for case in CASES:
        # From section D on, schemes differ only by kind: quantized as shards arrive, or when a weight is whole.
        for scheme in SCHEMES if case.section <= "C" else ("per_channel", "per_tensor"):
            yield pytest.param(case, scheme, id=f"{case.name}-{scheme}")


@pytest.mark.parametrize(("case", "scheme"), list(_runs()))
def test_case(case, scheme):
    """What the case says must hold, holds."""
    try:
        run_case(ADAPTER, cases_of(case.row, scheme)[case.name])
    except NotOffered as reason:
        pytest.skip(f"needs {reason}")


def test_the_kit_holds_the_rows_that_it_claims():
    """By section, and no two cases have one name."""
    held = {section: [] for section in ROWS}
    for case in CASES:
        if case.row not in held[case.section]:
            held[case.section].append(case.row)
        assert case.section in SECTIONS and case.needs <= NEEDS.keys()
    assert {section: " ".join(rows) for section, rows in held.items()} == ROWS
    assert len({case.name for case in CASES}) == len(CASES)
