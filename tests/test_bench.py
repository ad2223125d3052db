"""The benchmarks and their tables: what they count, compare and print, and that they run where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bars, conformance, kernels, measure, peers, readme, resources, tables
from fp8_kernels.testing import assert_same_bits, loader_cases

ROOT = Path(kernels.__file__).parents[1]
# A weight, experts, one expert: with blocks of 128 in both directions, more than one of each.
SHAPES = [(256, 384), (3, 256, 384), (1, 128, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", tables.CASES)
def test_must_move_is_the_size_of_the_tensors_involved(case, shape):
    """The bytes counted are those of the tensors that the operation takes and returns, here allocated for real."""
    w = torch.randn(shape).bfloat16()
    result = kernels.ours(case, "reference")(w)()
    tensors = [w, *(result if isinstance(result, tuple) else [result])]
    if case == "cast":
        tensors.append(torch.empty(shape[:-2]))  # the amax that it was given
    if case == "copy_amax":
        tensors.append(torch.empty(shape[:-2]))  # the slot
    if case == "dequantize":
        q, scale = kernels.ours("per_channel", "reference")(w)()
        tensors = [q, scale, result]
    assert tables.must_move(case, shape) == sum(t.numel() * t.element_size() for t in tensors)


def test_a_second_read_costs_the_weight_once_more():
    """A two-pass kernel's bytes: 5 an element instead of 3, and the scale."""
    once, twice = (tables.must_move("per_tensor", (7, 13), reads) for reads in (1, 2))
    assert (once, twice) == (3 * 91 + 4, 5 * 91 + 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", [case for case in tables.CASES if case != "mxfp8"])
def test_the_check_passes_ours_and_the_plain_formula(case, shape):
    """What both return is within e4m3's rounding of the weight, and the two agree."""
    w = torch.randn(shape).bfloat16()
    found, _ = peers.load()
    errors = [
        kernels.relative_error(case, w, bind(w)()) for bind in (kernels.ours(case, "reference"), found[case]["torch"])
    ]
    assert errors[0] == errors[1] if case == "amax" else max(errors) <= tables.MAX_ERROR
    assert (case in ("amax", "copy_amax")) == (errors[0] == 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", tables.CASES)
def test_the_check_sees_a_wrong_result(case, shape):
    """The weight's codes zero, or the last expert's only."""
    w = torch.randn(shape).bfloat16()
    result = kernels.ours(case, "reference")(w)()
    broken = result[0] if isinstance(result, tuple) else result
    last = broken if w.ndim == 2 else broken[-1]
    last[...] = 0
    assert kernels.relative_error(case, w, result) > tables.MAX_ERROR


def test_the_check_takes_one_pair_an_expert():
    """Peers that loop return a list; its last entry is looked at too."""
    w = torch.randn(3, 128, 256).bfloat16()
    pairs = [peers.plain_per_tensor(expert) for expert in w]
    assert kernels.relative_error("per_tensor", w, pairs) <= tables.MAX_ERROR
    assert kernels.relative_error("per_tensor", w, [pairs[0], pairs[1], pairs[0]]) > tables.MAX_ERROR


def test_plain_formula_gives_the_bits_of_the_reference():
    """The yardstick computes the same thing: on a weight without zeros or non-finite values the codes are equal."""
    w = torch.randn(256, 384).bfloat16()
    for case in ("per_channel", "per_block", "per_group"):
        for mine, plain in zip(kernels.ours(case, "reference")(w)(), peers.load()[0][case]["torch"](w)(), strict=True):
            assert_same_bits(plain, mine)


def results(*rows):
    about = {"gpu": "GPU", "driver": "1", "torch": "2", "triton": "3", "fp8_kernels": "4", "date": "2000-01-01"}
    return {"machine": about, "repeats": 5, "copy_tb_per_s": 2.0, "absent": {"Lib": "not there"}, "rows": list(rows)}


def row(name, us, case="per_channel", error=0.026):
    times = {part: {"median": us, "low": us, "high": us} for part in ("graph_us", "call_us", "host_us")}
    shape = [1000, 1000]
    return {"shape": shape, "case": case, "name": name, "ours": name == "cuda", "relative_error": error, **times}


def cells(text, line):
    return [cell.strip() for cell in text.splitlines()[line].strip("|").split("|")]


def test_table_puts_the_fastest_right_rival_beside_ours():
    """3 MB at 2 TB/s take 1.5 us and the scales 0.002; a rival with a wrong or unknown time is not one."""
    failed = {"shape": [1000, 1000], "case": "per_channel", "name": "broken", "ours": False, "error": "boom"}
    text = tables.table(
        results(row("cuda", 3.0), row("slow", 9.0), row("rival", 6.0), row("wrong", 1.0, error=0.5), failed)
    )
    named = dict(zip(cells(text, 0), cells(text, 2), strict=True))
    assert named["weight"] == "1000x1000" and named["what"] == "per_channel"
    assert (named["floor"], named["cuda"], named["of floor"], named["TB/s"]) == ("1.5", "3.0", "0.50", "1.00")
    assert (named["fastest other"], named["its time"], named["times"]) == ("rival", "6.0", "2.00")


def test_table_gives_per_tensor_the_floor_of_two_reads_too():
    """5 MB at 2 TB/s: 2.5 us."""
    text = tables.table(results(row("cuda", 5.0, "per_tensor")))
    assert dict(zip(cells(text, 0), cells(text, 2), strict=True))["of floor"] == "0.30 (0.50)"


def test_every_line_of_a_table_has_as_many_cells():
    """With something missing on either side, in both tables."""
    incomplete = results(row("rival", 6.0), row("cuda", 5.0, "per_tensor"), row("cuda", 3.0, "amax") | {"graph_us": {}})
    incomplete["rows"][-1].pop("graph_us")
    for text in (tables.table(incomplete), tables.peer_table(incomplete, (1000, 1000))):
        assert len({line.count("|") for line in text.splitlines()}) == 1


def test_report_names_what_is_missing():
    """A peer that failed and a library that is not here are said, each with its reason."""
    failed = {"shape": [1, 2], "case": "amax", "name": "broken", "ours": False, "error": "boom"}
    text = tables.report(results(row("cuda", 3.0), failed))
    assert "- 1x2 amax broken: boom" in text and "- Lib: not there" in text


def test_summary_is_the_median_and_the_middle_eight_tenths():
    """Of 1 to 20 in any order."""
    assert measure.summary([float(i * 7 % 20 + 1) for i in range(20)]) == {"median": 10.5, "low": 3.0, "high": 18.0}


def test_results_file_is_named_for_the_gpu():
    """A name that every file system takes."""
    assert kernels.results_file("NVIDIA H100 80GB HBM3").name == "kernels_nvidia-h100-80gb-hbm3.json"


def test_peers_that_are_not_here_say_why(tmp_path):
    """An empty folder adds nothing, and the reason names it."""
    _, absent = peers.load(tmp_path)
    if "vLLM" not in absent:
        pytest.skip("vLLM is installed")
    assert str(tmp_path) in absent["vLLM"]


def bench(*args, **env):
    command = [sys.executable, "-m", "bench.kernels", *args]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def test_without_a_gpu_it_says_so():
    """Exit code 2 and one line; `--help` works there as well."""
    hidden = bench(CUDA_VISIBLE_DEVICES="")
    assert hidden.returncode == 2 and hidden.stderr.count("\n") == 1 and "GPU" in hidden.stderr
    assert bench("--help", CUDA_VISIBLE_DEVICES="").returncode == 0


def test_readme_shows_the_saved_results():
    """The tables in bench/README.md are what the results files render to."""
    assert list(kernels.RESULTS.glob("kernels_*.json"))
    assert readme.shown() == readme.block()


def measured(name, shape, case, us, launches=1):
    return {**row(name, us, case), "shape": list(shape), "launches": launches}


def test_bars_take_the_worst_case():
    """Copy bandwidth 2 TB/s: 3 x 134 MB in 201 us are at the floor, in 402 at half of it; the peer is ahead there."""
    n, k = 16384, 8192
    floor = 3 * n * k / 2e6
    rows = [measured("cuda", (n, k), "per_channel", floor), measured("cuda", (n, k), "per_group", 2 * floor)]
    rows += [measured("rival", (n, k), "per_group", floor), measured("rival", (n, k), "per_channel", 3 * floor)]
    figures = [figure for _, figure, *_ in bars.bars(results(*rows))[:2]]
    assert figures == [pytest.approx(0.5, rel=0.02), pytest.approx(0.5)]
    assert bars.bars_table(results(*rows)).count("missed") == 2


def test_bars_count_launches_and_compare_with_vllms_loop():
    """A second launch is a missed bar; the loop is vLLM's own, though another peer is faster."""
    shape = (128, 1536, 2048)
    rows = [measured("cuda", shape, "per_tensor", 500, launches=2), measured("vLLM online", shape, "per_tensor", 5000)]
    rows += [measured("TransformerEngine", shape, "per_tensor", 1000)]
    found = {what: figure for what, figure, *_ in bars.bars(results(*rows))}
    assert found["launches an op"] == 2 and found["per_tensor 128x1536x2048: times vLLM's loop"] == 10


def test_bars_and_tables_show_calls_between_events_beside_graphs():
    """Both measures of one scale: here a peer leads by graph and ours by a plain call; wrong peers count in neither."""
    shape = (4096, 4096)
    rows = [measured("cuda", shape, "per_tensor", 20) | {"event_us": {"median": 25}}]
    rows += [measured("rival", shape, "per_tensor", 10) | {"event_us": {"median": 50}}]
    rows += [measured("wrong", shape, "per_tensor", 1) | {"event_us": {"median": 1}, "relative_error": 0.5}]
    found = {what: figure for what, figure, *_ in bars.bars(results(*rows))}
    assert found["per_tensor 4096x4096: of the best peer's speed"] == 0.5
    assert found["per_tensor 4096x4096: the same by calls between events"] == 2
    assert tables.event_table(results(*rows)).splitlines()[-1] == "| 4096x4096 | 25.0 | - | rival | 50.0 | 2.00 |"
    assert tables.event_table(results(*rows[2:], row("cuda", 3.0))).count("rival") == 0
    assert tables.event_table(results(row("cuda", 3.0, "per_tensor"))) == ""


def test_bars_find_a_cliff_above_16_mb_only():
    """Steps of time per element between neighbours, up and down."""
    times = {1 << 20: 100.0, 2 << 20: 100.0, 16 << 20: 10.0, 32 << 20: 20.0, 64 << 20: 60.0, 128 << 20: 120.0}
    saved = results() | {
        "sweep": [
            {"bytes": b, "case": "per_tensor", "name": "cuda", "ours": True, "graph_us": {"median": us}}
            for b, us in times.items()
        ]
    }
    ((_, step, limit, more),) = bars.bars(saved)
    assert (step, limit, more) == (1.5, 1.15, False)
    assert tables.sweep_table(saved).count("\n") == 7


def test_plots_are_drawn_from_saved_results(tmp_path):
    """A roofline always, the sizes where they were swept; every implementation is named."""
    pytest.importorskip("matplotlib")
    from bench import plot

    saved = results(row("cuda", 3.0), row("rival", 6.0))
    (only,) = plot.draw(saved, tmp_path / "a")
    assert "rival" in only.read_text()
    saved["sweep"] = [
        {"bytes": 1 << i, "case": "per_tensor", "name": "cuda", "ours": True, "graph_us": {"median": i}}
        for i in (20, 21)
    ]
    assert [path.name for path in plot.draw(saved, tmp_path / "a")] == ["a_roofline.svg", "a_sizes.svg"]


def test_resources_are_read_from_the_compilers_report():
    """A row a family, ranges over its instances, the largest spill; names of other functions are none."""
    function = (
        "ptxas info    : Function properties for _ZN11fp8_kernels23_GLOBAL__N__1_4_amax_cu{}I13__nv_bfloat16EEvT_\n"
    )
    report = (
        function.format("11amax_kernel")
        + "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        + "ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem\n"
        + function.format("11amax_kernel")
        + "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        + "ptxas info    : Used 40 registers, used 0 barriers\n"
        + function.format("9something")
        + "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        + "ptxas info    : Used 255 registers, used 0 barriers\n"
    )
    assert resources.table(report).splitlines()[2:] == ["| `amax` | 2 | 32 to 40 | 0 to 64 | 16 |"]


def test_a_spent_budget_says_what_it_left_out():
    """Nothing starts after it; without one everything does."""
    spent = measure.Budget(0)
    assert not spent.allows("4096x4096") and not spent.allows("4096x4096") and spent.left_out == ["4096x4096"]
    lost = measure.Budget(None)
    lost.spend("the rest")
    assert not lost.allows("4096x4096") and lost.left_out == ["the rest", "4096x4096"]
    assert measure.Budget(None).allows("anything") and measure.Budget(1000).allows("anything")


@pytest.mark.gpu
def test_quick_run_measures_every_case(tmp_path):
    """Small experts, no compiling: all our rows have times and right results, and the saved file prints again."""
    file = tmp_path / "out.json"
    done = bench("--quick", "--shapes", "2x256x384", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["case"] for row in rows if row["ours"]} == set(tables.DEFAULT_CASES)
    assert all(row["graph_us"]["median"] > 0 for row in rows if row["ours"])
    assert tables.report(json.loads(file.read_text())) in done.stdout


def test_conformance_counts_rows_and_not_cases():
    """A row fails with any of its cases, and is left out of the count where none is offered."""
    found = [("a", "A", "pass"), ("a", "A", "fail"), ("b", "A", "pass"), ("c", "A", "not offered"), ("d", "B", "pass")]
    outcomes = [{"section": section, "row": row, "status": status} for row, section, status in found]
    lines = conformance.summary({"results": {"ours": outcomes}}).splitlines()
    assert lines[2].endswith("| 1 of 2 (1 not offered) |") and lines[3].endswith("| 1 of 1 |")
    assert lines[-1] == "| all | 2 of 3 (1 not offered) |"


def test_conformance_finds_ours_and_names_who_is_absent():
    """Our adapter comes first; a peer that cannot be imported is listed with the reason."""
    loaders, absent = conformance.adapters()
    assert loaders[0].name == "fp8_kernels" and len(loaders) + len(absent) == 2
    assert all(absent.values())


def test_the_readme_shows_the_saved_conformance_table():
    """And in it nothing of ours failed, and the kit has no other cases by now."""
    saved = json.loads((ROOT / "bench/results/conformance_cpu.json").read_text())
    assert conformance.summary(saved) in (ROOT / "README.md").read_text()
    ours = saved["results"]["fp8_kernels"]
    assert {o["status"] for o in ours} == {"pass", "not offered"}
    assert {o["case"] for o in ours} == {case.name for case in loader_cases(saved["scheme"])}
