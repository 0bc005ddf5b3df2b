"""Hill climbing from the table's plan: the neighbours of the best so far, compiled, checked and timed."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

import torch

from ..bench.cases import DTYPES
from ..bench.measure import measure
from ..kernels.plan import Plan
from ..kernels.possible import CHOICES, Asked, obstacle
from ..kernels.remembered import shared_memory
from .compiling import Result, Workers, compile_all
from .problem import Problem, Subject, planned

SHAPE = {"tile", "warps", "block"}  # what a candidate may differ in at once
LEAST = 0.7  # of the registers that the compiler takes by itself: with fewer it spills
# How far a result may be from the table's plan's, in roundings of its greatest element: of the dtype's, of TF32's, and
# for exact products of those that three passes and other orders of the same sums come to.
ROUNDINGS = 3
TF32, EXACT = 2.0**-10, 2.0**-19
TIMES = 3  # that two plans are timed anew, in turn


def neighbours(
    asked: Asked, best: Plan, tried: Iterable[Plan], limit: int, shared: int, respects: Iterable[str] = CHOICES
) -> list[Plan]:
    """Plans that differ from the best in one respect, then in tile, warps and perhaps block, the most alike first.

    shared: bytes of shared memory that there are.
    """
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
    untried = dict.fromkeys(each for each in found if each not in tried and obstacle(asked, each, shared) is None)
    return list(untried)[:limit]


class Search:
    """The plans of one task of a subject, as far as they have been tried; the first is the table's."""

    def __init__(self, subject: Subject, problem: Problem, task: str, device: torch.device, hot: bool) -> None:
        self.subject, self.problem, self.task, self.device, self.hot = subject, problem, task, device, hot
        self.shared = shared_memory(device)
        with planned(task, None) as taken:
            self.exact = [x.clone() for x in problem.run(task)]
        self.asked, self.table = taken[-1]
        self.results: dict[Plan, Result] = {}

    def candidates(self, limit: int, respects: Iterable[str] = CHOICES) -> list[Plan]:
        """Plans to try next: neighbours of the best so far, without limits of registers that change nothing."""
        best = self.ranked[0]
        taken = self.results[best].registers
        found = neighbours(self.asked, best, self.results, limit, self.shared, respects)
        limits = (None, best.max_registers)
        return [each for each in found if each.max_registers in limits or LEAST * taken <= each.max_registers < taken]

    @property
    def ranked(self) -> list[Plan]:
        return sorted(self.results, key=lambda each: self.results[each].rank)

    @property
    def tolerance(self) -> float:
        """Of a result's greatest element."""
        half = torch.finfo(DTYPES[self.subject.case.dtype]).eps
        return ROUNDINGS * {"half": half, "tf32": TF32}.get(self.asked.product, EXACT)

    def add(self, candidate: Plan, made: Result, budget_s: float) -> None:
        """Checks and times a plan that was compiled, for about so many seconds."""
        self.results[candidate] = made
        if made.error:
            return
        with planned(self.task, candidate):
            self.problem.poison()
            pairs = zip(self.problem.run(self.task), self.exact, strict=True)
            if not all((got - want).abs().max() <= self.tolerance * want.abs().max() for got, want in pairs):
                self.results[candidate] = replace(made, error="wrong result")
                return
        self.results[candidate] = replace(made, ms=float(f"{self._ms(candidate, budget_s):.4g}"))

    def again(self, candidate: Plan, budget_s: float) -> tuple[float, float]:
        """Milliseconds of the table's plan and of a candidate, of each the median of TIMES in turn."""
        turns = [[self._ms(each, budget_s) for each in (self.table, candidate)] for _ in range(TIMES)]
        table_ms, ms = map(statistics.median, zip(*turns, strict=True))
        return table_ms, ms

    def _ms(self, candidate: Plan, budget_s: float) -> float:
        with planned(self.task, candidate):
            taken = measure(lambda: self.problem.run(self.task), self.device, budget_s=budget_s, flush_l2=not self.hot)
        return taken.ms_p50


def explore(
    subject: Subject,
    device: torch.device,
    starts: dict[str, Result],
    workers: Workers,
    limits: Iterable[int],
    *,
    hot: bool = False,
    budget_s: float = 0.03,
    respects: Sequence[str] = tuple(CHOICES),
    seconds: float = math.inf,
) -> Iterator[list[Search]]:
    """Searches of the tasks of which `starts` has what compiling the table's plan came to; yields them as they go on.

    limits: the most candidates of a task in each round. A round ends early, and is the last one, after `seconds`.
    """
    deadline = time.perf_counter() + seconds
    problem = Problem(subject, device, exact=True)
    searches = [Search(subject, problem, task, device, hot) for task in starts]
    for search in searches:
        search.add(search.table, starts[search.task], budget_s)
    yield searches
    for limit in limits:
        found = ([(search, each) for each in search.candidates(limit, respects)] for search in searches)
        wave = [pair for pair in chain.from_iterable(zip_longest(*found)) if pair]
        if not wave:
            return
        at_once = 2 * workers.processes
        for i in range(0, len(wave), at_once):
            if time.perf_counter() >= deadline:
                return
            some = wave[i : i + at_once]
            made = compile_all(workers, [(subject, search.task, each) for search, each in some])
            for (search, each), (_, result) in zip(some, made, strict=True):
                search.add(each, result, budget_s)
            yield searches
