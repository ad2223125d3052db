"""What a set of decisions adds up to: bytes, units and peak memory, as a table or a dict.

Shared by the plan of a model (`plan`) and that of a checkpoint (`checkpoint.plan`).
"""

from __future__ import annotations

import math
import re

from ..schemes import dtype_name, scheme_name
from .report import size_text


class Decision:
    """One tensor's fate. A subclass has `name`, `shape`, `dtype`, `scheme` (None: it stays as it is) and `why`."""

    @property
    def num_units(self) -> int:
        """Units to quantize: one an expert, one for a weight of two dimensions, 0 for pass-through."""
        return math.prod(self.shape[:-2]) if self.scheme else 0

    @property
    def unit_bytes(self) -> int:
        """High-precision bytes of one unit."""
        return math.prod(self.shape[-2:]) * self.dtype.itemsize if self.scheme else 0

    @property
    def bytes_in(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_out(self) -> int:
        """Resident bytes: FP8 codes and scales, or the tensor itself."""
        if self.scheme is None:
            return self.bytes_in
        return math.prod(self.shape) + math.prod(self.scheme.scale_shape(self.shape)) * self.scheme.scale_dtype.itemsize

    def as_dict(self) -> dict:
        """For `--json`."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "scheme": self.scheme and scheme_name(self.scheme),
            "why": self.why,
            "units": self.num_units,
        }


class Forecast:
    """Totals over decisions. A subclass has `decisions`. Prints as a table, layers of the same kind in one row."""

    @property
    def quantized(self) -> tuple:
        return tuple(d for d in self.decisions if d.scheme)

    @property
    def passed_through(self) -> tuple:
        return tuple(d for d in self.decisions if not d.scheme)

    @property
    def bytes_in(self) -> int:
        return sum(d.bytes_in for d in self.decisions)

    @property
    def resident(self) -> int:
        """Bytes of the FP8 model."""
        return sum(d.bytes_out for d in self.decisions)

    @property
    def largest_unit(self) -> int:
        """High-precision bytes of the largest unit."""
        return max((d.unit_bytes for d in self.decisions), default=0)

    @property
    def peak(self) -> int:
        """Forecast for shards that arrive unit by unit: the FP8 model, a unit being filled and a finished one."""
        return self.resident + 2 * self.largest_unit

    def as_dict(self) -> dict:
        """For `--json`."""
        totals = {name: getattr(self, name) for name in ("bytes_in", "resident", "largest_unit", "peak")}
        return {**totals, "tensors": [d.as_dict() for d in self.decisions]}

    def __str__(self):
        rows = [("tensor", "count", "shape", "becomes", "size")]
        kinds: dict[tuple, list] = {}
        for d in self.decisions:
            kind = re.sub(r"(?<![^.])\d+(?=\.)", "*", d.name)  # numbers between dots: layers, experts
            kinds.setdefault((kind, d.shape, d.dtype, d.scheme, d.why), []).append(d)
        for (name, shape, dtype, scheme, why), members in kinds.items():
            becomes = f"FP8 {scheme_name(scheme)}" if scheme else f"{dtype_name(dtype)} ({why})"
            size = size_text(sum(d.bytes_out for d in members))
            name = name if len(members) > 1 else members[0].name
            rows.append((name, str(len(members)), "x".join(map(str, shape)) or "scalar", becomes, size))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [
                *lines,
                "",
                f"{len(self.quantized)} of {len(self.decisions)} tensors become FP8, "
                f"in {sum(d.num_units for d in self.decisions)} units, the largest {size_text(self.largest_unit)}",
                f"{size_text(self.bytes_in)} in, {size_text(self.resident)} resident, "
                f"peak {size_text(self.peak)} (resident and two of the largest units)",
            ]
        )
