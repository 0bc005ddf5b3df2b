"""Rows as figures, in SVG."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .cases import GROUPS, Case
from .rows import Row

CASES = {case.name: case for cases in GROUPS.values() for case in cases}
PASSES = ("forward", "backward")
COLOURS = {"forward": "#2166ac", "backward": "#b2182b"}
LINES = {"ours": "#b2182b", "unfold": "#2166ac", "natten": "#1b7837", "flex": "#762a83"}


def share_of_the_floor(rows: Iterable[Row]) -> Figure | None:
    """A bar for each case and pass of ours: the hardware's least time over the time taken. None: no row has it."""
    shares = {(row.case, row.mode): row.floor_share for row in rows if row.impl == "ours" and row.floor_share}
    names = sorted({case for case, mode in shares if mode in PASSES}, reverse=True)
    if not names:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, mode in enumerate(PASSES):
        places = [at + 0.2 - 0.4 * i for at in range(len(names))]
        widths = [100 * shares.get((name, mode), 0.0) for name in names]
        axes.barh(places, widths, 0.38, color=COLOURS[mode], label=mode)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the floor, %")
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    return figure


def against_the_window(rows: Iterable[Row], mode: str = "forward+backward") -> Figure | None:
    """Time and peak memory against the window's width, a line for each way to compute; None: no two widths of a case.

    A row of axes for each problem that has rows of several widths.
    """
    lines: dict[Case, dict[str, list[Row]]] = {}
    for row in rows:
        case = CASES.get(row.case)
        if case and row.mode == mode:
            lines.setdefault(replace(case, kernel=1), {}).setdefault(row.impl, []).append(row)
    lines = {case: found for case, found in lines.items() if any(len(some) > 1 for some in found.values())}
    if not lines:
        return None
    figure = Figure(figsize=(9, 3.2 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), 2, squeeze=False)
    for (time, memory), (case, found) in zip(grid, lines.items(), strict=True):
        for impl, some in found.items():
            some.sort(key=lambda row: CASES[row.case].kernel)
            widths = [CASES[row.case].kernel for row in some]
            look = {"color": LINES[impl], "marker": "o", "label": impl}
            time.plot(widths, [row.ms_p50 for row in some], **look)
            memory.plot(widths, [row.peak_mib for row in some], **look)
        title = case.name.replace(" k1", "")
        for axes, what in ((time, "ms"), (memory, "MiB")):
            axes.set(yscale="log", xlabel="width of the window", ylabel=what, title=f"{title}, {mode}")
            axes.title.set_fontsize("small")
            axes.grid(alpha=0.3)
        time.legend()
    return figure


FIGURES = {"floor": share_of_the_floor, "window": against_the_window}


def save_figures(rows: Sequence[Row], folder: Path, names: Iterable[str] = FIGURES) -> list[Path]:
    """Writes the figures of these names that the rows make; the same rows make the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "image-local-attention", "svg.fonttype": "none"}):
        for name in names:
            if figure := FIGURES[name](rows):
                written.append(folder / f"{name}.svg")
                figure.savefig(written[-1], metadata={"Date": None})
    return written
