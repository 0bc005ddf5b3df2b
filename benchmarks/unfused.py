"""Bytes a second of the unfused operators, against a copy that moves as many: python -m benchmarks.unfused --help

Similarity, aggregation and its transpose each read or write two maps and the weights, once each at least. A forward
pass is one of these operators, a backward pass two: the gradients of query and key, or of weights and value.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import typer
from torch import Tensor

from benchmarks import limits
from benchmarks.limits import UNFUSED, Value
from image_local_attention import local_aggregate, local_similarity
from image_local_attention.bench.cases import DTYPES, LAYOUTS, Case
from image_local_attention.bench.measure import measure
from image_local_attention.bench.timing import matmul_precision, passes

OPERATORS = {"forward": 1, "backward": 2}
CASES = tuple(
    Case(1, 256, 256, 1, 64, kernel, dtype, layout=layout)
    for kernel in (5, 9, 21)
    for dtype in ("bf16", "fp32")
    for layout in LAYOUTS
)


def least_bytes(case: Case, mode: str) -> int:
    """Memory traffic of a pass: of each operator, two maps and the weights."""
    numbers = case.queries * (2 * case.depth + case.kernel**2)
    return OPERATORS[mode] * numbers * DTYPES[case.dtype].itemsize


def calls(case: Case) -> Iterator[tuple[str, Callable, tuple[Tensor, ...]]]:
    """Names, functions, and their inputs with the gradient of what they give."""
    query, key, value, grad_out = case.maps(limits.DEVICE)
    size = case.batch, case.heads, case.height, case.width, case.kernel**2
    weight, grad_weight = torch.randn(2, *size, device=limits.DEVICE, dtype=query.dtype).unbind()
    options = {"kernel_size": case.kernel, "heads": case.heads, "backend": limits.BACKEND}
    yield "similarity", partial(local_similarity, **options), (query, key, grad_weight)
    yield "aggregate", partial(local_aggregate, **options), (weight, value, grad_out)


def compile_kernels(case: Case) -> None:
    """One forward and backward of each operator, so that Triton's cache on disk has the kernels."""
    with matmul_precision(case.precision):
        for _, operator, maps in calls(case):
            for _, run in passes(operator, maps, tuple(OPERATORS)):
                run()
    limits.synchronize()


@cache
def copy_gb_s(moved: int, budget_s: float) -> float:
    """GB/s of a copy within the device's memory that moves so many bytes: it reads half of them and writes half."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=limits.DEVICE)
    target = torch.empty_like(source)
    taken = measure(lambda: target.copy_(source), limits.DEVICE, budget_s=budget_s)
    return moved / taken.ms_p50 / 1e6


def values(case: Case, budget_s: float) -> Iterator[Value]:
    with matmul_precision(case.precision):
        for name, operator, maps in calls(case):
            for mode, run in passes(operator, maps, tuple(OPERATORS)):
                taken = measure(run, limits.DEVICE, budget_s=budget_s)
                moved = least_bytes(case, mode)
                yield UNFUSED, f"{name}, {mode}", moved / taken.ms_p50 / 1e6, copy_gb_s(moved, budget_s)


def main(
    out: limits.Out = None, only: limits.Only = "", warm_up_with: limits.WarmUp = 0, budget: limits.Budget = 0.1
) -> None:
    """Time the unfused operators on the GPU, as bytes a second against those of a copy that moves as many."""
    limits.run(CASES, lambda case: values(case, budget), out, only, warm_up_with, compile_kernels)


if __name__ == "__main__":
    typer.run(main)
