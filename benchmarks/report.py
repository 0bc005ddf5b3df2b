"""Writes the tables of docs/performance.md from the committed rows: python -m benchmarks.report"""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks import options
from image_local_attention.bench.rows import Row, load_rows

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/performance.md")
BEGIN, BEGIN_OPTIONS = "<!-- begin: python -m benchmarks.report -->\n", "<!-- begin: options -->\n"
END, END_OPTIONS = "<!-- end -->\n", "<!-- end: options -->\n"
OPTIONS = "options-"  # files of results/ that begin so have rows of benchmarks.options


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
    return "\n".join(lines) + _measured_on(rows)


def _mean(factors: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, factors)) / len(factors))


def _measured_on(rows: Sequence[Row | options.Row]) -> str:
    where = {f"{row.gpu}, torch {row.torch}, triton {row.triton}, commit {row.commit}" for row in rows}
    return f"\n\nMeasured on: {'; '.join(sorted(where))}.\n"


def options_table(rows: Sequence[options.Row]) -> str:
    """Times of the plain window's, a line for each option and a column for each problem and pass; a dash: no row."""
    ratios = {(row.problem, row.option, row.mode): f"{row.ratio:.2f}" for row in rows}
    problems = sorted({problem.rsplit(" ", 1)[0] for problem, _, _ in ratios})
    columns = [(problem, mode) for problem in problems for mode in options.MODES]
    lines = [
        " | ".join(["| option", *(f"{problem}, {mode}" for problem, mode in columns)]) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for option in options.OPTIONS:
        cells = [
            [ratios.get((f"{problem} {layout}", option.name, mode), "-") for layout in options.LAYOUTS]
            for problem, mode in columns
        ]
        lines.append(" | ".join([f"| {option.name}", *(" / ".join(cell) for cell in cells)]) + " |")
    return "\n".join(lines) + _measured_on(rows)


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two markers."""
    head, rest = page.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    paths = sorted(RESULTS.glob("*.json"), reverse=True)
    plain, with_options = ([p for p in paths if p.name.startswith(OPTIONS) == wanted] for wanted in (False, True))
    page = between(PAGE.read_text(), BEGIN, END, "\n".join(tables(load_rows(path)) for path in plain))
    every = "\n".join(options_table(load_rows(path, options.Row)) for path in with_options)
    PAGE.write_text(between(page, BEGIN_OPTIONS, END_OPTIONS, every or "No rows yet.\n"))


if __name__ == "__main__":
    main()
