"""What happened during a load or a conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Report:
    """Counts are of units (a weight, or one expert of one) unless the name says otherwise; sizes are bytes."""

    scheme: str = ""
    device: str = "cpu"
    quantized_units: int = 0
    quantized_tensors: int = 0
    passed_through: dict[str, str] = field(default_factory=dict)  # name -> why
    fp8_tensors: int = 0  # of what passed through, weights that were FP8 already
    duplicates: list[str] = field(default_factory=list)  # shards that arrived again with the same value
    rewrites: list[str] = field(default_factory=list)  # shards that arrived again, changed, before completion
    defaulted: list[str] = field(default_factory=list)  # optional tensors that never arrived
    rebuild: list[str] = field(default_factory=list)  # buffers on meta that no checkpoint holds
    shards: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    transfer: str | None = None  # how bytes came to the device, where files were read for it
    transfer_bytes: int = 0
    transfer_seconds: float = 0.0  # from the first read on
    peak_staging_bytes: int = 0
    spills: int = 0  # units that waited on the host, since shards of too many came between each other
    spilled_bytes: int = 0
    peak_allocated: int | None = None  # device memory; None on CPU
    peak_reserved: int | None = None
    resident: int | None = None

    def as_dict(self) -> dict:
        """For `--json`."""
        return asdict(self)

    def __str__(self):
        gigabytes = self.bytes_in / 1e9
        done = [f"{self.fp8_tensors} FP8 weights taken as they are"] if self.fp8_tensors else []
        if self.quantized_tensors or not done:
            done.insert(0, f"{self.quantized_tensors} weights ({self.quantized_units} units) to FP8 {self.scheme}")
        lines = [
            f"{', '.join(done)} on {self.device}, {len(self.passed_through) - self.fp8_tensors} passed through",
            f"{size_text(self.bytes_in)} in, {size_text(self.bytes_out)} out, {self.seconds:.2f} s"
            + (f" ({gigabytes / self.seconds:.2f} GB/s)" if self.seconds else ""),
        ]
        if self.seconds_by_phase:
            lines.append(", ".join(f"{phase} {s:.2f} s" for phase, s in self.seconds_by_phase.items()))
        if self.transfer is not None:
            rate = self.transfer_bytes / 1e9 / self.transfer_seconds if self.transfer_seconds else 0.0
            lines.append(f"{size_text(self.transfer_bytes)} at {rate:.2f} GB/s: {self.transfer}")
        spilled = f", {self.spills} spills to the host ({size_text(self.spilled_bytes)})" if self.spills else ""
        lines.append(f"staging peak {size_text(self.peak_staging_bytes)}{spilled}")
        if self.peak_allocated is not None:
            lines.append(
                f"resident {size_text(self.resident)}, peak allocated {size_text(self.peak_allocated)}, "
                f"peak reserved {size_text(self.peak_reserved)}"
            )
        for label, names in (
            ("arrived twice", self.duplicates),
            ("rewritten while open", self.rewrites),
            ("never arrived, as allowed", self.defaulted),
            ("to be rebuilt by the model's owner", self.rebuild),
        ):
            if names:
                lines.append(f"{label}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
        return "\n".join(lines)


def size_text(num_bytes: int) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
