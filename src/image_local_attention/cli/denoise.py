"""`image-local-attention denoise IN OUT`"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .compare import comparison
from .errors import UserError, console, say, user_errors
from .pictures import Picture, check_output, read_picture, to_image, write_image

if TYPE_CHECKING:
    import torch


class PatchWeights(str, Enum):
    gaussian = "gaussian"
    flat = "flat"


def denoise(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The picture to clean.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write it; may be IN.")],
    sigma: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Noise level: standard deviation on the scale 0 to 255.",
            show_default="estimated",
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Side of the search window, odd.")] = 21,
    patch: Annotated[int, typer.Option(help="Side of the patches that are compared, odd.")] = 5,
    strength: Annotated[float, typer.Option(min=0.0, help="More averages more: h = strength x sigma.")] = 1.0,
    patch_weights: Annotated[
        PatchWeights, typer.Option(help="Whether the middle of a patch counts more.")
    ] = PatchWeights.gaussian,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps, xpu.", show_default="cuda where there is one"),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write before, after, difference side by side.")
    ] = None,
) -> None:
    """Remove noise from a photograph by non-local means.

    Takes grey, colour, CMYK and 16-bit grey pictures, and of animations the first frame. Keeps alpha, ICC
    profile, EXIF and resolution. The suffix of OUT says the format.
    """
    with user_errors():
        if compare is not None and compare.resolve() in (source.resolve(), target.resolve()):
            raise UserError(f"--compare {compare} must be another file than IN and OUT")
        before = read_picture(source)
        check_output(target, before.mode)
        if compare is not None:
            check_output(compare, "RGB")
        for note in before.notes:
            say(f"note: {note}")
        start = time.perf_counter()
        place = _device(device)
        noise = None if sigma is None else sigma / 255
        options = {"window": window, "patch": patch, "strength": strength}
        after, noise = _clean(before, noise, device=place, patch_weights=patch_weights.value, **options)
        if compare is not None:
            write_image(comparison(before, after, 255 * noise), compare)
        write_image(to_image(after), target, after.metadata)
    seconds = time.perf_counter() - start
    origin = "estimated" if sigma is None else "given"
    typer.echo(
        f"{target}: {after.size} {after.mode}, noise {255 * noise:.1f} of 255 ({origin}), {seconds:.1f} s on {place}"
    )


def _clean(before: Picture, noise: float | None, **options) -> tuple[Picture, float]:
    """The picture without noise, and the noise level on [0, 1] that was assumed."""
    import torch

    from image_local_attention.nlm import estimate_sigma, non_local_means

    levels = np.multiply(before.colours, 1 / before.white, dtype=np.float32)
    image = torch.from_numpy(levels).permute(2, 0, 1)[None]
    try:
        if noise is None:
            noise = estimate_sigma(image)
        with _progress_bar() as progress:
            image = non_local_means(image, sigma=noise, progress=progress, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise UserError("the device has too little memory for a block of this picture; try --device cpu") from error
    levels = image[0].permute(1, 2, 0).numpy()
    if before.white > 1:
        levels = np.multiply(levels, before.white, out=levels)
        levels = np.clip(np.rint(levels, out=levels), 0, before.white, out=levels)
    return replace(before, colours=levels.astype(before.colours.dtype)), noise


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, from the end of the first block on: work of one block needs none."""
    terminal = console()
    columns = TextColumn("denoising"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)
    task = bar.add_task("denoising")

    def update(done: int, total: int) -> None:
        if done < total:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


def _device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Not every name that parses is there, and not every device gives numbers back ("meta").
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason}") from error
    return torch.device(name)
