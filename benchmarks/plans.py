"""Searches launch plans on a GPU by hill climbing from those of the table: python -m benchmarks.plans --help."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from image_local_attention.bench.cases import GROUPS, Case
from image_local_attention.bench.rows import environment
from image_local_attention.kernels.possible import CHOICES, TASKS
from image_local_attention.tune.compiling import Workers, compile_all
from image_local_attention.tune.find import FIRST, LATER
from image_local_attention.tune.problem import Subject
from image_local_attention.tune.search import Search, explore

from .options import BY_NAME, PLAIN, PROBLEMS, bias_by_displacement, bias_by_slot, key_mask

# Options that neither join two grids or numbers of heads, nor change what the three tasks do.
SEARCHED = [each.name for each in BY_NAME.values() if not (each.instead or each.grouped or each.trained)]
TENSORS = {
    bias_by_slot: {"bias": "slot"},
    bias_by_displacement: {"bias": "displacement", "border": "shift"},
    key_mask: {"key_mask": True},
}


def subject_of(case: Case, option: str) -> Subject:
    """A case with one of the options of windows."""
    arguments = BY_NAME[option].arguments
    asked = TENSORS[arguments] if callable(arguments) else arguments
    return Subject(case, **{name: value for name, value in asked.items() if name != "return_lse"})


def rows_of(search: Search, option: str) -> Iterator[dict]:
    """The plans that were tried, the best first."""
    l2 = "hot" if search.hot else "cold"
    head = {"case": search.subject.case.name, "option": option, "task": search.task, "l2": l2}
    for each in search.ranked:
        yield head | asdict(each) | {"current": each == search.table} | asdict(search.results[each])


def table_of(search: Search, option: str, most: int = 8) -> Table:
    title = f"{search.subject.case.name}, {option}: {search.task}"
    table = Table("plan", "ms", "spills", "registers", "", title=title)
    shown = search.ranked[:most]
    spilling = [each for each in search.ranked[most:] if search.results[each].ms and search.results[each].spills][:2]
    for each in dict.fromkeys((*shown, *spilling, search.table)):
        got = search.results[each]
        ms = got.error or f"{got.ms:.4g}"
        table.add_row(str(each), ms, f"{got.spills}", f"{got.registers}", "current" if each == search.table else "")
    return table


def main(
    only: Annotated[list[str] | None, typer.Option(help="Only cases with one of these in the name.")] = None,
    option: Annotated[str, typer.Option(help="Of windows, as benchmarks.options calls it.")] = PLAIN.name,
    task: Annotated[list[str] | None, typer.Option(help=f"Only these of {', '.join(TASKS)}.")] = None,
    respect: Annotated[
        list[str] | None, typer.Option(help=f"Only plans that differ in these of {', '.join(CHOICES)}.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Of neighbours of the best plan so far.")] = 2,
    processes: Annotated[int, typer.Option(help="That compile.")] = 14,
    hot: Annotated[bool, typer.Option("--hot/--cold", help="State of the L2 cache.")] = False,
    budget: Annotated[float, typer.Option(help="Seconds of repetition for each candidate.")] = 0.03,
    out: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
) -> None:
    """Search launch plans for cases of the group "design", or for the problems of an option."""
    tasks = [each for each in TASKS if not task or each in task]
    if unknown := set(task or ()) - set(TASKS):
        raise typer.BadParameter(f"task must be one of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    if unknown := set(respect or ()) - set(CHOICES):
        raise typer.BadParameter(f"respect must be one of {', '.join(CHOICES)}, got {', '.join(sorted(unknown))}")
    if option not in SEARCHED:
        raise typer.BadParameter(f"option must be one of {', '.join(SEARCHED)}, got {option}")
    every = GROUPS["design"] if option == PLAIN.name else PROBLEMS
    cases = [case for case in every if not only or any(text in case.name for text in only)]
    console, began, rows = Console(width=None if Console().is_terminal else 170), time.perf_counter(), {}
    device = torch.device("cuda", torch.cuda.current_device())
    where, limits = environment(device), [FIRST, *[LATER] * (rounds - 1)][:rounds]
    console.print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")

    with closing(Workers(processes)) as workers:
        subjects = {case: subject_of(case, option) for case in cases}
        jobs = [
            (each, name, None) for each in subjects.values() for name in dict.fromkeys((*tasks, "forward", "delta"))
        ]
        started = dict(zip(jobs, compile_all(workers, jobs), strict=True))
        console.print(f"compiled the table's plans: {time.perf_counter() - began:.0f} s", style="dim")
        for case, subject in subjects.items():
            starts = {name: started[subject, name, None][1] for name in tasks}
            if errors := [made.error for made in starts.values() if made.error]:
                console.print(f"{case.name}: the table's plan failed: {errors[0]}", style="bold red")
                continue
            times = {"hot": hot, "budget_s": budget, "respects": respect or tuple(CHOICES)}
            for searches in explore(subject, device, starts, workers, limits, **times):
                rows[case] = [row | where for search in searches for row in rows_of(search, option)]
                if out:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    lines = ",\n".join(json.dumps(row) for some in rows.values() for row in some)
                    out.write_text(f"[\n{lines}\n]\n")
            for search in searches:
                console.print(table_of(search, option))
            del search, searches  # and the maps
            console.print(f"{case.name}: {time.perf_counter() - began:.0f} s since the start", style="dim")


if __name__ == "__main__":
    typer.run(main)
