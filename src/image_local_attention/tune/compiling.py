"""Compiles candidates in processes of their own: what fails there, or ends one, is a candidate's result."""

import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from queue import SimpleQueue

import torch

from ..kernels.plan import Plan
from .problem import Problem, Subject, launched, planned

COMPILE_S = 120  # after which a process that compiles is killed

Job = tuple[Subject, str, Plan | None]  # a task of a subject, and its plan; None is the table's


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


_HELD: dict[Subject, Problem] = {}  # of a process that compiles: the latest


def compile_candidate(subject: Subject, task: str, candidate: Plan | None) -> tuple[Plan | None, Result]:
    """Runs the kernel once, so that Triton's cache on disk has it; the plan it took, and its registers and spills."""
    signal.alarm(COMPILE_S)
    try:
        if subject not in _HELD:
            _HELD.clear()
            torch.cuda.empty_cache()
            _HELD[subject] = Problem(subject, torch.device("cuda"), exact=False)
            torch.cuda.empty_cache()
        with planned(task, candidate) as taken, launched() as found:
            _HELD[subject].run(task)
        return taken[-1][1] if taken else None, Result(found[-1].n_spills, found[-1].n_regs)
    finally:
        torch.cuda.synchronize()  # an error of the device is raised here
        signal.alarm(0)


class Workers:
    """Processes that work in parallel, each its own pool of one, so that one that dies takes no other with it."""

    def __init__(self, processes: int) -> None:
        self.idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        self.processes, self.threads = processes, ThreadPoolExecutor(processes)
        for _ in range(processes):
            self.idle.put(self._one())

    def map(self, fn: Callable, jobs: Iterable[tuple]) -> list:
        """fn(*job) of every job, or the exception that came of it."""

        def work(job: tuple) -> object:
            worker = self.idle.get()
            try:
                error = (future := worker.submit(fn, *job)).exception()
            except BrokenProcessPool as died:  # while it was idle
                error = died
            # An error of the device stays: no launch of that process can succeed any more.
            if isinstance(error, (BrokenProcessPool, torch.AcceleratorError)):
                worker.shutdown(wait=False)
                worker = self._one()
            self.idle.put(worker)
            return future.result() if error is None else error

        return list(self.threads.map(work, jobs))

    def close(self) -> None:
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().shutdown()

    @staticmethod
    def _one() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def compile_all(workers: Workers, jobs: Sequence[Job]) -> list[tuple[Plan | None, Result]]:
    """The plan that each job took, and what came of it."""

    def told(job: Job, made: object) -> tuple[Plan | None, Result]:
        if isinstance(made, BaseException):
            return job[-1], Result(error=f"{type(made).__name__}: {made}"[:200])
        return made

    return [told(*each) for each in zip(jobs, workers.map(compile_candidate, jobs), strict=True)]
