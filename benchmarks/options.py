"""What each window option costs on a GPU, against the plain window: python -m benchmarks.options --help.

The plain window has border "zeros" and nothing else. Most options keep the grids, and stand against the plain window of
the same kernel on maps of the same size. Options that join two grids stand against the plain calls that do the same:

finer queries: the keys' grid is half of the queries' in each direction. Instead, key and value are upsampled to the
    queries' grid (nearest neighbour), and the kernel is twice as wide. Each key then counts four times, which cancels.
    With an odd kernel, queries in odd rows and columns get the very same result. The kernel of twice the width leans
    to the top left, so the others see half a key more there and half a key less at the opposite side.
coarser queries: the queries' grid is half of the keys'. Instead, the query is upsampled to the keys' grid, and of the
    result every second pixel kept: the very same result.

The times of these include the upsampling, and its gradient in the backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from image_local_attention import local_attention
from image_local_attention.bench.cases import LAYOUTS, Case
from image_local_attention.bench.measure import measure
from image_local_attention.bench.rows import environment, rounded, save_rows
from image_local_attention.bench.timing import matmul_precision, passes, warm_up

DEVICE, BACKEND = torch.device("cuda"), "triton"
MODES = ("forward", "backward")

PROBLEMS = tuple(
    replace(case, layout=layout)
    for case in (
        Case(8, 128, 128, 8, 64, 7, "bf16"),
        Case(1, 512, 512, 4, 16, 7, "bf16"),
        Case(1, 512, 512, 1, 64, 13, "bf16"),
        Case(1, 256, 256, 1, 64, 7, "fp32"),
    )
    for layout in LAYOUTS
)


def bias_by_slot(case: Case) -> dict:
    return {"bias": case.bias(DEVICE)}


def bias_by_displacement(case: Case) -> dict:
    return {"bias": case.bias(DEVICE, by_displacement=True), "border": "shift"}


def key_mask(case: Case) -> dict:
    return {"key_mask": case.key_mask(DEVICE)}


def plain(case: Case, query: Tensor, key: Tensor, value: Tensor, widen: int = 1) -> Tensor:
    return local_attention(query, key, value, widen * case.kernel, heads=case.heads, backend=BACKEND)


def upsample_keys(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (F.interpolate(x, size=query.shape[2:], mode="nearest") for x in (key, value))
    return plain(case, query, key, value, widen=2)


def upsample_queries(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query = F.interpolate(query, size=key.shape[2:], mode="nearest")
    return plain(case, query, key, value)[:, :, 1::2, 1::2]  # a coarse query is at the last of its fine pixels


@dataclass(frozen=True)
class Option:
    """Arguments of `local_attention`, or a function that makes them from the problem.

    trained: the bias wants a gradient. grouped: only for problems of several heads.
    queries, keys: what the sides of the problem's grid are divided by for the grid of either.
    instead: what it is compared with, a function of the problem and query, key and value.
    """

    name: str
    arguments: Mapping | Callable[[Case], Mapping] = field(default_factory=dict)
    trained: bool = False
    grouped: bool = False
    queries: int = 1
    keys: int = 1
    instead: Callable[[Case, Tensor, Tensor, Tensor], Tensor] | None = None

    def arguments_for(self, case: Case) -> dict:
        return dict(self.arguments(case) if callable(self.arguments) else self.arguments)

    def suits(self, case: Case) -> bool:
        return case.heads > 1 or not self.grouped


PLAIN = Option("plain")
OPTIONS = (
    *(Option(f"border {name}", {"border": name}) for name in ("mask", "shift", "reflect", "replicate", "circular")),
    Option("border (shift, mask)", {"border": ("shift", "mask")}),
    Option("dilation 2", {"dilation": 2}),
    Option("dilation (1, 3)", {"dilation": (1, 3)}),
    Option("causal", {"causal": True}),
    Option("causal raster", {"causal": "raster"}),
    Option("bias by slot", bias_by_slot),
    Option("bias by slot, trained", bias_by_slot, trained=True),
    Option("bias by displacement, border shift", bias_by_displacement),
    Option("bias by displacement, border shift, trained", bias_by_displacement, trained=True),
    Option("key_mask", key_mask),
    Option("kv_heads heads/2", lambda case: {"kv_heads": case.heads // 2}, grouped=True),
    Option("kv_heads 1", {"kv_heads": 1}, grouped=True),
    Option("finer queries", keys=2, instead=upsample_keys),
    Option("coarser queries", queries=2, instead=upsample_queries),
    Option("return_lse", {"return_lse": True}),
)
BY_NAME = {option.name: option for option in (PLAIN, *OPTIONS)}

Job = tuple[Case, str]  # a problem and the name of an option
Call = tuple[Callable, tuple]  # a function, its inputs, and after them the gradient of what it gives


@dataclass(frozen=True)
class Row:
    """One timing with a cold L2 cache beside that of the plain window, or of the plain calls that do the same."""

    problem: str
    option: str
    mode: str
    ms_p50: float
    plain_ms: float
    ratio: float
    gpu: str
    torch: str
    triton: str | None
    commit: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.gpu, self.problem, self.option, self.mode


def jobs_of(only: str = "") -> list[Job]:
    """Every problem with every option that suits it, where `only` is in the name of one."""
    pairs = [(case, option) for case in PROBLEMS for option in OPTIONS if option.suits(case)]
    return [(case, option.name) for case, option in pairs if only in case.name or only in option.name]


def calls(case: Case, option: Option) -> Iterator[Call]:
    """The option's call, and what it is compared with where that is not the plain window."""
    arguments = option.arguments_for(case)
    query, _, _, grad_out = _shrunk(case, option.queries).maps(DEVICE)
    at_keys = replace(_shrunk(case, option.keys), heads=arguments.get("kv_heads", case.heads))
    _, key, value, _ = at_keys.maps(DEVICE)
    inputs = query, key, value

    if arguments.get("return_lse"):
        grad_out = grad_out, torch.randn(case.batch, case.heads, *query.shape[2:], device=DEVICE)
    attend = partial(local_attention, kernel_size=case.kernel, heads=case.heads, backend=BACKEND, **arguments)
    if option.trained:
        yield lambda q, k, v, bias: attend(q, k, v, bias=bias), (*inputs, arguments["bias"], grad_out)
    else:
        yield attend, (*inputs, grad_out)
    if option.instead:
        yield partial(option.instead, case), (*inputs, grad_out)


def _shrunk(case: Case, by: int) -> Case:
    return replace(case, height=case.height // by, width=case.width // by)


def compile_kernels(job: Job) -> None:
    """One forward and backward of all that a job runs, so that Triton's cache on disk has the kernels."""
    case, name = job
    with matmul_precision(case.precision):
        for attend, maps in calls(case, BY_NAME[name]):
            for _, run in passes(attend, maps, MODES):
                run()
    torch.cuda.synchronize()


def times(case: Case, option: Option, budget_s: float) -> list[dict[str, float]]:
    """Milliseconds of every mode, call by call."""
    with matmul_precision(case.precision):
        return [
            {mode: measure(run, DEVICE, budget_s=budget_s).ms_p50 for mode, run in passes(*call, MODES)}
            for call in calls(case, option)
        ]


def results(jobs: Sequence[Job], budget_s: float, where: Mapping) -> Iterator[tuple[Job, list[Row], str]]:
    """Each job with its rows, or with none and what went wrong."""
    plains: dict[Case, list[dict[str, float]]] = {}
    for case, name in jobs:
        try:
            own, *instead = times(case, BY_NAME[name], budget_s)
            if not instead and case not in plains:
                plains[case] = times(case, PLAIN, budget_s)
            (against,) = instead or plains[case]
        except Exception as caught:  # whatever Triton or the device raises: it is told, and the next job begins
            yield (case, name), [], f"{type(caught).__name__}: {caught}"[:300]
            continue
        figures = {mode: (own[mode], against[mode], own[mode] / against[mode]) for mode in MODES}
        yield (case, name), [Row(case.name, name, mode, *map(rounded, figures[mode]), **where) for mode in MODES], ""


def rows_table(rows: Sequence[Row]) -> Table:
    table = Table("problem", "option", "mode", "ms", "plain ms", "ratio")
    for row in rows:
        figures = f"{row.ms_p50:.4g}", f"{row.plain_ms:.4g}", f"{row.ratio:.2f}"
        table.add_row(row.problem, row.option, row.mode, *figures)
    return table


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to merge the rows into.")] = None,
    warm_up_with: Annotated[int, typer.Option("--warm-up", help="First compile, in this many processes.")] = 0,
    only: Annotated[str, typer.Option(help="Only problems or options whose name has this in it.")] = "",
    budget: Annotated[float, typer.Option(help="Seconds of repetition for each timing.")] = 0.1,
) -> None:
    """Time every window option against the plain window on the GPU."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here")
    jobs = jobs_of(only)
    if not jobs:
        raise typer.BadParameter(f"only must be in the name of a problem or an option, got {only!r}")
    console = Console(width=None if Console().is_terminal else 170)
    where, rows, failures = environment(DEVICE), [], {}

    if warm_up_with:
        plains = [(case, PLAIN.name) for case in dict.fromkeys(case for case, _ in jobs)]
        for job in warm_up(plains + jobs, warm_up_with, compile_kernels):
            failures[job] = "failed in the warm-up, not timed"
    for job, found, failure in results([job for job in jobs if job not in failures], budget, where):
        rows += found
        if failure:
            failures[job] = failure
        elif out:
            save_rows(out, rows, Row)
        console.print(f"{job[0].name}: {job[1]}", style="dim")

    console.print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")
    console.print(rows_table(rows))
    for (case, name), failure in failures.items():
        console.print(f"{case.name}: {name}: {failure}", style="bold red", markup=False)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
