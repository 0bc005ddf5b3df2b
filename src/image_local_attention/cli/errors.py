"""What the user can put right, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


class UserError(Exception):
    """A file, an option or a device that the command cannot work with."""


def console() -> Console:
    """Standard error: results go to standard output, everything said on the way goes here."""
    return Console(stderr=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on standard error and exit code 2."""
    try:
        yield
    except UserError as error:
        say(f"error: {error}", style="red")
        raise typer.Exit(2) from None


def say(line: str, *, style: str = "yellow") -> None:
    """One line, never wrapped; brackets and colons in file names are not markup."""
    # A message of another library may have several lines.
    console().print(" ".join(line.split()), style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)
