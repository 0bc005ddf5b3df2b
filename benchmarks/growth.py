"""Whether large maps cost more a pixel than small ones: python -m benchmarks.growth --help"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import typer

from benchmarks import limits
from benchmarks.limits import GROWTH, Value
from image_local_attention.bench.cases import LAYOUTS, Case
from image_local_attention.bench.measure import measure
from image_local_attention.bench.peers import PEERS
from image_local_attention.bench.timing import compile_kernels, matmul_precision, passes

LARGE, SMALL = 8192, 1024  # pixels square
MODES = ("forward", "backward")
CASES = tuple(
    Case(1, LARGE, LARGE, 1, depth, kernel, dtype, layout=layout)
    for depth, kernel, dtype in ((32, 7, "bf16"), (64, 13, "bf16"), (16, 11, "fp32"))
    for layout in LAYOUTS
)


def small(case: Case) -> Case:
    return replace(case, height=SMALL, width=SMALL)


def compile_small(case: Case) -> None:
    """Large maps of several processes do not fit; the kernels are the same unless offsets take 64 bits."""
    compile_kernels(small(case))


def ps_a_pixel(case: Case, budget_s: float) -> dict[str, float]:
    """Picoseconds of the device for each pixel, by mode. Nothing of it stays in the device's memory."""
    maps = case.maps(limits.DEVICE)
    with matmul_precision(case.precision):
        times = {
            mode: measure(run, limits.DEVICE, budget_s=budget_s).ms_p50
            for mode, run in passes(PEERS["ours"].make(case), maps, MODES)
        }
    return {mode: ms * 1e9 / (case.batch * case.height * case.width) for mode, ms in times.items()}


def values(case: Case, budget_s: float) -> Iterator[Value]:
    against = ps_a_pixel(small(case), budget_s)
    if limits.DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    for mode, value in ps_a_pixel(case, budget_s).items():
        yield GROWTH, mode, value, against[mode]


def main(
    out: limits.Out = None, only: limits.Only = "", warm_up_with: limits.WarmUp = 0, budget: limits.Budget = 0.1
) -> None:
    """Time a pixel of 8192x8192 maps against one of 1024x1024 maps on the GPU. Takes 70 GiB of its memory."""
    limits.run(CASES, lambda case: values(case, budget), out, only, warm_up_with, compile_small)


if __name__ == "__main__":
    typer.run(main)
