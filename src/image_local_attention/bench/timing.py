"""Times passes of a case, and compiles what they need beforehand."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from .cases import Case
from .exact import error, exact_results, regions
from .measure import Measurement, measure
from .peers import PEERS


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """fp32 products in "ieee" or "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision({"ieee": "highest", "tf32": "high"}[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def passes(attend: Callable, maps: Sequence[Tensor], modes: Sequence[str]) -> Iterator[tuple[str, Callable]]:
    """Every mode with a function that runs it and gives its results: the output, and the gradients."""
    *inputs, grad_out = maps
    for mode in modes:
        leaves = [x.detach().requires_grad_(mode != "forward") for x in inputs]
        if mode == "backward":
            out = attend(*leaves)
            yield mode, lambda out=out, leaves=leaves: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
            del out  # and its graph
        elif mode == "forward":
            yield mode, lambda leaves=leaves: (attend(*leaves),)
        else:
            yield mode, lambda leaves=leaves: _both(attend(*leaves), leaves, grad_out)


def _both(out: Tensor, leaves: Sequence[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def time_case(
    case: Case, impl: str, device: torch.device, modes: Sequence[str], hot: bool, budget_s: float
) -> Iterator[tuple[str, Measurement, float]]:
    """Mode, measurement and error against fp64 of every mode; the errors are those of the runs that were timed."""
    peer, maps = PEERS[impl], case.maps(device)
    problem = peer.problem(case)
    exact = [(region, exact_results(problem, maps, region)) for region in regions(problem)]
    results: list[tuple[Tensor, ...]] = []
    if peer.compiles:
        torch.compiler.reset()  # torch compiles a function for so many shapes, and refuses those after them
    with matmul_precision(case.precision):
        for mode, run in passes(peer.make(case), maps, modes):
            if peer.compiles:
                run()
            taken = measure(
                lambda _, run=run: results.append(run()),
                device,
                setup=results.clear,
                budget_s=budget_s,
                flush_l2=not hot,
            )
            yield mode, taken, error(problem, exact, mode, results[-1])
            results.clear()


def compile_kernels(case: Case) -> None:
    """One forward and backward, so that Triton's cache on disk has the kernels."""
    *inputs, grad_out = case.maps(torch.device("cuda"))
    leaves = [x.requires_grad_() for x in inputs]
    with matmul_precision(case.precision):
        PEERS["ours"].make(case)(*leaves).backward(grad_out)
    torch.cuda.synchronize()


def warm_up(cases: Sequence, processes: int, compile_one: Callable = compile_kernels) -> list:
    """Compiles the kernels of every case, `processes` at a time; the cases whose process failed.

    Each has a process of its own, which runs `compile_one`: a failure prints its traceback and breaks no other case.
    """
    spawn = multiprocessing.get_context("spawn")

    def exit_code(case: object) -> int:
        process = spawn.Process(target=_do_and_leave, args=(compile_one, case))
        process.start()
        process.join()
        return process.exitcode

    with ThreadPoolExecutor(processes) as pool:
        return [case for case, code in zip(cases, pool.map(exit_code, cases), strict=True) if code != 0]


def _do_and_leave(fn: Callable, argument: object) -> None:
    """Ends the process where the work is done: threads of torch may abort one that takes its leave."""
    fn(argument)
    sys.stdout.flush()
    os._exit(0)
