"""`image-local-attention tune`"""

from dataclasses import asdict
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .errors import UserError, console, say, user_errors

if TYPE_CHECKING:
    from ..tune.find import Found
    from ..tune.problem import Subject


class Dtype(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Precision(str, Enum):
    ieee = "ieee"
    tf32 = "tf32"


class Layout(str, Enum):
    channels_last = "channels_last"
    nchw = "nchw"


class Border(str, Enum):
    zeros = "zeros"
    mask = "mask"
    shift = "shift"
    reflect = "reflect"
    replicate = "replicate"
    circular = "circular"


class Bias(str, Enum):
    slot = "slot"
    displacement = "displacement"


class Causal(str, Enum):
    axes = "axes"
    raster = "raster"


class Task(str, Enum):
    forward = "forward"
    grad_query = "grad_query"
    grad_key_value = "grad_key_value"


def tune(
    height: Annotated[int, typer.Option(min=1, help="Of the maps, pixels.")],
    width: Annotated[int, typer.Option(min=1, help="Of the maps, pixels.")],
    channels: Annotated[int, typer.Option(min=1, help="Per head of query and key.")],
    kernel: Annotated[int, typer.Option(min=1, help="Side of the window.")],
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 1,
    heads: Annotated[int, typer.Option(min=1)] = 1,
    value_channels: Annotated[
        int | None, typer.Option(min=1, help="Per head of value and output.", show_default="those of query and key")
    ] = None,
    border: Annotated[Border, typer.Option()] = Border.zeros,
    dilation: Annotated[int, typer.Option(min=1)] = 1,
    causal: Annotated[Causal | None, typer.Option(help="Along both axes, or in raster order.")] = None,
    bias: Annotated[Bias | None, typer.Option(help="A bias by window slot or by displacement.")] = None,
    key_mask: Annotated[bool, typer.Option("--key-mask", help="With a mask of keys.")] = False,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.bf16,
    precision: Annotated[Precision, typer.Option(help="Of fp32 products.")] = Precision.ieee,
    layout: Annotated[Layout, typer.Option(help="Of the maps in memory.")] = Layout.channels_last,
    task: Annotated[list[Task] | None, typer.Option(help="What to search plans of.", show_default="all")] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="To search for, once the plans of the table are compiled.")
    ] = 120,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That compile.", show_default="by cores and memory of the GPU")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of plans.", show_default="the one that launches read")
    ] = None,
) -> None:
    """Search for faster launch plans of one case on this GPU, and remember them.

    Times are the device's, with a cold L2 cache. A plan is remembered where its results agree with those of the
    table's plan and it is at least 3 % faster when both are timed anew. Launches that ask for the same kind of plan,
    whatever the size of their maps, take it from then on; results may differ from before in their last bits.
    """
    with user_errors():
        if find_spec("triton") is None:
            raise UserError("tune needs a GPU and Triton, and the package triton is not installed")
        from ..bench.cases import Case
        from ..tune.problem import Subject

        precise = precision.value if dtype == Dtype.fp32 else "ieee"
        maps = batch, height, width, heads, channels, kernel, dtype.value, precise, layout.value
        case = Case(*maps, depth_value=value_channels, border=border.value, dilation=dilation)
        ends = "raster" if causal == Causal.raster else causal is not None
        subject = Subject(case, causal=ends, bias=bias and bias.value, key_mask=key_mask)
        _tune(subject, [each.value for each in task or Task], processes, seconds, out)


def _tune(subject: "Subject", tasks: list[str], processes: int | None, seconds: float, out: Path | None) -> None:
    import torch

    from ..kernels import remembered
    from ..kernels.cache import VARIABLE
    from ..tune.find import entries, find, gpu_obstacle, processes_for

    try:
        _ = subject.window
    except ValueError as error:
        raise UserError(str(error)) from error
    if reason := gpu_obstacle(subject.case):
        raise UserError(f"tune needs a GPU that Triton compiles for: {reason}")
    file = out or remembered.path()
    if file is None:
        raise UserError(f"--out must name a file where {VARIABLE} is off")
    try:
        remembered.read(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be added to: {error}") from error

    workers = processes or processes_for(subject.case, torch.device("cuda"))
    with console().status("compiling the plans of the table") as status:
        try:
            found = find(subject, tasks, workers, seconds, lambda tried: status.update(f"{tried} plans tried"))
        except RuntimeError as error:
            raise UserError(f"{subject.name}: {error}") from error
    for served in [each for each in tasks if each not in {one.asked.task for one in found}]:
        say(f"{served}: a native kernel serves this case, and takes no plan of these", style="dim")
    if not found:
        return
    terminal = Console(width=None if Console().is_terminal else 180)
    terminal.print(_table(found, subject.name))
    new = entries(found, subject)
    if not new:
        say("nothing is remembered: no plan is faster by as much as times may be off", style="dim")
        return
    try:
        remembered.write(file, new)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error})") from error
    terminal.print(f"remembered in {file}", markup=False, highlight=False, soft_wrap=True)
    if file != remembered.path():
        say(f"launches read {remembered.path() or 'no file'}, as {VARIABLE} says")


def _table(found: "list[Found]", name: str) -> Table:
    table = Table("task", "table's plan, ms", "best, ms", "gain", "plans tried", "what it changes", title=name)
    for each in found:
        before, after = asdict(each.table), asdict(each.best)
        kept = ", ".join(f"{field} {after[field]}" for field in after if after[field] != before[field]) or "-"
        table.add_row(
            each.asked.task, f"{each.table_ms:.4g}", f"{each.ms:.4g}", f"{each.gain:.1%}", str(each.tried), kept
        )
    return table
