"""Figures that have a limit: a quantity beside another, and a goal for the ratio of the two.

`benchmarks.host`, `first_call`, `growth` and `unfused` take a figure each with the `run` of this module.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from image_local_attention.bench.cases import Case
from image_local_attention.bench.rows import environment, rounded, save_rows
from image_local_attention.bench.timing import compile_kernels, warm_up

DEVICE, BACKEND = torch.device("cuda"), "triton"

Out = Annotated[Path | None, typer.Option(help="JSON file to merge the rows into.")]
Only = Annotated[str, typer.Option(help="Only cases whose name has this in it.")]
WarmUp = Annotated[int, typer.Option("--warm-up", help="First compile, in this many processes.")]
Budget = Annotated[float, typer.Option(help="Seconds of repetition for each timing.")]


@dataclass(frozen=True)
class Figure:
    """What the rows of a name show: a `quantity` in a unit, and what it stands `against`, in the same.

    most, least: the goal of the ratio of the two; a figure with neither has no goal.
    """

    name: str
    quantity: str
    against: str
    most: float | None = None
    least: float | None = None

    @property
    def goal(self) -> str:
        if self.most is not None:
            return f"at most {self.most}"
        return "" if self.least is None else f"at least {self.least}"

    def met(self, ratio: float) -> bool:
        return (self.most is None or ratio <= self.most) and (self.least is None or ratio >= self.least)


HOST = Figure("host", "host, us", "empty kernels, us", most=1.5)
HOST_STAGES = Figure("host, stage by stage", "host, us", "empty kernels, us")
FIRST_CALL = Figure("first call", "first call, s", "goal, s", most=1.0)
FIRST_CALL_PARTS = Figure("first call, part by part", "part, s", "the call, s")
GROWTH = Figure("growth", "ps a pixel", "ps a pixel at 1024x1024", most=1.1)
UNFUSED = Figure("unfused", "GB/s", "copy, GB/s", least=0.6)


@dataclass(frozen=True)
class Row:
    """One value of a figure beside what it is held against, both in the figure's unit."""

    figure: str
    case: str
    mode: str
    value: float
    against: float
    gpu: str
    torch: str
    triton: str | None
    commit: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.gpu, self.figure, self.case, self.mode

    @property
    def ratio(self) -> float:
        return self.value / self.against


Value = tuple[Figure, str, float, float]  # a figure, a mode, its value and what that stands against


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def run(
    cases: Sequence[Case],
    values_of: Callable[[Case], Iterable[Value]],
    out: Path | None,
    only: str,
    warm_up_with: int = 0,
    compile_one: Callable[[Case], None] = compile_kernels,
) -> None:
    """The values of every case as rows, saved case by case, and as a table; a case that fails is told."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here")
    cases = [case for case in cases if only in case.name]
    if not cases:
        raise typer.BadParameter(f"only must be in the name of a case, got {only!r}")
    console = Console(width=None if Console().is_terminal else 170)
    where, rows, failures = environment(DEVICE), [], {}

    if warm_up_with:
        failed = warm_up(cases, warm_up_with, compile_one)
        failures |= {case.name: "failed in the warm-up, not timed" for case in failed}
    for case in cases:
        if case.name in failures:
            continue
        try:
            found = [
                Row(figure.name, case.name, mode, rounded(float(value)), rounded(float(against)), **where)
                for figure, mode, value, against in values_of(case)
            ]
        except RuntimeError as caught:  # out of memory, or of a process that was started
            failures[case.name] = f"{type(caught).__name__}: {caught}"[:300]
            continue
        rows += found
        if out:
            save_rows(out, rows, Row)
        console.print(case.name, style="dim")

    console.print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")
    console.print(rows_table(rows))
    for name, failure in failures.items():
        console.print(f"{name}: {failure}", style="bold red", markup=False)
    if failures:
        raise typer.Exit(1)


def rows_table(rows: Sequence[Row]) -> Table:
    table = Table("figure", "case", "mode", "value", "against", "ratio")
    for row in rows:
        table.add_row(row.figure, row.case, row.mode, f"{row.value:.4g}", f"{row.against:.4g}", f"{row.ratio:.2f}")
    return table
