"""Times plans of the native kernels on a GPU: python -m benchmarks.native_plans --help."""

import itertools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.unfused import CASES as UNFUSED_CASES
from image_local_attention import local_aggregate, local_attention, local_similarity
from image_local_attention.bench.cases import DTYPES, Case
from image_local_attention.bench.cases import GROUPS as DESIGNED
from image_local_attention.bench.measure import measure
from image_local_attention.bench.rows import environment
from image_local_attention.bench.timing import matmul_precision
from image_local_attention.kernels import gpu as gpus
from image_local_attention.kernels import native
from image_local_attention.kernels.native import launch, nvrtc, table, walk, walk_table
from image_local_attention.kernels.native.plan import UNFUSED, Form, Plan, shape, shared, suits

DEVICE = torch.device("cuda")
TASKS = "forward", "grad_query", "grad_key_value"
GROUPS = DESIGNED | {"unfused": UNFUSED_CASES}
TILES = (4, 8), (8, 8), (4, 16), (8, 16), (4, 32)
# Of planes, whose halos have unseen columns, and of two units.
LARGE = (4, 24), (8, 24), (8, 32), (4, 48), (4, 64), (16, 16)
BANDS = (0, 1), (2, 3), (4, 2), (4, 3)  # rows and slots
MORE_BANDS = (*BANDS, (1, 6), (2, 2))  # beside weights that leave little room
SIDE_BY_SIDE = (2, 1), (3, 1), (4, 1), (6, 1), (2, 2), (4, 2), (6, 2), (3, 3), (6, 3)  # groups, and tiles side by side
WALKS = tuple(itertools.product(((8, 8), (4, 16)), (1, 2, 4), SIDE_BY_SIDE))  # tiles, rows of bands and these
WALK_SLOTS = 14  # at most
CHUNKS = {True: (0, 32, 64), False: (0, 24, 32, 40, 48, 64)}  # columns, by whether they lie side by side
SMALL = 2**13  # pixels of maps whose blocks need not share a multiprocessor
RESERVED = 1024  # bytes of shared memory that a block takes besides its own
MOST_COPIED = 256  # rows or columns of a copy
THREADS = 256, 384, 512, 768  # of a multiprocessor, which bound the registers of each
MORE_THREADS = 128, *THREADS, 1024  # where little is held but weights, and much of them
SPILLED = 64  # bytes of a thread, at most
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Problem:
    """A task of a case, as the native launcher is asked for it."""

    case: Case
    task: str

    @property
    def form(self) -> Form:
        product = gpus.of(DEVICE).product(DTYPES[self.case.dtype], self.case.precision)
        return Form(product, self.case.layout == "nchw")

    @property
    def kernel(self) -> tuple[int, int]:
        return self.case.kernel, self.case.kernel

    def compiled(self, plan: Plan | walk.WalkPlan) -> launch.Compiled | walk.Walk:
        case, lead = self.case, (self.case.kernel // 2, self.case.kernel // 2)
        if isinstance(plan, walk.WalkPlan):
            multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
            of_maps = self.form.planes, DTYPES[case.dtype], case.depth
            return walk.Walk(self.task, plan, *of_maps, self.kernel, lead, multiprocessors)
        group = plan.group(case.heads, case.depth, self.form)
        return launch.Compiled(self.task, plan, self.form, DTYPES[case.dtype], case.depth, group, self.kernel, lead)

    def candidates(self) -> Iterator[Plan | walk.WalkPlan]:
        """Plans that fit into shared memory: of blocks that walk, and of those that would share a multiprocessor."""
        if walk_table.serves(self.task, self.form, self.case.depth, self.case.width, gpus.of(DEVICE).arch):
            yield from self._walks()
        case, single = self.case, self.form.element == 4
        if case.depth not in {row.depth for _, _, row in table.rows()}:
            return
        sized, steps = THREADS, (1, 2, 3, 4, 6, 7)  # of wide windows 3, or 6, fill whole rows
        if single:  # by how many registers sums of so many channels take
            sized = (384, 512, 768) if case.depth == 16 else (256, 384, 512)
            steps = (1, 2, 3) if self.form.product == "three-pass" else (1, 2, 3, 4)
            if self.form.product == "three-pass" and case.depth > 32 and self.task != "forward":
                sized, steps = (256, 384), (1,)
        bands = (*BANDS, (2, 2), (1, 4)) if self.form.planes else BANDS
        if self.task in UNFUSED:
            sized, steps, bands = MORE_THREADS, (1, 2, 3) if single else (1, 2, 3, 4, 6), MORE_BANDS
        for (units, sharers), (band, slots), step in itertools.product(self._sharing(), bands, steps):
            for tile, heads in itertools.product(self._tiles(units), (1, 2, 4)):
                warps = tile[0] * tile[1] // (16 * units) * sharers * heads
                residents = {threads // (32 * warps) for threads in sized if threads % (32 * warps) == 0}
                for resident in residents | ({1} if case.queries <= SMALL else set()):
                    plan = Plan(tile, warps, resident, step, band=band, slots=slots, units=units, shared_by=sharers)
                    yield from filter(self._fits, self._shifts(plan))

    def _walks(self) -> Iterator[walk.WalkPlan]:
        """With as many bands as there is room for, and with two fewer."""
        one_by_one = (False, True) if self.task != "forward" else (False,)
        chunks = CHUNKS[self.form.planes]
        for (tile, band, (groups, abreast)), *more in itertools.product(WALKS, one_by_one, chunks):
            plans = (walk.WalkPlan(tile, band, slots, groups, abreast, *more) for slots in range(WALK_SLOTS, 1, -1))
            fit = [plan for plan in plans if (held := self.compiled(plan)).fits and held.shared <= limit()]
            yield from fit[:3:2]

    def _sharing(self) -> Iterator[tuple[int, int]]:
        """Units of a warp, and warps of a subtile. Sums of two units of many floats would take too many registers."""
        yield 1, 1
        if self.task in UNFUSED or self.form.element == 2 or self.case.depth <= 32:
            yield 2, 1
        if self.task == "similarity":
            yield from ((1, 2), (2, 2))

    def _tiles(self, units: int) -> tuple[tuple[int, int], ...]:
        large = units == 2 or self.form.planes
        return (*TILES, *LARGE) if large and self.task not in UNFUSED else TILES

    def _shifts(self, plan: Plan) -> Iterator[Plan]:
        """A plan, and the same with tiles that begin before the map, if that makes a difference."""
        yield plan
        moved = replace(plan, shifted=True)
        if shape(self.task, moved, self.kernel, self.kernel[1] // 2, self.form).before:
            yield moved

    def _fits(self, plan: Plan) -> bool:
        group = plan.group(self.case.heads, self.case.depth, self.form)
        held = shape(self.task, plan, self.kernel, self.kernel[1] // 2, self.form)
        takes = shared(self.task, plan, group, self.case.depth, self.kernel, held, self.form) + RESERVED
        if takes * plan.resident > limit() + RESERVED or plan.step > held.pairs or max(held.band) > MOST_COPIED:
            return False
        return suits(self.task, plan, group, self.form) and not (plan.band and held.bands == 1)


def limit() -> int:
    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin


def compile_plan(compiled: launch.Compiled | walk.Walk) -> int | str:
    """Bytes of a thread's stack, or what went wrong; the machine code is kept on disk."""
    try:
        arch = f"--gpu-architecture=sm_{gpus.of(DEVICE).arch}{compiled.features}"
        cubin = nvrtc.compiled(compiled.source, (arch, *compiled.options))
    except nvrtc.CompileError as error:
        return str(error)
    return stack_of(cubin)


def stack_of(cubin: bytes) -> int:
    """Bytes of a thread's stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1])


def run_of(problem: Problem) -> Callable:
    """A function that runs a task and gives its results. A backward task runs delta too, if it does not make it."""
    with native.portable():
        return (unfused_run if problem.task in UNFUSED else fused_run)(problem)


def fused_run(problem: Problem) -> Callable:
    case, task = problem.case, problem.task
    *inputs, grad_out = case.maps(DEVICE)

    def attend(*maps: Tensor) -> Tensor:
        return local_attention(*maps, case.kernel, heads=case.heads, scale=1.0, backend="triton")

    if task == "forward":
        return lambda: (attend(*inputs),)
    wanted = {"grad_query": (True, False, False), "grad_key_value": (False, True, True)}[task]
    leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    out, of = attend(*leaves), [x for x in leaves if x.requires_grad]
    return lambda: torch.autograd.grad(out, of, grad_out, retain_graph=True)


def unfused_run(problem: Problem) -> Callable:
    case, task = problem.case, problem.task
    query, key, value, grad_out = case.maps(DEVICE)
    options = {"kernel_size": case.kernel, "heads": case.heads, "backend": "triton"}
    weight = local_similarity(query, key, **options)
    if task == "similarity":
        return lambda: (local_similarity(query, key, **options),)
    if task == "aggregate":
        return lambda: (local_aggregate(weight, value, **options),)
    value.requires_grad_()
    out = local_aggregate(weight, value, **options)
    return lambda: torch.autograd.grad(out, value, grad_out, retain_graph=True)


def far(results: tuple, wanted: tuple) -> float:
    """The largest difference, as a share of the largest number."""
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(results, wanted, strict=True))


def time_plans(problem: Problem, plans: list[Plan | walk.WalkPlan], run: Callable, budget_s: float) -> list[dict]:
    with native.portable():
        wanted = run()
        portable = measure(run, DEVICE, budget_s=4 * budget_s).ms_p50
    rows = [{"plan": "portable", "name": "portable", "ms": portable}]
    for plan in plans:
        named = {"plan": asdict(plan), "name": str(plan)}
        with native.using(problem.task, plan):
            try:
                off = far(run(), wanted)
                rows.append(named | {"ms": measure(run, DEVICE, budget_s=budget_s).ms_p50, "off": off})
            except RuntimeError as error:
                rows.append(named | {"ms": float("inf"), "error": str(error)})
    return sorted(rows, key=lambda row: row["ms"])


def main(
    only: Annotated[list[str], typer.Option(help="Cases with one of these in the name.")],
    task: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join((*TASKS, *UNFUSED))}; else the first three.")
    ] = None,
    group: Annotated[str, typer.Option(help=f"Of cases: {', '.join(GROUPS)}.")] = "design",
    processes: Annotated[int, typer.Option(help="That compile.")] = 14,
    units: Annotated[int, typer.Option(help="Only plans whose warps take so many units; 0: any.")] = 0,
    budget: Annotated[float, typer.Option(help="Seconds of repetition for each candidate.")] = 0.02,
    show: Annotated[int, typer.Option(help="Plans of each table.")] = 6,
    out: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
) -> None:
    """Time the plans that fit a case, beside Triton's kernel. A backward task is timed with what runs before it."""
    console, began, rows = Console(width=None if Console().is_terminal else 170), time.perf_counter(), []
    problems = [
        Problem(case, each)
        for case in GROUPS[group]
        for each in task or TASKS
        if any(text in case.name for text in only)
    ]
    jobs = [
        (problem, plan)
        for problem in problems
        for plan in problem.candidates()
        if units in (0, getattr(plan, "units", 0))
    ]
    with ThreadPoolExecutor(processes) as pool:
        stacks = dict(zip(jobs, pool.map(lambda job: compile_plan(job[0].compiled(job[1])), jobs), strict=True))
    console.print(f"compiled {len(jobs)} plans: {time.perf_counter() - began:.0f} s", style="dim")
    where = environment(DEVICE)
    for problem in problems:
        for plan in (plan for each, plan in jobs if each == problem):
            if isinstance(stacks[problem, plan], str):
                console.print(stacks[problem, plan], style="bold red")
        fitting = [plan for each, plan in jobs if each == problem and stacks[each, plan] in range(SPILLED + 1)]
        with matmul_precision(problem.case.precision):
            timed = time_plans(problem, fitting, run_of(problem), budget)
        shown = Table("plan", "ms", "off", title=f"{problem.case.name}: {problem.task}")
        for row in [*timed[:show], *(row for row in timed[show:] if row["plan"] == "portable")]:
            shown.add_row(row["name"], f"{row['ms']:.4g}", row.get("error", f"{row.get('off', 0):.1e}"))
        console.print(shown)
        rows += [{"case": problem.case.name, "task": problem.task} | row | where for row in timed]
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    console.print(f"{time.perf_counter() - began:.0f} s since the start", style="dim")


if __name__ == "__main__":
    typer.run(main)
