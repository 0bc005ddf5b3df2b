"""Writes the tables of docs/performance.md from the committed rows: python -m benchmarks.report"""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run import Row, load_rows

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/performance.md")
BEGIN, END = "<!-- begin: python -m benchmarks.report -->\n", "<!-- end -->\n"


def tables(rows: Sequence[Row]) -> str:
    """Both layouts beside each other, a line for each case, and where the rows, all of one GPU, come from."""
    ours = {(row.case, row.mode): row for row in rows if row.impl == "ours" and row.l2 == "cold"}
    cases = sorted({case.rsplit(" ", 1)[0] for case, _ in ours})
    lines = [
        "| case | pass | channels_last, ms | share of floor | sketch, ms | NCHW, ms | NCHW / channels_last | error |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case in cases:
        for mode in ("forward", "backward"):
            last, planes = (ours[f"{case} {layout}", mode] for layout in ("channels_last", "nchw"))
            share = "" if last.floor_share is None else f"{last.floor_share:.0%}"
            sketch = "" if last.sketch_ms is None else f"{last.sketch_ms:.4g}"
            lines.append(
                f"| {case} | {mode} | {last.ms_p50:.4g} | {share} | {sketch} | {planes.ms_p50:.4g} "
                f"| {planes.ms_p50 / last.ms_p50:.2f} | {last.error:.1e} |"
            )
    for mode in ("forward", "backward"):
        speed = [row.sketch_ms / row.ms_p50 for row in ours.values() if row.mode == mode and row.sketch_ms]
        ratio = [ours[f"{case} nchw", mode].ms_p50 / ours[f"{case} channels_last", mode].ms_p50 for case in cases]
        against = f"{_mean(speed):.2f} times the sketch's speed (slowest case {min(speed):.2f}); " if speed else ""
        lines.append(
            f"\nGeometric means, {mode}: {against}"
            f"NCHW takes {_mean(ratio):.2f} times as long as channels_last (at most {max(ratio):.2f})."
        )
    where = {f"{row.gpu}, torch {row.torch}, triton {row.triton}, commit {row.commit}" for row in rows}
    return "\n".join(lines) + f"\n\nMeasured on: {'; '.join(sorted(where))}.\n"


def _mean(factors: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, factors)) / len(factors))


def main() -> None:
    head, rest = PAGE.read_text().split(BEGIN)
    every = "\n".join(tables(load_rows(path)) for path in sorted(RESULTS.glob("*.json"), reverse=True))
    PAGE.write_text(head + BEGIN + "\n" + every + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
