"""`image-local-attention bench`"""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .errors import UserError, say, user_errors

if TYPE_CHECKING:
    from ..bench.cases import Case
    from ..bench.rows import Row


class Group(str, Enum):
    design = "design"
    original = "original"
    models = "models"
    cpu = "cpu"


class Impl(str, Enum):
    ours = "ours"
    unfold = "unfold"
    natten = "natten"
    flex = "flex"


def bench(
    group: Annotated[
        Group,
        typer.Option(
            help="Which cases: of the design, of the original extension, of image models, or the CPU's goals."
        ),
    ] = Group.design,
    only: Annotated[str, typer.Option(help="Only cases whose name has this in it.")] = "",
    impl: Annotated[
        list[Impl] | None, typer.Option(help="Who is timed.", show_default="all that can be imported and suit a case")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to merge the rows into.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Draw the rows as SVG there.")] = None,
    warm_up_with: Annotated[int, typer.Option("--warm-up", help="First compile, in this many processes.")] = 0,
    hot: Annotated[bool, typer.Option(help="Leave the L2 cache as an equal call just before left it.")] = False,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; torch's choice by default.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds of repetition.", show_default="0.3 on a GPU, 5 on a CPU")
    ] = None,
) -> None:
    """Time forward and backward here, beside other ways to compute the same.

    On the GPU, or on the CPU where there is none or the group is "cpu". GPU times are the device's, with a cold L2
    cache; the host's to queue a call stands apart. Errors are relative Frobenius norms against fp64. The floor is the
    least time that one H200 could take.
    """
    with user_errors():
        draw = _drawing() if plot else None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures memory, is to be silent
        import torch

        from ..bench.cases import GROUPS
        from ..bench.tables import goals_table, rows_table
        from ..bench.timing import warm_up

        device = torch.device("cuda" if torch.cuda.is_available() and group != Group.cpu else "cpu")
        cases = [case for case in GROUPS[group.value] if only in case.name]
        if not cases:
            raise UserError(f"--only must be in the name of a case of {group.value}, got {only!r}")
        if threads is not None:
            torch.set_num_threads(threads)
        failed = warm_up(cases, warm_up_with) if warm_up_with and device.type == "cuda" else []
        wanted = [each.value for each in impl or Impl]
        rows = _timed([case for case in cases if case not in failed], wanted, device, hot, budget, out)

        console = Console(width=None if Console().is_terminal else 180)
        if rows:
            console.print(f"{rows[0].gpu}, torch {rows[0].torch}, triton {rows[0].triton}, {rows[0].commit}")
        console.print(rows_table(rows))
        if (goals := goals_table(rows)).row_count:
            console.print(goals)
        for path in draw(rows, plot) if draw else ():
            console.print(f"drawn: {path}", highlight=False)
        if failed:
            raise UserError("failed in the warm-up, not timed: " + "; ".join(case.name for case in failed))


def _drawing():
    try:
        from ..bench.plot import save_figures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("--plot needs matplotlib: pip install 'image-local-attention[bench]'") from None
    return save_figures


def _timed(
    cases: "list[Case]", impls: list[str], device, hot: bool, budget: float | None, out: Path | None
) -> "list[Row]":
    """The rows of all cases; they are saved case by case. A peer that fails is told, and is no reason to stop."""
    from ..bench.cases import MODES
    from ..bench.peers import PEERS, free_memory
    from ..bench.rows import environment, row_of, save_rows
    from ..bench.timing import time_case

    on_cpu = device.type == "cpu"
    l2 = None if on_cpu else "hot" if hot else "cold"
    modes = ("forward", "forward+backward") if on_cpu else MODES
    budget = budget or (5.0 if on_cpu else 0.3)
    where, rows = environment(device), []
    for case in cases:
        for name in impls:
            peer = PEERS[name]
            if not peer.suits(case, device, free_memory(device)):
                continue
            chosen = modes if peer.trains(device) else ("forward",)
            try:
                for mode, taken, error in time_case(case, name, device, chosen, hot, budget):
                    rows.append(row_of(case, name, mode, l2, taken, error, where))
            except (RuntimeError, NotImplementedError, ValueError) as error:
                if name == "ours":
                    raise
                say(f"{case.name}: {name}: {type(error).__name__}: {str(error)[:300]}")
            else:
                say(f"{case.name}: {name}", style="dim")
        if out:
            save_rows(out, rows)
    return rows
