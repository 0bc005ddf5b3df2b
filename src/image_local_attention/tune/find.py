"""From a subject to the plans that are worth remembering."""

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, repeat

import torch

from ..backends import triton_obstacle
from ..bench.cases import DTYPES, Case
from ..kernels import gpu as gpus
from ..kernels import remembered
from ..kernels.plan import Plan
from ..kernels.possible import Asked
from ..kernels.remembered import Entry
from .compiling import Workers, compile_all
from .problem import Problem, Subject
from .search import Search, explore

LEAST_GAIN = 0.03  # of the table's time: less may be noise
CONFIRMED = 3  # of the fastest plans that are timed anew, until one is worth it
FIRST, LATER = 64, 32  # candidates of a task in the first and in a later round
BUDGET_S = 0.1  # of each time taken anew
MOST_PROCESSES, PROCESS_BYTES = 16, 2**30  # memory of a GPU that a process takes beside its maps


@dataclass(frozen=True)
class Found:
    """What a search came to: the plan to take for what launches ask, milliseconds, and how many plans were tried."""

    asked: Asked
    table: Plan
    best: Plan
    table_ms: float
    ms: float
    tried: int

    @property
    def gain(self) -> float:
        return 1 - self.ms / self.table_ms


def gpu_obstacle(case: Case) -> str | None:
    """Why there is no GPU to search plans of a case on, None where there is one."""
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if gpus.of(torch.device("cuda")).interpreted:
        return "TRITON_INTERPRET=1 is in the environment"
    return triton_obstacle(torch.device("cuda"), DTYPES[case.dtype], max(case.depths))


def processes_for(case: Case, device: torch.device) -> int:
    """That compile, each with maps of its own: as many as there are cores and memory of the GPU for."""
    need = PROCESS_BYTES + 2 * case.bytes("forward")
    return max(1, min(os.cpu_count() or 1, MOST_PROCESSES, torch.cuda.mem_get_info(device)[0] // need - 1))


def find(
    subject: Subject, tasks: Iterable[str], processes: int, seconds: float, told: Callable[[int], object]
) -> list[Found]:
    """Searches the tasks on the current GPU; `told` is called with the number of plans tried so far.

    Tasks that a native kernel serves are left out. RuntimeError where the table's own plan cannot run.
    """
    tasks = list(tasks)
    with closing(Workers(processes)) as workers:
        # The forward and delta are what the other tasks begin with.
        jobs = [(subject, task, None) for task in dict.fromkeys((*tasks, "forward", "delta"))]
        made = dict(zip((task for _, task, _ in jobs), compile_all(workers, jobs), strict=True))
        if errors := [result.error for _, result in made.values() if result.error]:
            raise RuntimeError(f"the table's plan cannot run: {errors[0]}")
        device = torch.device("cuda", torch.cuda.current_device())
        asking = Problem(subject, device, exact=False).asks()
        starts = {task: made[task][1] for task in tasks if task in asking}
        for searches in explore(subject, device, starts, workers, chain([FIRST], repeat(LATER)), seconds=seconds):
            told(sum(len(search.results) for search in searches))
        return [settle(search, workers) for search in searches]


def settle(search: Search, workers: Workers) -> Found:
    """The fastest plan that gains enough when it is timed anew and that all launches can take, else the table's."""
    tried, own = len(search.results), search.results[search.table].ms
    for candidate in search.ranked[:CONFIRMED]:
        if candidate == search.table:
            break
        if search.results[candidate].ms is None or not serves(search, candidate, workers):
            continue
        table_ms, ms = search.again(candidate, BUDGET_S)
        if ms <= (1 - LEAST_GAIN) * table_ms:
            return Found(search.asked, search.table, candidate, table_ms, ms, tried)
    return Found(search.asked, search.table, search.table, own, own, tried)


def serves(search: Search, candidate: Plan, workers: Workers) -> bool:
    """Whether launches that ask the same, but have more to hold, can take the candidate too."""
    results = compile_all(workers, [(subject, task, candidate) for subject, task in kin(search)])
    return not any(result.error for _, result in results)


def kin(search: Search) -> list[tuple[Subject, str]]:
    """Subjects and tasks that ask what a search asked, with as many channels everywhere and more terms of logits."""
    subject, asked = search.subject, search.asked
    case = replace(subject.case, batch=1, heads=1, depth=asked.depth, depth_value=None)
    fullest = replace(subject, case=case, key_mask=subject.key_mask or "plain" not in asked.facts)
    found = [(fullest, search.task)]
    if subject.bias and search.task == "grad_query":
        found.append((fullest, "grad_bias"))
    return found


def entries(found: Iterable[Found], subject: Subject) -> list[Entry]:
    """What is to be remembered: the plans that are not the table's."""
    where = remembered.here(torch.device("cuda", torch.cuda.current_device()))
    return [
        Entry(where, each.asked, each.best, *(float(f"{ms:.4g}") for ms in (each.table_ms, each.ms)), subject.name)
        for each in found
        if each.best != each.table
    ]
