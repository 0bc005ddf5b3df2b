"""The commands, and nothing that takes long to import: `--help` should not wait for torch."""

import typer

from .bench import bench
from .denoise import denoise
from .info import info
from .tune import tune

app = typer.Typer(
    help="Every pixel attends to the patch around it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(denoise)
app.command()(bench)
app.command()(tune)
app.command()(info)
