"""Rows as tables on a terminal."""

import math
from collections.abc import Sequence

from rich.table import Table

from .cases import CPU_GOALS, GROUPS
from .rows import Row


def rows_table(rows: Sequence[Row]) -> Table:
    names = "case", "impl", "mode", "ms", "p20..p80", "host ms", "peak MiB", "error", "floor", "sketch x", "extension x"
    table = Table(*names)
    for row in rows:
        table.add_row(
            row.case,
            row.impl,
            row.mode,
            f"{row.ms_p50:.4g}",
            f"{row.ms_p20:.4g}..{row.ms_p80:.4g}",
            "" if row.host_ms is None else f"{row.host_ms:.3g}",
            f"{row.peak_mib:.4g}",
            f"{row.error:.1e}",
            "" if row.floor_share is None else f"{row.floor_share:.0%}",
            *("" if ms is None else f"{ms / row.ms_p50:.2f}" for ms in (row.sketch_ms, row.extension_ms)),
        )
    return table


def goals_table(rows: Sequence[Row]) -> Table:
    """Unfold against ours, and the goals, for the cases of the group "cpu"."""
    table = Table("kernel", "mode", "unfold ms", "ours ms", "ratio", "goal", "unfold MiB", "ours MiB", "ratio", "goal")
    found = {(row.case, row.impl, row.mode): row for row in rows if row.l2 is None}  # of a CPU
    for case in GROUPS["cpu"]:
        for mode in ("forward", "forward+backward"):
            pair = [found.get((case.name, impl, mode)) for impl in ("unfold", "ours")]
            if None in pair:
                continue
            speed, memory = CPU_GOALS.get((case.kernel, mode), (None, None))
            table.add_row(
                f"{case.kernel}x{case.kernel}",
                mode,
                *_against(*(row.ms_p50 for row in pair), speed),
                *_against(*(row.peak_mib for row in pair), memory),
            )
    return table


def _against(unfold: float, ours: float, goal: float | None) -> tuple[str, ...]:
    ratio = unfold / ours if ours else math.inf
    verdict = "" if goal is None else f"{goal} {'met' if ratio >= goal else 'MISSED'}"
    return f"{unfold:.4g}", f"{ours:.4g}", f"{ratio:.1f}", verdict
