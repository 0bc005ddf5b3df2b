"""Where this library keeps what was compiled and what was tuned."""

import os
import secrets
from pathlib import Path

VARIABLE = "IMAGE_LOCAL_ATTENTION_CACHE"


def folder() -> Path | None:
    """The folder that VARIABLE names, else one in the user's cache; None, to keep nothing, where it is "off"."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    if not chosen:
        chosen = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "image-local-attention")
    return Path(os.path.expanduser(chosen))


def write(file: Path, content: bytes) -> None:
    """Writes a file that is whole at every moment, in a folder that is made where it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
