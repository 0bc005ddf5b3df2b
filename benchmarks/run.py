"""Times the library, and the unfold code beside it, and keeps the rows: python -m benchmarks.run --help."""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, get_type_hints

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from image_local_attention import local_attention

from .baselines import unfold_attention
from .cases import CPU_GOALS, GROUPS, MODES, Case, extension_ms, sketch_ms
from .measure import Measurement, measure

UNFOLD_COPIES = 4.5  # of a map, times kH*kW: what the unfold code holds in forward and backward
REGION = 32  # pixels square: where a large result is compared with fp64


@dataclass(frozen=True)
class Row:
    """One timing. `l2` is "cold" or "hot" on a GPU; `gpu` says how many threads where it was a CPU.

    error: relative Frobenius norm against fp64: of the output, or the largest of the gradients', or both.
    floor_ms, sketch_ms, extension_ms: of one H200; None elsewhere and where unknown.
    """

    case: str
    impl: str
    mode: str
    l2: str | None
    ms_p50: float
    ms_p20: float
    ms_p80: float
    runs: int
    peak_mib: float
    error: float
    floor_ms: float | None
    floor_share: float | None
    sketch_ms: float | None
    extension_ms: float | None
    torch: str
    triton: str | None
    gpu: str
    commit: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.gpu, self.case, self.impl, self.mode, self.l2 or ""


def load_rows(path: Path, kind: type = Row) -> list:
    """The rows of a results file; ValueError where one has unknown, missing or mistyped fields, or comes twice.

    kind: the rows' dataclass. Two rows with one `key` are the same.
    """
    rows = [_row(entry, path, kind) for entry in json.loads(path.read_text())]
    if len({row.key for row in rows}) != len(rows):
        raise ValueError(f"{path} has two rows of one case, option or implementation, mode, L2 state and GPU")
    return rows


def _row(entry: dict, path: Path, row: type) -> object:
    types = get_type_hints(row)
    if entry.keys() != types.keys():
        raise ValueError(f"{path}: fields missing or unknown: {sorted(entry.keys() ^ types.keys())}, in {entry}")
    for name, kind in types.items():
        got = entry[name]
        if not isinstance(got, kind) or isinstance(got, bool):
            raise ValueError(f"{path}: {name} must be {kind}, got {got!r}, in {entry}")
    return row(**entry)


def save_rows(path: Path, rows: Sequence, kind: type = Row) -> None:
    """Writes rows, one a line, sorted; those of the file that have no newer one stay."""
    merged = {row.key: row for row in (load_rows(path, kind) if path.exists() else [])} | {row.key: row for row in rows}
    lines = ",\n".join(json.dumps(asdict(merged[key])) for key in sorted(merged))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """fp32 products in "ieee" or "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision({"ieee": "highest", "tf32": "high"}[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def operator(case: Case, impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if impl == "unfold":
        return partial(unfold_attention, kH=case.kernel, kW=case.kernel)
    return partial(local_attention, kernel_size=case.kernel, heads=case.heads, border=case.border)


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
    maps = case.maps(device)
    exact = [(region, exact_results(case, maps, region)) for region in regions(case)]
    results: list[tuple[Tensor, ...]] = []
    with matmul_precision(case.precision):
        for mode, run in passes(operator(case, impl), maps, modes):
            taken = measure(
                lambda _, run=run: results.append(run()),
                device,
                setup=results.clear,
                budget_s=budget_s,
                flush_l2=not hot,
            )
            yield mode, taken, error(case, exact, mode, results[-1])
            results.clear()


Span = tuple[int, int]
Exact = tuple["Region", list[Tensor]]


@dataclass(frozen=True)
class Region:
    """A rectangle of one head of one image."""

    image: int
    head: int
    rows: Span
    columns: Span

    def of(self, x: Tensor, heads: int) -> Tensor:
        """The region of a map [B, heads*D, H, W] -> [1, D, h, w]."""
        head = x[self.image : self.image + 1].unflatten(1, (heads, -1))[:, self.head]
        return head[..., slice(*self.rows), slice(*self.columns)]


def regions(case: Case) -> list[Region]:
    """Where to compare: one head of a small map; of a large one the centre of the first and the end of the last."""
    size = case.height, case.width
    first, last = (0, 0), (case.batch - 1, case.heads - 1)
    if max(size) <= 2 * REGION:
        return [Region(*last, *((0, n) for n in size))]
    end = [(max(0, n - REGION), n) for n in size]
    centre = [((begin + 1) // 2, (begin + 1) // 2 + n - begin) for begin, n in end]
    return [Region(*first, *centre), Region(*last, *end)]


def exact_results(case: Case, maps: Sequence[Tensor], region: Region) -> list[Tensor]:
    """Output and gradients of query, key and value in fp64 at a region.

    Gradients at the region come from queries one halo away, and their softmax from keys two halos away: what lies
    farther out is cut off.
    """
    halo = 2 * (case.kernel // 2)
    spans = (region.rows, case.height), (region.columns, case.width)
    rows, columns = ((max(0, begin - halo), min(end + halo, size)) for (begin, end), size in spans)
    around = Region(region.image, region.head, rows, columns)
    *leaves, grad_out = (around.of(x, case.heads).double() for x in maps)
    for x in leaves:
        x.requires_grad_()
    out = local_attention(*leaves, case.kernel, border=case.border, backend="tiled")

    inner = [
        (begin - start, end - start) for (begin, end), start in ((region.rows, rows[0]), (region.columns, columns[0]))
    ]
    inside = Region(0, 0, *inner)
    return [inside.of(x, 1) for x in _both(out, leaves, grad_out)]


def error(case: Case, exact: Sequence[Exact], mode: str, results: Sequence[Tensor]) -> float:
    """Largest of the results' relative Frobenius norms of the deviation from fp64."""
    chosen = {"forward": slice(0, 1), "backward": slice(1, 4), "forward+backward": slice(0, 4)}[mode]
    squares = torch.zeros(len(results), 2, dtype=torch.float64)
    for region, truths in exact:
        for i, (got, truth) in enumerate(zip(results, truths[chosen], strict=True)):
            deviation = region.of(got, case.heads).double() - truth
            squares[i] += torch.stack([deviation.square().sum(), truth.square().sum()]).cpu()
    return (squares[:, 0] / squares[:, 1]).sqrt().max().item()


def environment(device: torch.device) -> dict[str, str | None]:
    """The fields of a row that say what ran it."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else f"none (CPU, {torch.get_num_threads()} thread(s))"
    triton = import_module("triton").__version__ if find_spec("triton") else None
    return {"torch": torch.__version__, "triton": triton, "gpu": gpu, "commit": commit()}


def commit() -> str:
    """ILA_COMMIT where it is set (a copy without git), else git's, else "unknown"."""
    if name := os.environ.get("ILA_COMMIT"):
        return name
    if not shutil.which("git"):
        return "unknown"
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"


def row_of(case: Case, impl: str, mode: str, l2: str | None, taken: Measurement, err: float, where: dict) -> Row:
    h200 = "H200" in where["gpu"]
    return Row(
        case=case.name,
        impl=impl,
        mode=mode,
        l2=l2,
        **{name: rounded(value) for name, value in asdict(taken).items()},
        error=rounded(err, 3),
        floor_ms=rounded(case.floor_ms(mode)) if h200 else None,
        floor_share=rounded(case.floor_ms(mode) / taken.ms_p50, 3) if h200 else None,
        sketch_ms=rounded(sketch_ms(case, mode)) if h200 else None,
        extension_ms=rounded(extension_ms(case, mode)) if h200 else None,
        **where,
    )


def rounded(x: float | None, digits: int = 4) -> float | None:
    return x if x is None or isinstance(x, int) else float(f"{x:.{digits}g}")


def impls(case: Case, group: str, device: torch.device) -> Iterator[str]:
    """Ours, and the unfold code where a group asks for it and it fits."""
    yield "ours"
    if group == "design":
        return
    wanted = UNFOLD_COPIES * case.kernel**2 * case.batch * case.height * case.width * sum(case.depths) / 2 * 4
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    if wanted < free:
        yield "unfold"


def compile_kernels(case: Case) -> None:
    """One forward and backward, so that Triton's cache on disk has the kernels."""
    *inputs, grad_out = case.maps(torch.device("cuda"))
    leaves = [x.requires_grad_() for x in inputs]
    with matmul_precision(case.precision):
        operator(case, "ours")(*leaves).backward(grad_out)
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


def rows_table(rows: Sequence[Row]) -> Table:
    table = Table("case", "impl", "mode", "ms", "p20..p80", "peak MiB", "error", "floor", "sketch x", "extension x")
    for row in rows:
        table.add_row(
            row.case,
            row.impl,
            row.mode,
            f"{row.ms_p50:.4g}",
            f"{row.ms_p20:.4g}..{row.ms_p80:.4g}",
            f"{row.peak_mib:.4g}",
            f"{row.error:.1e}",
            "" if row.floor_share is None else f"{row.floor_share:.0%}",
            *("" if ms is None else f"{ms / row.ms_p50:.2f}" for ms in (row.sketch_ms, row.extension_ms)),
        )
    return table


def goals_table(rows: Sequence[Row]) -> Table:
    """Unfold against ours, and the goals, for the cases of the group "cpu"."""
    table = Table("kernel", "mode", "unfold ms", "ours ms", "ratio", "goal", "unfold MiB", "ours MiB", "ratio", "goal")
    found = {(row.case, row.impl, row.mode): row for row in rows}
    for case in GROUPS["cpu"]:
        for mode in ("forward", "forward+backward"):
            pair = [found.get((case.name, impl, mode)) for impl in ("unfold", "ours")]
            if None in pair:
                continue
            speed, memory = CPU_GOALS.get((case.kernel, mode), (None, None))
            table.add_row(
                f"{case.kernel}x{case.kernel}",
                mode,
                *_against(*(row.ms_p50 for row in pair), speed),
                *_against(*(row.peak_mib for row in pair), memory),
            )
    return table


def _against(unfold: float, ours: float, goal: float | None) -> tuple[str, ...]:
    ratio = unfold / ours if ours else math.inf
    verdict = "" if goal is None else f"{goal} {'met' if ratio >= goal else 'MISSED'}"
    return f"{unfold:.4g}", f"{ours:.4g}", f"{ratio:.1f}", verdict


def main(
    group: Annotated[str, typer.Option(help=f"Which cases: {', '.join(GROUPS)}.")] = "design",
    out: Annotated[Path | None, typer.Option(help="JSON file to merge the rows into.")] = None,
    warm_up_with: Annotated[int, typer.Option("--warm-up", help="First compile, in this many processes.")] = 0,
    only: Annotated[str, typer.Option(help="Only cases whose name has this in it.")] = "",
    hot: Annotated[bool, typer.Option(help="Leave the L2 cache as an equal call just before left it.")] = False,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; torch's choice by default.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of repetition: 0.3 on a GPU, 5 on a CPU.")] = None,
) -> None:
    """Time the cases of a group on the GPU, or on the CPU where there is none or the group is "cpu"."""
    if group not in GROUPS:
        raise typer.BadParameter(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    device = torch.device("cuda" if torch.cuda.is_available() and group != "cpu" else "cpu")
    modes = ("forward", "forward+backward") if device.type == "cpu" else MODES
    if threads is not None:
        torch.set_num_threads(threads)
    if budget is None:
        budget = 5.0 if device.type == "cpu" else 0.3
    l2 = None if device.type == "cpu" else "hot" if hot else "cold"
    cases = [case for case in GROUPS[group] if only in case.name]
    console = Console(width=None if Console().is_terminal else 170)

    failed = warm_up(cases, warm_up_with) if warm_up_with and device.type == "cuda" else []
    where, rows = environment(device), []
    for case in cases:
        if case in failed:
            continue
        for impl in impls(case, group, device):
            for mode, taken, err in time_case(case, impl, device, modes, hot, budget):
                rows.append(row_of(case, impl, mode, l2, taken, err, where))
            console.print(f"{case.name}: {impl}", style="dim")
        if out:
            save_rows(out, rows)

    console.print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")
    console.print(goals_table(rows) if group == "cpu" else rows_table(rows))
    if failed:
        console.print("failed in the warm-up, not timed: " + "; ".join(case.name for case in failed), style="bold red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
