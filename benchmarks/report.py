"""Writes the tables and figures of docs/performance.md from the committed rows: python -m benchmarks.report"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from benchmarks import limits, options
from image_local_attention.bench.cases import GROUPS, LAYOUTS, Case
from image_local_attention.bench.plot import save_figures
from image_local_attention.bench.rows import Row, load_rows

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/performance.md")
FIGURES = Path("docs/figures")
PASSES = "forward", "backward"
LARGE = 512 * 512  # pixels of all images
BOTH_LAYOUTS = "design", "models"  # the groups whose cases come in each
# Figures of the page, by the file of their rows, and the groups of cases that they show.
DRAWN = {"h200": (["floor"], BOTH_LAYOUTS), "cpu": (["window"], ("cpu",))}
# The files of results/ by what they begin with: GPUs' rows, CPUs' rows, rows of benchmarks.options and limits.
GPU, CPU, OPTIONS, LIMITS = "h", "cpu", "options-", "limits-"
# Figures with a limit, by where they stand in the page.
LIMITED = {
    "host": (limits.HOST, limits.HOST_STAGES),
    "first call": (limits.FIRST_CALL, limits.FIRST_CALL_PARTS),
    "growth": (limits.GROWTH,),
    "unfused": (limits.UNFUSED,),
}


def tables(rows: Sequence[Row]) -> str:
    """Both layouts beside each other, a line for each case, group by group; the rows are all of one GPU."""
    ours = [row for row in rows if row.impl == "ours" and row.l2 == "cold"]
    parts = [layouts_table(_of_cases(ours, GROUPS[group]), group) for group in BOTH_LAYOUTS]
    return "\n".join(filter(None, (*parts, floors(ours))))


def _compared_exactly(row: Row) -> bool:
    return row.sketch_ms is not None and "fp32-ieee" in row.case


def layouts_table(rows: Sequence[Row], group: str) -> str:
    ours = {(row.case, row.mode): row for row in rows}
    cases = sorted({case.rsplit(" ", 1)[0] for case, _ in ours})
    if not cases:
        return ""
    lines = [
        "| case | pass | channels_last, ms | share of floor | sketch, ms | NCHW, ms | NCHW / channels_last | error |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case in cases:
        for mode in PASSES:
            last, planes = (ours[f"{case} {layout}", mode] for layout in LAYOUTS)
            share = "" if last.floor_share is None else f"{last.floor_share:.0%}"
            sketch = "" if last.sketch_ms is None else f"{last.sketch_ms:.4g}"
            lines.append(
                f"| {case} | {mode} | {last.ms_p50:.4g} | {share} | {sketch} | {planes.ms_p50:.4g} "
                f"| {planes.ms_p50 / last.ms_p50:.2f} | {last.error:.1e} |"
            )
    for mode in PASSES:
        speed = [row.sketch_ms / row.ms_p50 for row in ours.values() if row.mode == mode and row.sketch_ms]
        ratio = [ours[f"{case} nchw", mode].ms_p50 / ours[f"{case} channels_last", mode].ms_p50 for case in cases]
        against = f"{_mean(speed):.2f} times the sketch's speed (slowest case {min(speed):.2f}); " if speed else ""
        exact = [row.sketch_ms / row.ms_p50 for row in ours.values() if row.mode == mode and _compared_exactly(row)]
        against += f"{_mean(exact):.2f} times in exact fp32; " if exact else ""
        lines.append(
            f"\nGeometric means, {group}, {mode}: {against}"
            f"NCHW takes {_mean(ratio):.2f} times as long as channels_last (at most {max(ratio):.2f})."
        )
    return "\n".join(lines) + _measured_on(rows)


def floors(rows: Sequence[Row]) -> str:
    """Shares of the floor, by geometric mean of large cases in half precision and TF32, channels_last."""
    large = [case for group in BOTH_LAYOUTS for case in GROUPS[group] if case.batch * case.height * case.width >= LARGE]
    judged = [
        case for case in large if case.layout == "channels_last" and (case.dtype, case.precision) != ("fp32", "ieee")
    ]
    lines = []
    for mode in (*PASSES, "forward+backward"):
        shares = {row.case: row.floor_share for row in _of_cases(rows, judged) if row.mode == mode and row.floor_share}
        if shares:
            least = min(shares, key=shares.get)
            lines.append(f"| {mode} | {_mean(shares.values()):.0%} | {shares[least]:.0%} | {least} |")
    head = "| 512x512 pixels and more, half precision and TF32 | share of floor | least | of |\n|---|--:|--:|---|"
    return "\n".join((head, *lines)) + "\n" if lines else ""


def _of_cases(rows: Sequence[Row], cases: Sequence[Case]) -> list[Row]:
    names = {case.name for case in cases}
    return [row for row in rows if row.case in names]


def _mean(factors: Collection[float]) -> float:
    return math.exp(sum(map(math.log, factors)) / len(factors))


def _measured_on(rows: Sequence[Row | options.Row | limits.Row]) -> str:
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


def limits_tables(figures: Sequence[limits.Figure], rows: Sequence[limits.Row]) -> str:
    """A table for each figure that has rows, one row a line."""
    tables = []
    for figure in figures:
        found = [row for row in rows if row.figure == figure.name]
        if not found:
            continue
        lines = [f"| case | mode | {figure.quantity} | {figure.against} | ratio |", "|---|---|--:|--:|--:|"]
        for row in found:
            lines.append(f"| {row.case} | {row.mode} | {row.value:.4g} | {row.against:.4g} | {row.ratio:.2f} |")
        if figure.goal:
            met = sum(figure.met(row.ratio) for row in found)
            lines.append(f"\nGoal of the ratio: {figure.goal}, met by {met} of {len(found)}.")
        tables.append("\n".join(lines) + _measured_on(found))
    return "\n".join(tables)


def original_table(rows: Sequence[Row]) -> str:
    """The original's grid on a GPU; nothing where there are no rows of it beside the unfold code's."""
    return _beside(rows, "original", "unfold")


def models_table(rows: Sequence[Row]) -> str:
    """Image models on a GPU; nothing where there are no rows of them beside FlexAttention's."""
    return _beside(rows, "models", "flex")


def _beside(rows: Sequence[Row], group: str, impl: str) -> str:
    there = any(row.impl == impl for row in _of_cases(rows, GROUPS[group]))
    return peers_table(rows, GROUPS[group]) if there else ""


def cpu_table(rows: Sequence[Row]) -> str:
    """The CPU's goals."""
    return peers_table(rows, GROUPS["cpu"])


def peers_table(rows: Sequence[Row], cases: Sequence[Case]) -> str:
    """Ours beside the other ways to compute the same, a line for each case and pass; a dash: no row."""
    rows = [row for row in _of_cases(rows, cases) if row.l2 != "hot"]
    found = {(row.case, row.mode, row.impl): row for row in rows}
    lines = [
        "| case | pass | ours, ms | `unfold`, ms | times ours | FlexAttention, ms | times ours "
        "| ours, MiB | `unfold`, MiB | times ours |",
        "|---|---|" + "--:|" * 8,
    ]
    for case in cases:
        for mode in ("forward", "forward+backward"):
            ours, *others = (found.get((case.name, mode, impl)) for impl in ("ours", "unfold", "flex"))
            if ours is None:
                continue
            times = [f"{x.ms_p50:.4g} | {x.ms_p50 / ours.ms_p50:.1f}" if x else "- | -" for x in others]
            memory = f"{others[0].peak_mib:.4g} | {others[0].peak_mib / ours.peak_mib:.0f}" if others[0] else "- | -"
            cells = case.name, mode, f"{ours.ms_p50:.4g}", *times, f"{ours.peak_mib:.3g}", memory
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + _measured_on(rows)


def between(page: str, name: str, text: str) -> str:
    """The page with `text` between the two markers of a name."""
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"
    head, rest = page.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    def tables_of(begin: str, table: Callable, kind: type = Row) -> str:
        paths = sorted(RESULTS.glob(f"{begin}*.json"), reverse=True)
        return "\n".join(filter(None, (table(load_rows(path, kind)) for path in paths))) or "No rows yet.\n"

    page = PAGE.read_text()
    page = between(page, "GPU", tables_of(GPU, tables))
    page = between(page, "original", tables_of(GPU, original_table))
    page = between(page, "models", tables_of(GPU, models_table))
    page = between(page, "options", tables_of(OPTIONS, options_table, options.Row))
    page = between(page, "CPU", tables_of(CPU, cpu_table))
    for name, figures in LIMITED.items():
        page = between(page, name, tables_of(LIMITS, partial(limits_tables, figures), limits.Row))
    PAGE.write_text(page)
    for stem, (names, groups) in DRAWN.items():
        if (path := RESULTS / f"{stem}.json").exists():
            cases = [case for group in groups for case in GROUPS[group]]
            save_figures(_of_cases(load_rows(path), cases), FIGURES / stem, names)


if __name__ == "__main__":
    main()
