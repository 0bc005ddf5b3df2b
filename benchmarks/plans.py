"""Searches launch plans on a GPU by hill climbing from those of the table: python -m benchmarks.plans --help."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.jit import JITFunction

from image_local_attention import check, kernels
from image_local_attention.bench.cases import DTYPES, GROUPS, Case
from image_local_attention.bench.measure import measure
from image_local_attention.bench.rows import environment
from image_local_attention.kernels import plan
from image_local_attention.kernels.gpu import padded
from image_local_attention.kernels.plan import Plan
from image_local_attention.maps import empty_heads, split_heads
from image_local_attention.rules import Rules

from .options import BY_NAME, PLAIN, PROBLEMS

TASKS = ("forward", "grad_query", "grad_key_value")
CHOICES = {
    "tile": ((2, 8), (2, 16), (4, 4), (4, 8), (8, 4), (8, 8), (4, 16), (16, 4), (8, 16), (16, 8)),
    "block": (16, 32, 64, 128),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4),
    "keep_by_pointer": (False, True),
    "stream_by_pointer": (False, True),
    "hoist": (False, True),
    "delta_early": (False, True),
    "max_registers": (None, 64, 72, 80, 96, 112, 128, 144, 168, 200),
}
SHAPE = {"tile", "warps", "block"}  # what a candidate may differ in at once
GEOMETRY = {"border": "zeros", "dilation": 1, "causal": False}  # of a window, what it is unless an option says so
# Options that neither join two grids or numbers of heads, nor change what the three tasks do.
SEARCHED = [each.name for each in BY_NAME.values() if not (each.instead or each.grouped or each.trained)]
FIRST, LATER = 64, 32  # candidates of the first and of a later round
COMPILE_S = 120  # after which a process that compiles is killed
LEAST = 0.7  # of the registers that the compiler takes by itself: with fewer it spills
TOLERANCE = 2e-2  # of the greatest result, against the table's plan
REGISTERS = 255


@dataclass(frozen=True)
class Result:
    """What a plan came to; `ms` is None where it failed, and `error` says how."""

    spills: int = 0
    registers: int = 0
    ms: float | None = None
    error: str | None = None

    @property
    def rank(self) -> tuple[bool, bool, float]:
        return self.ms is None, self.spills > 0, self.ms or 0.0


class Problem:
    """A case's maps as heads, and each task as the one kernel that it times, with one of the options of windows.

    exact: whether log-sum-exp and delta are those of the maps; otherwise only their memory is there.
    """

    def __init__(self, case: Case, option: str, device: torch.device, exact: bool) -> None:
        self.maps = [split_heads(x, case.heads) for x in case.maps(device)]
        self.grads = [empty_heads(x, x.shape[4]) for x in self.maps[:3]]
        asked = {"border": case.border} | BY_NAME[option].arguments_for(case)
        window = check.window(case.kernel, *(asked.get(name, usual) for name, usual in GEOMETRY.items()))
        self.rules = Rules(window, 1.0, asked.get("bias"), asked.get("key_mask"), case.precision)
        self.lse, self.delta = (torch.empty(x.shape[:4], device=device) for x in self.maps[:2])
        if exact:
            out, self.lse = kernels.attention(*self.maps[:3], self.rules)
            kernels._delta(self.maps[3], None, out, self.delta, self.rules)

    def run(self, task: str) -> tuple[Tensor, ...]:
        query, key, value, grad_out = self.maps
        inputs = *self.maps, self.lse, self.delta
        if task == "forward":
            with kernels.native.portable():
                return kernels.attention(query, key, value, self.rules)
        if task == "delta":
            kernels._delta(grad_out, None, grad_out, self.delta, self.rules)
            return (self.delta,)
        grads = self.grads[:1] if task == "grad_query" else self.grads[1:]
        launch = kernels._grad_query if task == "grad_query" else kernels._grad_key_value
        launch(*inputs, *grads, self.rules)
        return tuple(grads)

    def poison(self) -> None:
        """Fills gradients, and the memory that a forward is likely to take, with NaN."""
        query, _, value, _ = self.maps
        for x in (*self.grads, empty_heads(query, value.shape[4]), torch.empty_like(self.lse)):
            x.fill_(math.nan)


@contextmanager
def planned(task: str, candidate: Plan | None) -> Iterator[list[Plan]]:
    """Launches of a task take the candidate, or the table's plan where it is None; yields the plans that they took."""
    choose, taken = plan.choose, []

    def instead(asked: str, *rest: object) -> Plan:
        if asked != task:
            return choose(asked, *rest)
        taken.append(choose(asked, *rest) if candidate is None else candidate)
        return taken[-1]

    plan.choose = instead
    try:
        yield taken
    finally:
        plan.choose = choose


@contextmanager
def launched() -> Iterator[list]:
    """Yields the compiled kernels of the launches inside."""
    found, run = [], JITFunction.run

    def run_and_keep(self, *args, **kwargs):
        found.append(run(self, *args, **kwargs))
        return found[-1]

    JITFunction.run = run_and_keep
    try:
        yield found
    finally:
        JITFunction.run = run


_HELD: dict[tuple[Case, str], Problem] = {}  # of a process that compiles: the latest case and option


def compile_candidate(case: Case, option: str, task: str, candidate: Plan | None) -> tuple[Plan | None, Result]:
    """Runs the kernel once, so that Triton's cache on disk has it; the plan it took, and its registers and spills."""
    signal.alarm(COMPILE_S)
    try:
        if (case, option) not in _HELD:
            _HELD.clear()
            torch.cuda.empty_cache()
            _HELD[case, option] = Problem(case, option, torch.device("cuda"), exact=False)
            torch.cuda.empty_cache()
        with planned(task, candidate) as taken, launched() as found:
            _HELD[case, option].run(task)
        torch.cuda.synchronize()
        return taken[0], Result(found[-1].n_spills, found[-1].n_regs)
    except Exception as caught:  # whatever Triton raises; here it becomes the candidate's result
        try:
            torch.cuda.synchronize()
        except Exception:  # an error of the device stays: no launch of this process can succeed any more
            os._exit(1)
        return candidate, Result(error=f"{type(caught).__name__}: {caught}"[:200])
    finally:
        signal.alarm(0)


class Workers:
    """Processes that work in parallel, each its own pool of one, so that one that dies takes no other with it."""

    def __init__(self, processes: int) -> None:
        self.idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        self.threads = ThreadPoolExecutor(processes)
        for _ in range(processes):
            self.idle.put(self._one())

    def map(self, fn: Callable, jobs: Iterable[tuple], died: Callable[..., object]) -> list:
        """fn(*job) of every job, or died(*job) where that ended its process."""

        def work(job: tuple) -> object:
            worker = self.idle.get()
            try:
                return worker.submit(fn, *job).result()
            except BrokenProcessPool:
                worker = self._one()
                return died(*job)
            finally:
                self.idle.put(worker)

        return list(self.threads.map(work, jobs))

    def close(self) -> None:
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().shutdown()

    @staticmethod
    def _one() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def compile_all(
    workers: Workers, jobs: Sequence[tuple[Case, str, str, Plan | None]]
) -> list[tuple[Plan | None, Result]]:
    return workers.map(compile_candidate, jobs, lambda *job: (job[-1], Result(error="its process died")))


def possible(case: Case, every: int, task: str, candidate: Plan) -> bool:
    """Whether copies can begin on whole vectors, and sums and scores alone leave registers to a thread.

    every: of how many columns a tile has one.
    """
    pixels, (depth, depth_value) = math.prod(candidate.tile), map(padded, case.depths)
    copied = case.layout == "nchw" and every == 1  # other pixels are read one by one
    if copied and candidate.tile[1] % (16 // DTYPES[case.dtype].itemsize):
        return False
    sums = {"forward": depth_value, "grad_query": depth, "grad_key_value": depth + depth_value}[task]
    return pixels * (sums + candidate.block) <= REGISTERS * 32 * candidate.warps


def neighbours(
    case: Case, every: int, task: str, best: Plan, tried: Iterable[Plan], limit: int, respects: Iterable[str] = CHOICES
) -> list[Plan]:
    """Plans that differ from the best in one respect, then in tile, warps and perhaps block, the most alike first."""
    found = [replace(best, **{name: choice}) for name in respects for choice in CHOICES[name]]

    def unlike(each: Plan) -> float:
        loads = (math.prod(x.tile) / x.warps for x in (each, best))
        return abs(math.log2(next(loads) / next(loads))) + abs(math.log2(each.block / best.block))

    if SHAPE.issubset(respects):
        found += sorted(
            (
                replace(best, tile=tile, warps=warps, block=block)
                for tile in CHOICES["tile"]
                for warps in CHOICES["warps"]
                for block in CHOICES["block"]
                if tile != best.tile and warps != best.warps
            ),
            key=unlike,
        )
    untried = dict.fromkeys(each for each in found if each not in tried and possible(case, every, task, each))
    return list(untried)[:limit]


class Search:
    """The plans of one task of a case, as far as they have been tried; the first is the table's."""

    def __init__(self, case: Case, option: str, problem: Problem, task: str, hot: bool, budget_s: float) -> None:
        self.case, self.option, self.problem, self.task = case, option, problem, task
        self.hot, self.budget_s = hot, budget_s
        self.exact = [x.clone() for x in problem.run(task)]
        self.results: dict[Plan, Result] = {}

    def candidates(self, limit: int, respects: Iterable[str]) -> list[Plan]:
        """Plans to try next: neighbours of the best so far, without limits of registers that change nothing."""
        best = self.ranked[0]
        taken, every = self.results[best].registers, self.problem.rules.window.dilation[1]
        found = neighbours(self.case, every, self.task, best, self.results, limit, respects)
        limits = (None, best.max_registers)
        return [each for each in found if each.max_registers in limits or LEAST * taken <= each.max_registers < taken]

    @property
    def ranked(self) -> list[Plan]:
        return sorted(self.results, key=lambda each: self.results[each].rank)

    def add(self, candidate: Plan, made: Result) -> None:
        """Checks and times a plan that was compiled."""
        self.results[candidate] = made
        if made.error:
            return
        with planned(self.task, candidate):
            self.problem.poison()
            pairs = zip(self.problem.run(self.task), self.exact, strict=True)
            if not all((got - want).abs().max() <= TOLERANCE * want.abs().max() for got, want in pairs):
                self.results[candidate] = replace(made, error="wrong result")
                return
            device = self.exact[0].device
            taken = measure(lambda: self.problem.run(self.task), device, budget_s=self.budget_s, flush_l2=not self.hot)
        self.results[candidate] = replace(made, ms=float(f"{taken.ms_p50:.4g}"))

    def rows(self) -> Iterator[dict]:
        head = {"case": self.case.name, "option": self.option, "task": self.task, "l2": "hot" if self.hot else "cold"}
        for each in self.ranked:
            current = each == next(iter(self.results))
            yield head | asdict(each) | {"current": current} | asdict(self.results[each])

    def table(self, most: int = 8) -> Table:
        table = Table("plan", "ms", "spills", "registers", "", title=f"{self.case.name}, {self.option}: {self.task}")
        current = next(iter(self.results))
        shown = self.ranked[:most]
        spilling = [each for each in self.ranked[most:] if self.results[each].ms and self.results[each].spills][:2]
        for each in dict.fromkeys((*shown, *spilling, current)):
            got = self.results[each]
            ms = got.error or f"{got.ms:.4g}"
            table.add_row(str(each), ms, f"{got.spills}", f"{got.registers}", "current" if each == current else "")
        return table


def explore(
    case: Case,
    option: str,
    device: torch.device,
    starts: dict[str, tuple],
    workers: Workers,
    rounds: int,
    hot: bool,
    budget_s: float,
    respects: Iterable[str] = CHOICES,
) -> Iterator[list[Search]]:
    """Searches of the tasks whose first plan and its resources `starts` has; yields them whenever one has news."""
    problem = Problem(case, option, device, exact=True)
    searches = [Search(case, option, problem, task, hot, budget_s) for task in starts]
    for search in searches:
        search.add(*starts[search.task])
    yield searches
    for i in range(rounds):
        limit = LATER if i else FIRST
        wave = [(search, each) for search in searches for each in search.candidates(limit, respects)]
        made = compile_all(workers, [(case, option, search.task, each) for search, each in wave])
        for j, ((search, each), (_, result)) in enumerate(zip(wave, made, strict=True)):
            search.add(each, result)
            if j + 1 == len(wave) or wave[j + 1][0] is not search:
                yield searches


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
    device, workers = torch.device("cuda"), Workers(processes)
    where = environment(device)
    console.print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")

    jobs = [(case, option, each, None) for case in cases for each in dict.fromkeys((*tasks, "forward", "delta"))]
    started = dict(zip(jobs, compile_all(workers, jobs), strict=True))
    console.print(f"compiled the table's plans: {time.perf_counter() - began:.0f} s", style="dim")
    for case in cases:
        starts = {each: started[case, option, each, None] for each in tasks}
        if errors := [made.error for _, made in starts.values() if made.error]:
            console.print(f"{case.name}: the table's plan failed: {errors[0]}", style="bold red")
            continue
        for searches in explore(case, option, device, starts, workers, rounds, hot, budget, respect or CHOICES):
            rows[case] = [row | where for search in searches for row in search.rows()]
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text("[\n" + ",\n".join(json.dumps(row) for some in rows.values() for row in some) + "\n]\n")
        for search in searches:
            console.print(search.table())
        del search, searches  # and the maps
        console.print(f"{case.name}: {time.perf_counter() - began:.0f} s since the start", style="dim")
    workers.close()


if __name__ == "__main__":
    typer.run(main)
