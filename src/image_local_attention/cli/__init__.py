"""The command line: `image-local-attention denoise`, `image-local-attention info`."""

import sys

# What `pip install image-local-attention[cli]` brings.
EXTRA = ("numpy", "PIL", "rich", "typer")


def main() -> None:
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(
            f"image-local-attention: the command line needs {error.name}, which is not installed: "
            "pip install 'image-local-attention[cli]'"
        )
    app()
