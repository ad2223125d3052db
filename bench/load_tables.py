"""Results of `bench.load` as tables, and what they are held to: pure functions."""

from __future__ import annotations

from bench.checkpoints import GIB

MIB = 1 << 20
# (model begins with, scheme) -> GB/s of a warm load, at least.
WARM = {("qwen", "per_channel"): 42.0, ("qwen", "per_block"): 42.0, ("qwen", "per_tensor"): 40.0}
WARM |= {("llama", scheme): 42.0 for scheme in ("per_channel", "per_block", "per_tensor")}
AGAINST_FINEGRAINED, COLD, ENGINE, SMALL = 6.0, 0.95, 30.0, 0.40
VLLM_CALL = 119.0  # us that its loader's wrapper takes, as published (pull request 48382)
ALLOCATED, RESERVED, HOST = 64, 256, 1024  # MiB


def bars(result: dict) -> list[str]:
    """One line for each bar that was measured; the bars are for an H100 with 16 cores and whole models."""
    lines = []

    def bar(what, figure, limit, unit="", more=True):
        met = figure >= limit if more else figure <= limit
        text = f"{what}: {figure:.2f}{unit}, bar {'at least' if more else 'at most'} {limit:g}{unit}"
        lines.append(f"{text}: {'met' if met else 'MISSED'}")

    ours = [row for row in result["loads"] if row["system"] == "fp8_kernels"]
    for row in ours:
        limit = next((WARM[key] for key in WARM if _is(row, *key)), None)
        what = f"{row['model']}, {row['scheme']}, {row['cache']}"
        if row["cache"] == "warm" and limit:
            bar(what, row["gb_per_s"], limit, " GB/s")
            rival = _of(result, row["model"], "transformers FineGrainedFP8")
            if rival and row["scheme"] != "per_tensor" and row["model"].startswith("qwen"):
                both = row["seconds"] + row["build_seconds"]
                figure = rival["seconds"] / both
                bar(f"{what}, building included: times FineGrainedFP8's speed", figure, AGAINST_FINEGRAINED)
        plain = [each["gb_per_s"] for each in result["reads"] if each["cache"] == row["cache"] == "cold"]
        if plain:
            bar(f"{what}: of a plain parallel read", row["gb_per_s"] / (sum(plain) / len(plain)), COLD)
        if "resident" in row and row["model"].startswith("qwen"):  # a weight of the other is 117 MB
            for kind, limit in (("allocated", ALLOCATED), ("reserved", RESERVED)):
                above = (row[f"peak_{kind}"] - row["resident"]) / MIB
                bar(f"{what}: {kind} above the model", above, limit, " MiB", False)
        host = max(row["host_process"], row["host_machine"]) / MIB
        bar(f"{what}: host memory beside the page cache", host, HOST, " MiB", False)
    for row in result["loops"]:
        if row["scheme"] == "bf16":
            continue
        what = f"engine's loop, {row['model']}, {row['scheme']}"
        if row["model"].startswith("qwen"):
            bar(what, row["gb_per_s"], ENGINE, " GB/s")
        else:
            plain = _of(result, row["model"], "engine's loop", "loops")
            bar(f"{what}: of the same loop into bf16", plain["seconds"] / row["seconds"], SMALL)
            above = (row["seconds"] - plain["seconds"]) / row["tensors"] * 1e6
            bar(f"{what}: above that loop, a call", above, VLLM_CALL, " us", False)
    return lines


def _is(row, model, scheme):
    return row["model"].startswith(model) and row["scheme"] == scheme


def _of(result, model, system, part="loads"):
    """The row of another system (or of the plain loop) for the same model."""
    return next(
        (
            row
            for row in result[part]
            if row["model"] == model
            and row["system"] == system
            and "absent" not in row
            and row.get("scheme") in (None, "bf16")
        ),
        None,
    )


def table(result: dict) -> str:
    """Markdown: every load, the loops, the plain reads."""
    wire = result.get("wire_gb_per_s")
    head = ["model", "loader", "scheme", "files", "seconds", "GB/s", "of the wire", "resident", "above: allocated"]
    head += ["reserved", "host"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * 4 + ['---:'] * 7)} |"]
    for row in (*result["loads"], *result["loops"], *result["quantize"]):
        if "absent" not in row:
            lines.append(f"| {' | '.join(_cells(row, wire))} |")
    if wire:
        lines += ["", f"Pinned memory to the device, the wire: {wire:.1f} GB/s."]
    for row in result["reads"]:
        lines.append(f"Plain parallel read of {row['model']}, {row['cache']}: {row['gb_per_s']:.2f} GB/s.")
    for row in result["quantize"]:
        lines.append(
            f"A plain write of the {row['bytes_out'] / GIB:.2f} GiB that {row['system']} wrote: "
            f"{row['plain_write_seconds']:.2f} s."
        )
    absent = [f"{row['system']} ({row['model']}): {row['absent']}." for row in result["loads"] if "absent" in row]
    return "\n".join(lines + ["Not run: " + each for each in absent])


def _cells(row, wire):
    cells = [row["model"], row["system"], row.get("scheme", ""), row["cache"], f"{row['seconds']:.3f}"]
    cells += [f"{row['gb_per_s']:.2f}", f"{row['gb_per_s'] / wire:.2f}" if wire else "-"]
    if "resident" in row:
        above = [f"{(row[key] - row['resident']) / MIB:.0f} MiB" for key in ("peak_allocated", "peak_reserved")]
        cells += [f"{row['resident'] / GIB:.2f} GiB", *above]
    else:
        cells += ["-"] * 3
    return [*cells, f"{max(row['host_process'], row['host_machine']) / MIB:.0f} MiB"]
